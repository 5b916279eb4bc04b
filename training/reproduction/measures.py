"""What the tables measure of a trained pipeline, each a number."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.clip_score import open_clip_scorer
from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.obedience import NUM_REAL_IMAGES, draw, load_real_images, reduced
from improved_ldm.evaluation.perceptual import open_perceptual
from improved_ldm.evaluation.scores import frechet_distance, high_frequency_energy, manifold_scores
from improved_ldm.trainer.config import RunConfig

CLIP = "embedded:clip"  # knows the captions of the embedded images; its text tower is also what the models read


class Evaluator:
    """The real images and the networks that all pipelines of a table are measured with.

    Args:
        config: its data set, resolution, judge, text encoder, numbers of samples, guidance and steps.
        device: of the networks.
    """

    def __init__(self, config: RunConfig, device: torch.device):
        rows = open_rows(config.data.source, "test", caption_column=config.data.caption_column, label_column="label")
        self.real = load_real_images(rows, config.transform.resolution, NUM_REAL_IMAGES)
        self.features = open_features(config.evaluation.judge, device)
        self.distance = open_perceptual(config.evaluation.judge, device)
        self.clip = open_clip_scorer(CLIP, device)
        self.config, self.device = config, device

    @property
    def settings(self) -> dict[str, Any]:
        """What the measures depend on, beside the pipeline."""
        sampling, numbers = self.config.sampling, self.config.evaluation
        return {
            "features": {"name": self.features.name, "sha256": self.features.sha256},
            "clip": {"name": self.clip.name, "sha256": self.clip.sha256},
            "reference": f"first {NUM_REAL_IMAGES} test images of {self.config.data.source}, whole",
            "samples": numbers.num_coverage_samples,
            "samples_of_distances": numbers.num_detail_samples,
            "prompts": "captions, or classes, of test images, the classes in turn",
            "seeds": "of image i: the run's seed · samples + i",
            "guidance_scale": sampling.guidance_scale,
            "num_inference_steps": sampling.num_inference_steps,
        }

    @cached_property
    def real_features(self) -> torch.Tensor:
        """(real, dim)."""
        return self.features(self.real.pixels).vectors

    def samples(self, pipeline: ImprovedLDMPipeline, call: dict[str, Any], seed: int) -> "Samples":
        """What a pipeline that was trained from a seed draws under further arguments of it."""
        sampling = self.config.sampling.model_dump(include={"guidance_scale", "num_inference_steps"})
        size = {"original_size": tuple(call["original_size"])} if "original_size" in call else {}
        return Samples(
            self, pipeline, {**sampling, **call, **size}, seed * self.config.evaluation.num_coverage_samples
        )


@dataclass(frozen=True)
class Samples:
    """Samples of a pipeline under a call, drawn when a measure asks for them."""

    evaluator: Evaluator
    pipeline: ImprovedLDMPipeline
    call: dict[str, Any]
    first_seed: int

    @cached_property
    def _semantics(self) -> tuple[list[str], torch.Tensor]:
        return self.evaluator.real.prompts(self.evaluator.config.evaluation.num_coverage_samples)

    @cached_property
    def _pixels(self) -> torch.Tensor:
        return draw(self.pipeline, *self._semantics, self.first_seed, **self.call)

    @cached_property
    def _at_half_size(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first samples, and the same prompts and seeds with half the original size."""
        prompts, labels = self._semantics
        part = slice(self.evaluator.config.evaluation.num_detail_samples)
        side = self.pipeline.config.default_original_size / 2
        call = {**self.call, "original_size": (side, side)}
        return self._pixels[part], draw(self.pipeline, prompts[part], labels[part], self.first_seed, **call)

    @cached_property
    def _features(self):
        return self.evaluator.features(self._pixels)

    def fid(self) -> float:
        """Fréchet distance to real images."""
        return frechet_distance(self.evaluator.real_features, self._features.vectors)

    def coverage(self) -> float:
        """Share of the real images that have a sample near."""
        return manifold_scores(self.evaluator.real_features, self._features.vectors)["coverage"]

    def class_accuracy(self) -> float:
        """Share of the samples whose class the judge finds."""
        found = self._features.probabilities.argmax(1).cpu()
        return (found == self._semantics[1]).float().mean().item()

    def clip_score(self) -> float:
        """Mean CLIP score of samples and prompts."""
        return self.evaluator.clip(self._pixels, self._semantics[0]).mean().item()

    def size_distance(self) -> float:
        """Mean perceptual distance of samples that differ in the original size asked for."""
        return self.evaluator.distance(*self._at_half_size).mean().item()

    def content_distance(self) -> float:
        """Mean perceptual distance of samples at half the size to the full ones reduced to it: what else changes."""
        full, half = self._at_half_size
        side = round(self.pipeline.config.default_original_size / 2)
        return self.evaluator.distance(reduced(full, side).clamp(-1, 1), half).mean().item()

    def class_kept(self) -> float:
        """Share of the samples whose class stays when half the original size is asked for."""
        full, half = (self.evaluator.features(pixels).probabilities.argmax(1) for pixels in self._at_half_size)
        return (full == half).float().mean().item()

    def detail(self) -> float:
        """High-frequency energy at half the original size, over that at the full one; low is what was asked for."""
        full, half = (high_frequency_energy(pixels).mean().item() for pixels in self._at_half_size)
        return half / full


@dataclass(frozen=True)
class Measure:
    """A column of a table.

    Args:
        title: what the reader sees.
        lower_is_better: whether small values are good.
        of: the number of samples.
        reads: the field of the control that the model must read.
    """

    title: str
    lower_is_better: bool
    of: Callable[[Samples], float]
    reads: str | None = None


MEASURES = {
    "fid": Measure("FID", True, Samples.fid),
    "coverage": Measure("coverage", False, Samples.coverage),
    "clip_score": Measure("CLIP score", False, Samples.clip_score),
    "class_accuracy": Measure("class found", False, Samples.class_accuracy),
    "size_distance": Measure("distance at half size", True, Samples.size_distance, "original_size"),
    "content_distance": Measure("content moved at half size", True, Samples.content_distance, "original_size"),
    "class_kept": Measure("class kept at half size", False, Samples.class_kept, "original_size"),
    "detail": Measure("detail left at half size", True, Samples.detail, "original_size"),
}
