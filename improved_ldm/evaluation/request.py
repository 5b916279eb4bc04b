"""The configuration of an evaluation, and everything that follows from it before images are sampled."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field

from improved_ldm.bounds import BatchSize, Count, LocalPath, Number, Place, SamplerSteps, Seed, Sides, Text, Threads
from improved_ldm.evaluation.comparability import ADM_KEYS, ADM_SCORES
from improved_ldm.evaluation.evaluate import ScoreSettings
from improved_ldm.evaluation.features import Resizing
from improved_ldm.evaluation.obedience_config import ObedienceConfig
from improved_ldm.evaluation.reference import Reference
from improved_ldm.evaluation.sampling import Request, Samples, SamplingSettings, check_settings, make_requests
from improved_ldm.evaluation.sweep import parse_sweep
from improved_ldm.naming import loading
from improved_ldm.open_pipeline import open_pipeline
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.settings import Section


class ScoringConfig(Section):
    """How a pipeline is sampled and scored, for every script that does so."""

    reference_statistics: LocalPath | None = None
    """`.npz` with `mu` and `sigma` for FID, such as a reference of the ADM suite; images in it replace `data`."""
    output_dir: LocalPath | None = None
    """Output folder; default: a folder in runs/evaluation/ whose name depends on the settings."""
    num_samples: Annotated[Count, Field(ge=2)] = 10_000
    """Number of images to sample; papers use 50,000 or 10,000, and fewer images raise FID."""
    batch_size: BatchSize = 50
    """Images per call of the pipeline and of the networks."""
    seed: Seed = 0
    """Random seed; image i has the seed `seed` + i."""
    num_inference_steps: SamplerSteps | None = None
    """Sampler steps per image; default: that of the pipeline."""
    guidance_scale: Number | None = None
    """λ; default: that of the pipeline."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the pipeline."""
    features: Place = "inception"
    """Feature network of the distances: `inception`, `inception:FILE`, `embedded:judge`, …"""
    resizing: Resizing = "network"
    """Resizing for Inception: TensorFlow's in the `network`, or `clean`, Pillow's bicubic as in clean-fid."""
    cmmd: Place | None = None
    """CLIP model of CMMD, the distance of image embeddings; by default, it is not computed."""
    scores: ScoreSettings = ScoreSettings()
    cpu_threads: Threads | None = None
    """Threads per process without a GPU; by default, the processes share the cores."""


class EvaluateConfig(ScoringConfig):
    """Configuration of an evaluation."""

    pipeline: Place | None = None
    """Folder or Hub id of a pipeline."""
    samples: LocalPath | None = None
    """Folder of images to score instead of a pipeline."""
    like: Literal["adm"] | None = None
    """Settings of a published evaluation for all keys that are not given: `adm`, the suite of ADM and DiT."""
    data: Place | None = None
    """Reference set: an embedded set, a Hub id, a file or a folder; needed without `reference_statistics`."""
    write_statistics: LocalPath | None = None
    """`.npz` to write with the statistics of the reference images, which `reference_statistics` reads."""
    resolution: Sides | None = None
    """Side length of the reference images in pixels, or [height, width], to write statistics of them alone."""
    split: Text = "test"
    """Split of the reference set."""
    name: Text | None = None
    """Configuration name, for a Hub dataset with several configurations."""
    image_column: Text = "image"
    """Column of the images."""
    caption_column: Text = "text"
    """Column of the captions, for a text pipeline."""
    label_column: Text = "label"
    """Column of the labels, if `labels` is `drawn`."""
    num_reference_images: Annotated[Count, Field(ge=2)] = 50_000
    """Maximum number of reference images, taken in the order of the set."""
    reference_hash: Text | None = None
    """Required hash of the reference set; any other set is an error."""
    labels: Literal["balanced", "drawn", "uniform"] = "balanced"
    """Classes in turn, or drawn with the frequencies of the reference set or equal ones; captions are in turn."""
    control: dict[str, bool | tuple[Number, Number]] = Field({})
    """Control arguments of the pipeline for every scored image; the obedience test sets its own."""
    control_guidance_scale: Number = 1.0
    """β, the guidance scale of the control."""
    sweep: Text | None = None
    """Ranges of the guidance scales; a sweep is not judged and does not change the model card."""
    clip: Place | None = None
    """CLIP model of the CLIP score; by default, the score is not computed."""
    obedience: ObedienceConfig = ObedienceConfig()
    perceptual: Place = "embedded:judge"
    """Network of the distance between images that differ in their control; used only with the judge."""
    update_card: bool = True
    """Write the numbers to the model card of a local trained folder."""

    @property
    def only_writes_statistics(self) -> bool:
        """Whether there is nothing to score, only the statistics of `data` to write."""
        alone = self.pipeline is None and self.samples is None
        return alone and None not in (self.write_statistics, self.resolution)

    @property
    def folder(self) -> Path:
        """The output folder."""
        name = Path(self.pipeline or self.samples).resolve().name
        return self.output_dir or Path("runs/evaluation") / f"{name}-{self._hash()}"

    def _hash(self) -> str:
        """Eight hexadecimal digits that identify all settings that the scores depend on, and the absolute paths."""
        values = self.model_dump(mode="json", exclude=KEYS_WITHOUT_EFFECT_ON_SCORES)
        for key in ("pipeline", "samples", "data", "reference_statistics"):
            if values[key] and Path(values[key]).exists():
                values[key] = Path(values[key]).resolve().as_posix()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


KEYS_WITHOUT_EFFECT_ON_SCORES = {
    "like",
    "output_dir",
    "reference_hash",
    "write_statistics",
    "update_card",
    "cpu_threads",
}
KEYS_UNUSED_IN_SWEEP = {"obedience", "perceptual", "update_card"}
# Keys that select or read the images of `data`.
IMAGE_KEYS = {"split", "name", "image_column", "caption_column", "label_column", "num_reference_images"}
# Keys that statistics of `data` depend on.
STATISTICS_KEYS = {
    *("data", "split", "name", "image_column", "num_reference_images", "reference_hash"),
    *("write_statistics", "resolution", "features", "resizing", "batch_size", "cpu_threads"),
}
# Keys that control sampling, and that existing images do not depend on.
SAMPLING_KEYS = {
    "num_samples",
    "seed",
    "labels",
    "control",
    "num_inference_steps",
    "guidance_scale",
    "control_guidance_scale",
    "dtype",
    "sweep",
    "caption_column",
    "label_column",
    *KEYS_UNUSED_IN_SWEEP,
}


def complete(config: EvaluateConfig) -> EvaluateConfig:
    """The configuration with the settings of `like` for all keys that are not given.

    Settings of the sampling are not used for existing `samples`.
    """
    if config.like is None:
        return config
    given = config.model_fields_set | (SAMPLING_KEYS if config.samples else set())
    scores = {key: value for key, value in ADM_SCORES.items() if key not in config.scores.model_fields_set}
    values = {key: value for key, value in ADM_KEYS.items() if key not in given}
    return config.model_copy(update=values | {"scores": config.scores.model_copy(update=scores)})


def check_keys(config: EvaluateConfig):
    """Raise a ValueError for keys that contradict each other or would be ignored."""
    _check_references(config)
    if config.only_writes_statistics:
        ignored = config.model_fields_set - STATISTICS_KEYS
        if ignored:
            raise ValueError(f"`{min(ignored)}` is given, but statistics of `data` alone do not depend on it.")
        return
    if config.resolution is not None:
        raise ValueError("`resolution` is given, but the pipeline or the samples decide it.")
    if (config.pipeline is None) == (config.samples is None):
        given = "neither" if config.pipeline is None else "both"
        raise ValueError(
            f"give either `pipeline`, to sample from, or `samples`, a folder of images; {given} was given. To write "
            "statistics alone, give `write_statistics` and `resolution`."
        )
    ignored = config.model_fields_set & SAMPLING_KEYS if config.samples else set()
    if ignored:
        raise ValueError(
            f"`{min(ignored)}` is given, but the images of `samples` exist already; it needs a `pipeline`."
        )
    if config.sweep:
        twice = parse_sweep(config.sweep)[0].keys() & config.model_fields_set
        if twice:
            raise ValueError(f"`{min(twice)}` is given, but `sweep` varies it.")
        ignored = config.model_fields_set & KEYS_UNUSED_IN_SWEEP
        if ignored:
            raise ValueError(f"`{min(ignored)}` is given, but a `sweep` is neither judged nor shown on a model card.")


def _check_references(config: EvaluateConfig):
    """Raise a ValueError for missing reference images or for keys that only images have a use for."""
    if config.data is None:
        if config.reference_statistics is None:
            raise ValueError("give `data`, the reference images, or `reference_statistics`; neither was given.")
        unused = config.model_fields_set & (IMAGE_KEYS | {"write_statistics"})
        if unused:
            raise ValueError(f"`{min(unused)}` is given, but there is no `data` that it would apply to.")
    if config.write_statistics is not None and config.write_statistics.suffix != ".npz":
        raise ValueError(f"`write_statistics` is {config.write_statistics}; its name must end in .npz.")


def load_pipeline(config: EvaluateConfig) -> ImprovedLDMPipeline:
    """Load the pipeline of a folder or a Hub id. The requested steps and guidance become its defaults.

    Raises:
        ValueError: If it is not a pipeline of this family.
    """
    with loading("pipeline", config.pipeline):
        pipeline = open_pipeline(config.pipeline, dtype=getattr(torch, config.dtype))
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    pipeline.register_to_config(**{f"default_{name}": value for name, value in asked.items() if value is not None})
    return pipeline


def sampling_settings(
    pipeline: ImprovedLDMPipeline, config: EvaluateConfig, point: dict[str, float]
) -> SamplingSettings:
    """Settings of the pipeline's call at a point of a sweep.

    Raises:
        ValueError: If the model does not read the control or the guidance.
    """
    values = {
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "guidance_scale": pipeline.config.default_guidance_scale,
        "control_guidance_scale": config.control_guidance_scale,
    }
    settings = SamplingSettings(**values | point)
    check_settings(pipeline, settings, config.control)
    return settings


def check_semantics(config: EvaluateConfig, pipeline: ImprovedLDMPipeline | None, samples: Samples | None):
    """Raise a ValueError for caption or label settings that are not used, or for a CLIP score without prompts."""
    if pipeline is not None:
        takes_text = pipeline.takes_text
        if takes_text and config.labels != "balanced":
            raise ValueError(
                f"`labels` is {config.labels!r}; a text pipeline uses captions, so it must be 'balanced'."
            )
        if not takes_text and "caption_column" in config.model_fields_set:
            raise ValueError("`caption_column` is given, but the pipeline is class-conditional and reads no captions.")
        if config.labels != "drawn" and "label_column" in config.model_fields_set:
            raise ValueError("`label_column` is given, but labels are read only if `labels` is 'drawn'.")
        if config.data is None and (takes_text or config.labels == "drawn"):
            what = "captions" if takes_text else "labels"
            raise ValueError(f"`data` is not given; the {what} of the samples are taken from it.")
    if config.clip is None:
        return
    if pipeline is not None and not pipeline.takes_text:
        raise ValueError(f"`clip` is {config.clip}; it needs prompts, but the pipeline is class-conditional.")
    if samples is not None and samples.prompts is None:
        raise ValueError(
            f"`clip` is {config.clip}; it needs a `text` for each image in {config.samples}/metadata.jsonl."
        )


def make_all_requests(config: EvaluateConfig, pipeline: ImprovedLDMPipeline, reference: Reference) -> list[Request]:
    """Make all requests: captions in turn, classes in turn, or random classes.

    Random classes have the frequencies of the reference set (`drawn`) or equal frequencies (`uniform`).

    Raises:
        ValueError: If all captions of the reference set are empty, or the model does not know one of its labels.
    """
    order = "in_turn"
    if pipeline.takes_text:
        choices = reference.captions
        if not any(choices):
            raise ValueError(
                f"`caption_column` is {config.caption_column!r}; all captions of {config.data} are empty."
            )
    elif config.labels != "drawn":
        choices = range(pipeline.denoiser.config.num_classes)
        order = "in_turn" if config.labels == "balanced" else "drawn"
    else:
        choices, order = reference.labels, "drawn"
        num_classes = pipeline.denoiser.config.num_classes
        if max(choices) >= num_classes:
            raise ValueError(
                f"`labels` is 'drawn'; {config.data} has label {max(choices)}; the model has {num_classes} classes."
            )
    return make_requests(choices, config.num_samples, config.seed, config.control, order)
