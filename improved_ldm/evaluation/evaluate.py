"""Samples and real images to numbers: images in fixed batches through the networks, features to scores once."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from tqdm import tqdm

from improved_ldm.evaluation.clip_score import ClipScorer
from improved_ldm.evaluation.features import FeatureNetwork, Features
from improved_ldm.evaluation.networks import MeasuringNetwork
from improved_ldm.evaluation.processes import gather_batches, own_batches, rank_and_world_size
from improved_ldm.evaluation.reference import Reference
from improved_ldm.evaluation.sampling import Samples
from improved_ldm.evaluation.scores import (
    frechet_distance,
    inception_score,
    kernel_distance,
    manifold_scores,
    nearest_radii,
)


class ScoreSettings(BaseModel):
    """What the scores depend on beside the images.

    Args:
        kid_subsets: subsets that the kernel distance is averaged over.
        kid_subset_size: images of a subset.
        inception_splits: parts that the inception score is averaged over.
        nearest_k: neighbours that set the radii of precision, recall, density and coverage.
        seed: of the subsets and splits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kid_subsets: int = Field(100, ge=1)
    kid_subset_size: int = Field(1000, ge=2)
    inception_splits: int = Field(10, ge=1)
    nearest_k: int = Field(5, ge=1)
    seed: int = 0

    def check_reference(self, images: int):
        """Raise a ValueError where there are too few reference images for the scores."""
        self._check("reference images", images, kid_subset_size=self.kid_subset_size, nearest_k=self.nearest_k + 1)

    def check_samples(self, images: int, network: FeatureNetwork):
        """Raise a ValueError where there are too few samples for the scores that a network gives."""
        splits = {"inception_splits": self.inception_splits} if network.is_classifier else {}
        self._check("samples", images, kid_subset_size=self.kid_subset_size, nearest_k=self.nearest_k + 1, **splits)

    def _check(self, what: str, images: int, **least: int):
        for name, count in least.items():
            if images < count:
                raise ValueError(f"there are {images} {what}; `{name}` {getattr(self, name)} needs at least {count}.")


class Evaluation:
    """Scores sets of samples against one reference set.

    Images pass in fixed batches, shared among the processes of `torch.distributed`; beside their features no more than
    a batch is in memory. The scores are computed once, on the main process.

    Args:
        reference: the real images; their features are made here, once.
        network: makes the features.
        clip: scores samples against their prompts, or None.
        settings: of the scores.
        batch_size: images a batch.
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
        self.real = _gather_features([_on_cpu(network(pixels)) for pixels in batches])

    def scores(self, samples: Samples) -> dict[str, float] | None:
        """All scores of a set of samples by name, on the main process; None on the others.

        Args:
            samples: the images; a CLIP scorer needs their prompts.

        Returns:
            fid, kid and its deviation over subsets, precision, recall, density, coverage; inception_score and its
            deviation over splits where the network tells probabilities; clip_score where there is a scorer.
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
        """The scores that come from features alone."""
        real, settings = self.real.vectors, self.settings
        kid, kid_std = kernel_distance(
            real, fake.vectors, settings.kid_subsets, settings.kid_subset_size, settings.seed
        )
        scores = {"fid": frechet_distance(real, fake.vectors), "kid": kid, "kid_std": kid_std}
        if fake.probabilities is not None:
            mean, std = inception_score(fake.probabilities, settings.inception_splits, settings.seed)
            scores |= {"inception_score": mean, "inception_score_std": std}
        return scores | manifold_scores(real, fake.vectors, settings.nearest_k, self._real_radii)

    @cached_property
    def _real_radii(self) -> torch.Tensor:
        return nearest_radii(self.real.vectors, self.settings.nearest_k)

    def record(self) -> dict[str, Any]:
        """What the scores depend on beside the samples."""
        return {
            "reference": self.reference.record(),
            "features": identity(self.network),
            "clip": identity(self.clip),
            "score_settings": self.settings.model_dump(),
        }


def identity(network: MeasuringNetwork | None) -> dict[str, str] | None:
    """Name and hash of a network that measures."""
    return None if network is None else {"name": network.name, "sha256": network.sha256}


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
