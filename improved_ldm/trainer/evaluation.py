"""An evaluation as its user asks for it: the configuration, and what follows from it before anything is drawn."""

import json
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from pydantic import Field

from improved_ldm.evaluation.evaluate import ScoreSettings
from improved_ldm.evaluation.reference import Reference, check_reference, open_reference
from improved_ldm.evaluation.sampling import Request, Samples, SamplingSettings, check_call, make_requests
from improved_ldm.evaluation.sweep import parse_sweep
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.config import EvaluationConfig, Section


class EvaluateConfig(Section):
    """What is evaluated, against what, and how.

    Args:
        pipeline: folder or Hub id of a pipeline.
        samples: a folder of images to score in place of a pipeline's.
        data: the reference set, anything that `open_rows` takes; `split`, `name` and the columns are its arguments.
        output_dir: where everything goes; by default `runs/evaluation/` and the name of the pipeline or folder.
        num_reference_images: taken at most, in the set's order.
        reference_hash: refuse another reference set than the one with this hash.
        num_samples: images that are drawn.
        batch_size: images a call of the pipeline and of the networks.
        seed: image i is drawn from `seed` + i.
        labels: classes `balanced`, in turn, or `drawn` as often as they are in the reference set. Captions of the
            reference set are taken in turn.
        control: control arguments of the pipeline, for every image that is scored; obedience sets its own.
        num_inference_steps, guidance_scale: the pipeline's own by default.
        dtype: of the pipeline.
        sweep: ranges of the guidance scales; it is not judged and changes no card.
        features: network of the distances: `inception`, `inception:FILE`, `embedded:judge`, … see `open_features`.
        clip: network of the CLIP score, see `open_clip_scorer`; None measures none.
        scores: subsets, splits and neighbours.
        obedience: how obedience to class and control is judged, where the judge knows the data.
        perceptual: distance of images that differ in their control, see `open_perceptual`; used where the judge is.
        update_card: show the numbers on the card of a local trained folder.
        cpu_threads: threads a process computes with where there is no GPU; None shares the cores among the processes.
    """

    pipeline: str | None = None
    samples: Path | None = None
    data: str
    split: str = "test"
    name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    label_column: str = "label"
    output_dir: Path | None = None
    num_reference_images: int = Field(50_000, ge=2)
    reference_hash: str | None = None
    num_samples: int = Field(10_000, ge=2)
    batch_size: int = Field(50, ge=1)
    seed: int = 0
    labels: Literal["balanced", "drawn"] = "balanced"
    control: dict[str, bool | tuple[float, float]] = Field({})
    num_inference_steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = None
    control_guidance_scale: float = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    sweep: str | None = None
    features: str = "inception"
    clip: str | None = None
    scores: ScoreSettings = ScoreSettings()
    obedience: EvaluationConfig = EvaluationConfig()
    perceptual: str = "embedded:judge"
    update_card: bool = True
    cpu_threads: int | None = Field(None, ge=1)

    @property
    def folder(self) -> Path:
        """Where everything goes."""
        return self.output_dir or Path("runs/evaluation") / Path(self.pipeline or self.samples).resolve().name


NOT_IN_A_SWEEP = {"obedience", "perceptual", "update_card"}
# Keys that say how samples are drawn, and nothing of images that are there.
OF_A_PIPELINE = {
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
    *NOT_IN_A_SWEEP,
}


def check_keys(config: EvaluateConfig):
    """Raise a ValueError for keys that contradict each other or would be ignored."""
    if (config.pipeline is None) == (config.samples is None):
        given = "neither" if config.pipeline is None else "both"
        raise ValueError(f"give `pipeline`, to draw from it, or `samples`, a folder of images; {given} was given.")
    ignored = config.model_fields_set & OF_A_PIPELINE if config.samples else set()
    if ignored:
        raise ValueError(f"`{min(ignored)}` is given, but the images of `samples` are there; it needs a `pipeline`.")
    if config.sweep:
        twice = parse_sweep(config.sweep)[0].keys() & config.model_fields_set
        if twice:
            raise ValueError(f"`{min(twice)}` is given, but `sweep` varies it.")
        ignored = config.model_fields_set & NOT_IN_A_SWEEP
        if ignored:
            raise ValueError(f"`{min(ignored)}` is given, but a `sweep` is neither judged nor shown on a card.")


def load_pipeline(config: EvaluateConfig) -> ImprovedLDMPipeline:
    """The pipeline of a folder or a Hub id; the asked steps and guidance become its own.

    Raises:
        ValueError: for what is no pipeline of this family.
    """
    if Path(config.pipeline).is_dir() and not (Path(config.pipeline) / "model_index.json").exists():
        raise ValueError(
            f"`pipeline` is {config.pipeline}; the folder holds no pipeline, model_index.json is missing."
        )
    pipeline = DiffusionPipeline.from_pretrained(config.pipeline, dtype=getattr(torch, config.dtype))
    if not isinstance(pipeline, ImprovedLDMPipeline):
        raise ValueError(f"`pipeline` is {config.pipeline}, a {type(pipeline).__name__}; it must be of improved_ldm.")
    pipeline.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    pipeline.register_to_config(**{f"default_{name}": value for name, value in asked.items() if value is not None})
    return pipeline


def sampling_settings(
    pipeline: ImprovedLDMPipeline, config: EvaluateConfig, point: dict[str, float]
) -> SamplingSettings:
    """How the pipeline is called at a point of a sweep.

    Raises:
        ValueError: for control or guidance that the model does not read.
    """
    values = {
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "guidance_scale": pipeline.config.default_guidance_scale,
        "control_guidance_scale": config.control_guidance_scale,
    }
    settings = SamplingSettings(**values | point)
    check_call(pipeline, settings, config.control)
    return settings


def check_semantics(config: EvaluateConfig, pipeline: ImprovedLDMPipeline | None, samples: Samples | None):
    """Raise a ValueError where captions or labels are asked for that are not read, or a CLIP score without prompts."""
    if pipeline is not None:
        takes_text = pipeline.takes_text
        if takes_text and config.labels == "drawn":
            raise ValueError("`labels` is 'drawn'; a text pipeline is asked for captions, it must be 'balanced'.")
        if not takes_text and "caption_column" in config.model_fields_set:
            raise ValueError("`caption_column` is given, but the pipeline is class-conditional and reads no captions.")
        if config.labels == "balanced" and "label_column" in config.model_fields_set:
            raise ValueError("`label_column` is given, but labels are read where `labels` is 'drawn' only.")
    if config.clip is None:
        return
    if pipeline is not None and not pipeline.takes_text:
        raise ValueError(f"`clip` is {config.clip}; it needs prompts, but the pipeline is class-conditional.")
    if samples is not None and samples.prompts is None:
        raise ValueError(
            f"`clip` is {config.clip}; it needs a `text` of each image in {config.samples}/metadata.jsonl."
        )


def read_reference(config: EvaluateConfig, pipeline: ImprovedLDMPipeline | None, size: tuple[int, int]) -> Reference:
    """The reference set at a size (height, width) in pixels, checked against the hash that is asked for and the one of
    earlier numbers in the output folder.

    Raises:
        ValueError: for another set, or one without the captions or labels that the pipeline is asked for.
    """
    expected = _expected_hashes(config)
    takes_text = pipeline is not None and pipeline.takes_text
    reads_labels = pipeline is not None and not takes_text and config.labels == "drawn"
    reference = open_reference(
        config.data,
        config.split,
        size,
        config.num_reference_images,
        config.batch_size,
        name=config.name,
        image_column=config.image_column,
        caption_column=config.caption_column if takes_text else None,
        label_column=config.label_column if reads_labels else None,
    )
    check_reference(reference, expected)
    return reference


def _expected_hashes(config: EvaluateConfig) -> dict[str, str]:
    """The hash that is asked for, and those of the numbers in the output folder, by who expects them."""
    expected = {} if config.reference_hash is None else {"`reference_hash`": config.reference_hash}
    for file in (config.folder / "metrics.json", config.folder / "sweep.json"):
        if file.exists():
            record = json.loads(file.read_text())
            if "reference" not in record:
                raise ValueError(
                    f"`output_dir` is {config.folder}; its {file.name} is of no evaluation and would be overwritten. "
                    "Choose another folder."
                )
            expected[str(file)] = record["reference"]["sha256"]
    return expected


def make_all_requests(config: EvaluateConfig, pipeline: ImprovedLDMPipeline, reference: Reference) -> list[Request]:
    """What is asked of the pipeline: captions in turn, classes in turn, or classes drawn as in the reference set.

    Raises:
        ValueError: if the reference set has no captions, or labels that the model does not know.
    """
    order = "in_turn"
    if pipeline.takes_text:
        choices = reference.captions
        if not any(choices):
            raise ValueError(
                f"`caption_column` is {config.caption_column!r}; all captions of {config.data} are empty."
            )
    elif config.labels == "balanced":
        choices = range(pipeline.denoiser.config.num_classes)
    else:
        choices, order = reference.labels, "drawn"
        num_classes = pipeline.denoiser.config.num_classes
        if max(choices) >= num_classes:
            raise ValueError(
                f"`labels` is 'drawn'; {config.data} has the label {max(choices)}, the model {num_classes} classes."
            )
    return make_requests(choices, config.num_samples, config.seed, config.control, order)
