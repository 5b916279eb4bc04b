"""What the tables measure of a trained pipeline, each a number."""

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler
from PIL import Image

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.clip_score import ClipScorer, open_clip_scorer
from improved_ldm.evaluation.features import FeatureNetwork, open_features
from improved_ldm.evaluation.obedience import (
    NUM_REAL_IMAGES,
    RealImages,
    load_real_images,
    reduced,
    sample_images,
    sized,
)
from improved_ldm.evaluation.perceptual import PerceptualDistance, open_perceptual
from improved_ldm.evaluation.scores import RealFeatures, high_frequency_energy
from improved_ldm.resolution import size_text
from improved_ldm.trainer.config import RunConfig
from reproduction.bound import held_out_bound
from reproduction.curves import pipelines_before_the_end
from reproduction.shapes import (
    SHAPES,
    cut_away,
    held_out_loss,
    mean_aspect_error,
    real_shapes,
    sample_shapes,
    share_touching,
)

CLIP = "embedded:clip"  # knows the captions of the embedded images; its text tower is also what the models read


class Scorer:
    """The real images and the networks that all pipelines of a table are measured with.

    Args:
        config: its data set, resolution, judge, text encoder, numbers of samples, guidance and steps.
        device: of the networks.
    """

    def __init__(self, config: RunConfig, device: torch.device):
        if not isinstance(config.transform.resolution, int):
            size = size_text(config.transform.resolution)
            raise ValueError(f"`transform.resolution` is {size}; tables need one number, a square.")
        self.config, self.device = config, device

    @cached_property
    def real(self) -> RealImages:
        """Test images with their captions and classes."""
        data = self.config.data
        rows = open_rows(data.source, "test", caption_column=data.caption_column, label_column="label")
        return load_real_images(rows, self.config.transform.resolution, NUM_REAL_IMAGES)

    @cached_property
    def features(self) -> FeatureNetwork:
        """Of images."""
        return open_features(self.config.evaluation.judge, self.device)

    @cached_property
    def distance(self) -> PerceptualDistance:
        """Of pairs of images."""
        return open_perceptual(self.config.evaluation.judge, self.device)

    @cached_property
    def clip(self) -> ClipScorer:
        """Of images and captions."""
        return open_clip_scorer(CLIP, self.device)

    @property
    def sampling(self) -> dict[str, Any]:
        """Guidance and steps of the samples."""
        return self.config.sampling.model_dump(include={"guidance_scale", "num_inference_steps"})

    def settings(self, measures: Set[str]) -> dict[str, Any]:
        """What the measures depend on, beside the pipeline."""
        numbers = self.config.evaluation
        if numbers.judge is None:  # the table compares no features
            if not measures & SHAPE_MEASURES:
                return {"reference": f"test images of {self.config.data.source}", **self.sampling}
            return {
                "reference": f"training images of {self.config.data.source}",
                "samples": len(SHAPES) * numbers.num_detail_samples,
                "shapes": SHAPES,
                "prompts": "captions of training images, evenly spread over the aspect ratios",
                "real": real_shapes(self.config),
                **self.sampling,
            }
        return {
            "features": {"name": self.features.name, "sha256": self.features.sha256},
            "clip": {"name": self.clip.name, "sha256": self.clip.sha256},
            "reference": f"first {NUM_REAL_IMAGES} test images of {self.config.data.source}, whole",
            "samples": numbers.num_coverage_samples,
            "samples_of_distances": numbers.num_detail_samples,
            "prompts": "captions, or classes, of test images, the classes in turn",
            "seeds": "of image i: the run's seed · samples + i",
            **self.sampling,
        }

    @cached_property
    def real_features(self) -> RealFeatures:
        """What samples are compared with."""
        return RealFeatures(self.features(self.real.pixels).vectors)

    def samples(self, pipeline: ImprovedLDMPipeline, call: dict[str, Any], seed: int) -> "TableSamples":
        """What a pipeline that was trained from a seed draws under further arguments of it."""
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in call.items()}
        return TableSamples(
            self, pipeline, {**self.sampling, **values}, seed * self.config.evaluation.num_coverage_samples
        )


@dataclass(frozen=True)
class TableSamples:
    """Samples of a pipeline under a call, drawn when a measure asks for them."""

    scorer: Scorer
    pipeline: ImprovedLDMPipeline
    call: dict[str, Any]
    first_seed: int

    @cached_property
    def _semantics(self) -> tuple[list[str], torch.Tensor]:
        return self.scorer.real.prompts(self.scorer.config.evaluation.num_coverage_samples)

    @cached_property
    def _pixels(self) -> torch.Tensor:
        return sample_images(self.pipeline, *self._semantics, self.first_seed, **self.call)

    @cached_property
    def _at_half_size(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first samples, and the same prompts and seeds with half the original size."""
        prompts, labels = self._semantics
        part = slice(self.scorer.config.evaluation.num_detail_samples)
        call = {**self.call, **sized(self.pipeline.default_original_side / 2)}
        return self._pixels[part], sample_images(self.pipeline, prompts[part], labels[part], self.first_seed, **call)

    @cached_property
    def _features(self):
        return self.scorer.features(self._pixels)

    def fid(self) -> float:
        """Fréchet distance to real images."""
        return self.scorer.real_features.fid(self._features.vectors)

    def curve(self) -> list[float]:
        """Fréchet distances to real images from the switch of resolution to the end."""
        before = pipelines_before_the_end(Path(self.pipeline.name_or_path), self.pipeline.device)
        return [*(replace(self, pipeline=pipeline).fid() for pipeline in before), self.fid()]

    def bound(self) -> float | None:
        """Variational bound of real images, in bits per dimension of their latents; only ancestral steps have one."""
        if not isinstance(self.pipeline.scheduler, DDPMScheduler):
            return None
        part = slice(self.scorer.config.evaluation.num_detail_samples)
        pixels, labels = self.scorer.real.pixels[part], self.scorer.real.labels[part]
        return held_out_bound(self.pipeline, pixels, labels, self.call["num_inference_steps"])

    def coverage(self) -> float:
        """Share of the real images that have a sample near."""
        return self.scorer.real_features.manifold_scores(self._features.vectors)["coverage"]

    def class_accuracy(self) -> float:
        """Share of the samples whose class the judge finds."""
        found = self._features.probabilities.argmax(1).cpu()
        return (found == self._semantics[1]).float().mean().item()

    def clip_score(self) -> float:
        """Mean CLIP score of samples and prompts."""
        return self.scorer.clip(self._pixels, self._semantics[0]).mean().item()

    def size_distance(self) -> float:
        """Mean perceptual distance of samples that differ in the original size asked for."""
        return self.scorer.distance(*self._at_half_size).mean().item()

    def content_distance(self) -> float:
        """Mean perceptual distance of samples at half the size to the full ones reduced to it: what else changes."""
        full, half = self._at_half_size
        side = round(self.pipeline.default_original_side / 2)
        return self.scorer.distance(reduced(full, side).clamp(-1, 1), half).mean().item()

    def class_kept(self) -> float:
        """Share of the samples whose class stays when half the original size is asked for."""
        full, half = (self.scorer.features(pixels).probabilities.argmax(1) for pixels in self._at_half_size)
        return (full == half).float().mean().item()

    def cut_away(self) -> float:
        """Share of the training images that is cut away."""
        return cut_away(Path(self.pipeline.name_or_path))

    def square_loss(self) -> float:
        """Loss of test images as centred squares."""
        return held_out_loss(self.pipeline, self.scorer.config, whole=False)

    def whole_loss(self) -> float:
        """Loss of nearly whole test images."""
        return held_out_loss(self.pipeline, self.scorer.config, whole=True)

    @cached_property
    def _shapes(self) -> list[Image.Image]:
        return sample_shapes(self.pipeline, self.scorer.config, self.first_seed, **self.call)

    def aspect_error(self) -> float:
        """How far drawings are from the aspect ratio of their canvas, in octaves."""
        return mean_aspect_error(self._shapes)

    def touches_border(self) -> float:
        """Share of the samples whose drawing reaches a border."""
        return share_touching(self._shapes)

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
        of: the number of samples, or several along the run; None if there is none.
        reads: the field of the control that the model must read.
        is_curve: whether it is several numbers.
    """

    title: str
    lower_is_better: bool
    of: Callable[[TableSamples], float | list[float] | None]
    reads: str | None = None
    is_curve: bool = False


SHAPE_MEASURES = {"aspect_error", "touches_border"}
(SIDE,) = sized(1)  # the control input that sizes are asked for with

MEASURES = {
    "fid": Measure("FID", True, TableSamples.fid),
    "curve": Measure("FID after the switch", True, TableSamples.curve, is_curve=True),
    "bound": Measure("bound of test images, bits per dimension", True, TableSamples.bound),
    "coverage": Measure("coverage", False, TableSamples.coverage),
    "clip_score": Measure("CLIP score", False, TableSamples.clip_score),
    "class_accuracy": Measure("class found", False, TableSamples.class_accuracy),
    "size_distance": Measure("distance at half size", True, TableSamples.size_distance, SIDE),
    "content_distance": Measure("content moved at half size", True, TableSamples.content_distance, SIDE),
    "class_kept": Measure("class kept at half size", False, TableSamples.class_kept, SIDE),
    "cut_away": Measure("share cut away in training", True, TableSamples.cut_away),
    "square_loss": Measure("loss of square test crops", True, TableSamples.square_loss),
    "whole_loss": Measure("loss of whole test images", True, TableSamples.whole_loss),
    "aspect_error": Measure("aspect error of other shapes, octaves", True, TableSamples.aspect_error),
    "touches_border": Measure("other shapes that touch a border", True, TableSamples.touches_border),
    "detail": Measure("detail left at half size", True, TableSamples.detail, SIDE),
}
