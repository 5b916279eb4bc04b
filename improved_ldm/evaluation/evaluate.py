"""Compute scores of samples against real images: features in fixed batches, then all scores at once."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from improved_ldm.bounds import Count, Parts, Seed
from improved_ldm.evaluation.adm_scores import adm_inception_score, adm_precision_recall
from improved_ldm.evaluation.clip_score import ClipScorer
from improved_ldm.evaluation.features import FeatureNetwork, Features
from improved_ldm.evaluation.gaussian import Gaussian
from improved_ldm.evaluation.networks import MeasuringNetwork
from improved_ldm.evaluation.processes import gather_batches, own_batches, rank_and_world_size
from improved_ldm.evaluation.reference import Reference
from improved_ldm.evaluation.reference_npz import BatchImages, ReferenceStatistics
from improved_ldm.evaluation.sampling import Samples
from improved_ldm.evaluation.scores import RealFeatures, clip_discrepancy, inception_score, kernel_distance
from improved_ldm.places import shareable_place
from improved_ldm.settings import Section

KID_SUBSET_SIZE, INCEPTION_SPLITS = 1000, 10  # as in torch-fidelity


class ScoreSettings(Section):
    """Settings of the scores."""

    kid_subsets: Parts = 100
    """Number of subsets that the kernel distance is averaged over."""
    kid_subset_size: Annotated[Count, Field(ge=2)] | None = None
    """Images per subset; default: 1000, or the size of the smaller set."""
    inception_splits: Parts | None = None
    """Number of parts that the Inception score is averaged over; default: 10, or the number of images."""
    nearest_k: Parts = 5
    """Number of neighbours that set the radii of precision, recall, density and coverage."""
    adm: bool = False
    """Also compute precision, recall and Inception score as the ADM suite does, and with Inception, sFID."""
    seed: Seed = 0
    """Seed of the subsets and splits."""

    def fitted(self, images: int) -> "ScoreSettings":
        """The settings when the smaller set has `images` images."""
        fitting = {
            "kid_subset_size": self.kid_subset_size or min(KID_SUBSET_SIZE, images),
            "inception_splits": self.inception_splits or min(INCEPTION_SPLITS, images),
        }
        return self.model_copy(update=fitting)

    def check_reference(self, images: int):
        """Raise a ValueError if there are too few reference images for the scores."""
        self._check("reference images", images, kid_subset_size=self.kid_subset_size, nearest_k=self.nearest_k + 1)

    def check_samples(self, images: int, network: FeatureNetwork):
        """Raise a ValueError if there are too few samples for the scores of a network."""
        splits = {"inception_splits": self.inception_splits} if network.is_classifier else {}
        self._check("samples", images, kid_subset_size=self.kid_subset_size, nearest_k=self.nearest_k + 1, **splits)

    def _check(self, what: str, images: int, **least: int | None):
        for name, count in least.items():
            if count is not None and images < count:
                raise ValueError(f"there are {images} {what}; `{name}` {getattr(self, name)} needs at least {count}.")


class Evaluation:
    """Scores sets of samples against one reference set.

    Images are read in fixed batches, shared among the processes of `torch.distributed`. Only the features and one
    batch of images are in memory. The scores are computed once, on the main process.

    Args:
        reference: Real images, whose features are computed once, here. None leaves out the scores that need them.
        network: Feature network.
        clip: Scorer of samples against their prompts, or None.
        settings: Settings of the scores.
        batch_size: Images per batch.
        statistics: Statistics that the Fréchet distances use instead of the real images, or None.
        cmmd: CLIP model of CMMD, or None.
    """

    def __init__(
        self,
        reference: Reference | BatchImages | None,
        network: FeatureNetwork,
        clip: ClipScorer | None,
        settings: ScoreSettings,
        batch_size: int,
        statistics: ReferenceStatistics | None = None,
        cmmd: ClipScorer | None = None,
    ):
        self.reference, self.network, self.clip, self.cmmd = reference, network, clip, cmmd
        self.settings, self.batch_size, self.statistics = settings, batch_size, statistics
        self._real = None if reference is None else self._gather(self._read_reference())
        self._neighbours = (
            None if self._real is None else RealFeatures(self._real.features.vectors, settings.nearest_k)
        )
        self.gaussians = {} if self._real is None else self._fit(self._real.features)

    def scores(self, samples: Samples) -> dict[str, float] | None:
        """All scores of a set of samples by name.

        Args:
            samples: Images to score. A CLIP scorer needs their prompts.

        Returns:
            On the main process: fid; kid and its standard deviation over subsets, precision, recall, density and
            coverage if there are real images; inception_score and its standard deviation over splits if the network
            is a classifier; clip_score and cmmd if there are networks for them; with `settings.adm`, sfid if the
            network has spatial features, and adm_precision, adm_recall and adm_inception_score under the same
            conditions. None on the other processes.
        """
        count, measured, clip_scores = len(samples.files), [], []
        for numbers in _progress(own_batches(count, self.batch_size), count, self.batch_size, "scoring"):
            pixels = samples.pixels(numbers)
            measured.append(self._measure(pixels))
            if self.clip is not None:
                clip_scores.append(self.clip(pixels, samples.prompts[numbers.start : numbers.stop]).cpu())
        fake, clip_scores = self._gather(measured), gather_batches(clip_scores)
        if fake is None:
            return None
        scores = self._compare(fake.features)
        if clip_scores:
            scores["clip_score"] = torch.cat(clip_scores).mean().item()
        if self.cmmd is not None:
            scores["cmmd"] = clip_discrepancy(self._real.embeddings, fake.embeddings)
        return scores

    def _compare(self, fake: Features) -> dict[str, float]:
        """The scores that are computed from features alone."""
        real = None if self._real is None else self._real.features.vectors
        settings = self.settings.fitted(min(len(vectors) for vectors in (real, fake.vectors) if vectors is not None))
        targets = self.gaussians if self.statistics is None else self.statistics.gaussians
        fitted = self._fit(fake)
        scores = {name: targets[name].distance(fitted[name]) for name in fitted if name in targets}
        if real is not None:
            subsets = (settings.kid_subsets, settings.kid_subset_size, settings.seed)
            scores["kid"], scores["kid_std"] = kernel_distance(real, fake.vectors, *subsets)
        if fake.probabilities is not None:
            mean, std = inception_score(fake.probabilities, settings.inception_splits, settings.seed)
            scores |= {"inception_score": mean, "inception_score_std": std}
            if settings.adm:
                scores["adm_inception_score"] = adm_inception_score(fake.probabilities)
        if real is not None:
            scores |= self._neighbours.manifold_scores(fake.vectors)
            if settings.adm:
                scores |= adm_precision_recall(real, fake.vectors, settings.nearest_k)
        return scores

    def _fit(self, features: Features) -> dict[str, Gaussian]:
        """The Gaussians of features, by the name of the Fréchet distance between them."""
        spatial = {} if features.spatial is None else {"sfid": Gaussian.of(features.spatial)}
        return {"fid": Gaussian.of(features.vectors), **spatial}

    def _read_reference(self) -> list["Measured"]:
        batches = self.reference.batches(self.batch_size)
        bar = _progress(batches, self.reference.images, self.batch_size, "reference features")
        return [self._measure(pixels) for pixels in bar]

    def _measure(self, pixels: torch.Tensor) -> "Measured":
        """The features that the scores need, on the CPU."""
        features = self.network(pixels)
        kept = {"probabilities": features.probabilities, "spatial": features.spatial if self.settings.adm else None}
        kept = {name: None if values is None else values.cpu() for name, values in kept.items()}
        embeddings = None if self.cmmd is None else self.cmmd.embed(pixels).cpu()
        return Measured(Features(features.vectors.cpu(), **kept), embeddings)

    @staticmethod
    def _gather(parts: list["Measured"]) -> "Measured | None":
        gathered = gather_batches(parts)
        if gathered is None:
            return None
        features = [part.features for part in gathered]
        names = ("vectors", "probabilities", "spatial")
        joined = {name: _joined([getattr(part, name) for part in features]) for name in names}
        return Measured(Features(**joined), _joined([part.embeddings for part in gathered]))

    def record(self) -> dict[str, Any]:
        """Everything that the scores depend on besides the samples."""
        return {
            "reference": None if self.reference is None else self.reference.record(),
            "reference_statistics": None if self.statistics is None else self.statistics.record(),
            "features": identity(self.network),
            "resizing": self.network.resizing,
            "clip": identity(self.clip),
            "cmmd": identity(self.cmmd),
            "score_settings": self.settings.model_dump(),
        }


@dataclass(frozen=True)
class Measured:
    """What the scores need to know of a batch or a set of images.

    Args:
        features: Features of the feature network.
        embeddings: CLIP embeddings (batch, dim) of length 1; None without CMMD.
    """

    features: Features
    embeddings: torch.Tensor | None


def identity(network: MeasuringNetwork | None) -> dict[str, str] | None:
    """Name and hash of a measuring network."""
    return None if network is None else {"name": shareable_place(network.name), "sha256": network.sha256}


def _progress(batches: Iterable, count: int, batch_size: int, what: str) -> Iterable:
    own = len(own_batches(count, batch_size))
    return tqdm(batches, total=own, unit="batch", desc=what, disable=rank_and_world_size()[0] > 0)


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    return None if parts[0] is None else torch.cat(parts)
