"""Compute scores of samples against real images: features in fixed batches, then all scores at once."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm import tqdm

from improved_ldm.bounds import Count, Parts, Seed
from improved_ldm.evaluation.clip_score import ClipScorer
from improved_ldm.evaluation.features import FeatureNetwork, Features
from improved_ldm.evaluation.networks import MeasuringNetwork
from improved_ldm.evaluation.processes import gather_batches, own_batches, rank_and_world_size
from improved_ldm.evaluation.reference import Reference
from improved_ldm.evaluation.sampling import Samples
from improved_ldm.evaluation.scores import RealFeatures, inception_score, kernel_distance
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
        reference: Real images. Their features are computed once, here.
        network: Feature network.
        clip: Scorer of samples against their prompts, or None.
        settings: Settings of the scores.
        batch_size: Images per batch.
    """

    def __init__(
        self,
        reference: Reference,
        network: FeatureNetwork,
        clip: ClipScorer | None,
        settings: ScoreSettings,
        batch_size: int,
    ):
        self.reference, self.network, self.clip = reference, network, clip
        self.settings, self.batch_size = settings, batch_size
        batches = _progress(reference.batches(batch_size), reference.images, batch_size, "reference features")
        real = _gather_features([_on_cpu(network(pixels)) for pixels in batches])
        self._real = None if real is None else RealFeatures(real.vectors, settings.nearest_k)

    def scores(self, samples: Samples) -> dict[str, float] | None:
        """All scores of a set of samples by name.

        Args:
            samples: Images to score. A CLIP scorer needs their prompts.

        Returns:
            On the main process: fid, kid and its standard deviation over subsets, precision, recall, density and
            coverage; inception_score and its standard deviation over splits if the network is a classifier;
            clip_score if there is a scorer. None on the other processes.
        """
        count, features, clip_scores = len(samples.files), [], []
        for numbers in _progress(own_batches(count, self.batch_size), count, self.batch_size, "scoring"):
            pixels = samples.pixels(numbers)
            features.append(_on_cpu(self.network(pixels)))
            if self.clip is not None:
                clip_scores.append(self.clip(pixels, samples.prompts[numbers.start : numbers.stop]).cpu())
        fake, clip_scores = _gather_features(features), gather_batches(clip_scores)
        if fake is None:
            return None
        scores = self._compare(fake)
        return scores | {"clip_score": torch.cat(clip_scores).mean().item()} if clip_scores else scores

    def _compare(self, fake: Features) -> dict[str, float]:
        """The scores that are computed from features alone."""
        real = self._real.vectors
        settings = self.settings.fitted(min(len(real), len(fake.vectors)))
        kid, kid_std = kernel_distance(
            real, fake.vectors, settings.kid_subsets, settings.kid_subset_size, settings.seed
        )
        scores = {"fid": self._real.fid(fake.vectors), "kid": kid, "kid_std": kid_std}
        if fake.probabilities is not None:
            mean, std = inception_score(fake.probabilities, settings.inception_splits, settings.seed)
            scores |= {"inception_score": mean, "inception_score_std": std}
        return scores | self._real.manifold_scores(fake.vectors)

    def record(self) -> dict[str, Any]:
        """Everything that the scores depend on besides the samples."""
        return {
            "reference": self.reference.record(),
            "features": identity(self.network),
            "clip": identity(self.clip),
            "score_settings": self.settings.model_dump(),
        }


def identity(network: MeasuringNetwork | None) -> dict[str, str] | None:
    """Name and hash of a measuring network."""
    return None if network is None else {"name": shareable_place(network.name), "sha256": network.sha256}


def _progress(batches: Iterable, count: int, batch_size: int, what: str) -> Iterable:
    own = len(own_batches(count, batch_size))
    return tqdm(batches, total=own, unit="batch", desc=what, disable=rank_and_world_size()[0] > 0)


def _on_cpu(features: Features) -> Features:
    probabilities = None if features.probabilities is None else features.probabilities.cpu()
    return Features(features.vectors.cpu(), probabilities)


def _gather_features(parts: list[Features]) -> Features | None:
    gathered = gather_batches(parts)
    if gathered is None:
        return None
    has_probabilities = gathered[0].probabilities is not None
    return Features(
        torch.cat([part.vectors for part in gathered]),
        torch.cat([part.probabilities for part in gathered]) if has_probabilities else None,
    )
