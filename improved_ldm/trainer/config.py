"""The typed configuration of a run: a YAML file, and `--section.key value` on the command line.

pydantic checks types and ranges; unknown keys stop a run with the nearest valid name.
"""

import difflib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from huggingface_hub.constants import DEFAULT_REVISION
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from improved_ldm.conditioning.control import CONTROL_PARTS, ControlPart, ControlWeight
from improved_ldm.conditioning.text import TextPadding
from improved_ldm.data.transforms import CropPolicy, CropPosition
from improved_ldm.diffusion.objectives import LossWeighting, Prediction
from improved_ldm.hub.repository import check_repository_name
from improved_ldm.models.denoiser import PositionTransfer
from improved_ldm.models.trunk import ConditioningMode
from improved_ldm.transfer.resolution import NoiseTransfer

ConfigType = TypeVar("ConfigType", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that names an unknown key or gives a value of a wrong type or range."""


class Section(BaseModel):
    """A part of a configuration: its fields are all there is."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    short_names: ClassVar[dict[str, str]] = {}  # argument of the command line → the key that it stands for


class DataConfig(Section):
    """Where the images come from.

    Args:
        source: `embedded:fashion-mnist`, a Hub dataset id, a folder or file of parquet, webdataset shards, or an image
            folder with a metadata file.
        split: part of the set.
        name: configuration of a Hub dataset that has several.
        image_column: column of the images.
        caption_column: column of the captions.
        label_column: column of the class labels, for class-conditional training.
        num_classes: their number, where the set does not name its classes.
        shuffle_window: rows shuffled among themselves.
        num_workers: processes that read and transform.
    """

    source: str = "embedded:fashion-mnist"
    split: str = "train"
    name: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    label_column: str = "label"
    num_classes: int | None = Field(None, ge=1)
    shuffle_window: int = Field(1024, ge=1)
    num_workers: int = Field(0, ge=0)


class TransformConfig(Section):
    """What becomes of an image; the fields are those of `ImageTransform`, samples are square."""

    resolution: int = Field(256, ge=1)
    crop_policy: CropPolicy = "resize_then_crop"
    crop_position: CropPosition = "random"
    crop_probability: float = Field(1.0, ge=0, le=1)
    min_crop: float = Field(1.0, gt=0, le=1)
    flip_probability: float = Field(0.5, ge=0, le=1)
    reduce_probability: float = Field(0.0, ge=0, le=1)
    min_original_size: int | None = Field(None, ge=1)
    target_scale: int | None = Field(None, ge=1)


class CacheConfig(Section):
    """The cache of latents and text tokens.

    Args:
        passes: how often each image is encoded, with fresh crops and flips each time; 0 encodes while training.
        folder: where caches are kept; the default is `cache` in the output folder.
    """

    passes: int = Field(0, ge=0)
    folder: str | None = None


class AutoencoderConfig(Section):
    """The autoencoder.

    Args:
        pretrained: `embedded:autoencoder`, a folder, or a Hub id.
        subfolder: of that place.
    """

    pretrained: str = "embedded:autoencoder"
    subfolder: str | None = None


class TextConfig(Section):
    """The text encoder and the padding of its tokens.

    Args:
        pretrained: `embedded:clip`, a folder, or a Hub id.
        max_tokens: L, tokens a prompt.
        padding: what stands behind a short prompt.
        noise_scale: β_txt of the noisy replicate padding.
    """

    pretrained: str = "embedded:clip"
    max_tokens: int = Field(77, ge=1)
    padding: TextPadding = "noisy_replicate"
    noise_scale: float = Field(0.02, ge=0)


class DenoiserConfig(Section):
    """The denoiser.

    Args:
        pretrained: folder or Hub id of a denoiser to begin from, in place of a fresh one of `name` and `size`.
        subfolder: of that place, `transformer` or `unet` in a pipeline.
        name: backbone.
        size: `tiny`, `S`, `B`, `L` or `XL`, a slash and the patch size.
        conditioning: `disentangled` or `published`.
        control_weight: kind of γ_c.
        control_power: α of the cosine ramp.
        control_parts: of the control that the denoiser reads: `size`, `crop`, `flip`.
        options: further constructor arguments of the backbone; they win over the size's. `qk_norm`, where the backbone
            has it, is true by default in the disentangled mode.
    """

    pretrained: str | None = None
    subfolder: str | None = None
    name: str = "dit"
    size: str = "XL/2"
    conditioning: ConditioningMode = "disentangled"
    control_weight: ControlWeight = "cosine"
    control_power: float = Field(1.0, gt=0)
    control_parts: tuple[ControlPart, ...] = CONTROL_PARTS
    options: dict[str, Any] = {}


class ObjectiveConfig(Section):
    """What the denoiser predicts; the fields are the arguments of `make_objective`."""

    prediction: Prediction = "epsilon"
    loss_weighting: LossWeighting = "uniform"
    shift: float = Field(1.0, gt=0)
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)


class OptimizerConfig(Section):
    """AdamW, its learning rate and the average of the weights.

    Args:
        learning_rate: peak.
        schedule: `constant` after a linear warm-up, or `cosine` down to zero after it.
        warmup_steps: optimizer steps until the peak.
        betas: decay rates of the moments.
        weight_decay: decoupled.
        max_grad_norm: norm that gradients are clipped to.
        ema_decay: decay a step of the average that is sampled and saved.
    """

    learning_rate: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.9999, ge=0, lt=1)


class TrainingConfig(Section):
    """The loop.

    Args:
        steps: optimizer steps.
        batch_size: images a process and micro-batch.
        gradient_accumulation_steps: micro-batches a step.
        mixed_precision: `no`, `bf16` or `fp16`.
        semantic_dropout: probability of the null prompt or class.
        control_dropout: probability of the null control.
        gradient_checkpointing: recompute blocks in the backward pass to save memory.
        compile: compile the denoiser's repeated blocks.
        log_every: steps between values sent to trackers and the loss curve.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: how many are kept.
        trackers: of accelerate: `tensorboard`, `wandb`, …
        cpu_threads: threads a process computes with where there is no GPU; None shares the cores among the processes.
    """

    steps: int = Field(400_000, ge=1)
    batch_size: int = Field(32, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    semantic_dropout: float = Field(0.1, ge=0, le=1)
    control_dropout: float = Field(0.1, ge=0, le=1)
    gradient_checkpointing: bool = False
    compile: bool = False
    log_every: int = Field(10, ge=1)
    checkpoint_every: int = Field(5000, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    trackers: tuple[str, ...] = ("tensorboard",)
    cpu_threads: int | None = Field(None, ge=1)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value):
        return "no" if value is False else value  # YAML reads a bare no as false


class SamplingConfig(Section):
    """The samples of a run and the defaults of the pipeline that it leaves.

    Args:
        every: steps between sample grids; 0 draws one at the end only.
        prompts: rows of the grid; the default takes captions, or one a class, from the data.
        guidance_scale: λ.
        num_inference_steps: steps.
    """

    every: int = Field(0, ge=0)
    prompts: tuple[str, ...] | None = None
    guidance_scale: float = 5.0
    num_inference_steps: int = Field(50, ge=1)


class EvaluationConfig(Section):
    """What is measured at the end.

    Args:
        judge: `embedded:judge` or a folder of a `Judge`; None measures nothing. It is used where its own data set is
            the one that was trained on.
        num_samples: images whose class and orientation are judged.
        num_coverage_samples: images for coverage and FID.
        num_detail_samples: images that are drawn at five original sizes each.
    """

    judge: str | None = "embedded:judge"
    num_samples: int = Field(500, ge=2)
    num_coverage_samples: int = Field(1000, ge=6)  # coverage has 5 neighbours
    num_detail_samples: int = Field(100, ge=1)

    @property
    def counts(self) -> dict[str, int]:
        """The numbers of samples, as `evaluate_obedience` takes them."""
        return self.model_dump(exclude={"judge"})


class HubConfig(Section):
    """What the Hub is told, and where a run is pushed to while it trains.

    Args:
        license: of the weights, as the Hub calls it: `apache-2.0`, `cc-by-nc-4.0`, … Only who trains them can know.
        repo: `user/name` on the Hub; it is made where there is none.
        push_every: steps between pushes of the pipeline with the averaged weights; 0 pushes nothing.
        branch: that they go to, one commit each; not `main`, where versions are published.
        private: whether the repository must be private.
    """

    license: str = Field("unknown", pattern=r"^[a-z0-9][a-z0-9.-]*$")
    repo: str | None = None
    push_every: int = Field(0, ge=0)
    branch: str = "training"
    private: bool = False

    @field_validator("repo")
    @classmethod
    def _has_an_owner(cls, repo: str | None):
        if repo is not None:
            check_repository_name(repo)
        return repo

    @field_validator("branch")
    @classmethod
    def _leaves_versions_alone(cls, branch: str):
        if branch == DEFAULT_REVISION:
            raise ValueError("that is where versions are published; unfinished weights go to another branch")
        return branch

    @model_validator(mode="after")
    def _has_a_place(self):
        if self.push_every and self.repo is None:
            raise ValueError("`push_every` needs a `repo` to push to")
        return self


class StageConfig(Section):
    """One stage of a run; what it leaves out is as in the run.

    Args:
        resolution: pixels a side.
        steps: optimizer steps of the stage.
        batch_size: images a process and micro-batch.
        crop_policy: of the stage; `crop_at_target_scale` crops at the scale of the last stage.
        source: where its images come from.
        split: part of that set.
        learning_rate: peak.
        positions: what becomes of the positions of patches at the switch to this stage.
        noise: what becomes of the noise schedule at the switch.
        optimizer: whether the optimizer's moments are carried over the switch or start afresh.
        average: whether the average of the weights is carried, or starts from the weights.
    """

    resolution: int = Field(ge=1)
    steps: int = Field(ge=1)
    batch_size: int | None = Field(None, ge=1)
    crop_policy: CropPolicy | None = None
    source: str | None = None
    split: str | None = None
    learning_rate: float | None = Field(None, gt=0)
    positions: PositionTransfer = "resample"
    noise: NoiseTransfer = "rescale"
    optimizer: Literal["carry", "reset"] = "carry"
    average: Literal["carry", "reset"] = "carry"


class LoraConfig(Section):
    """The adapter; the fields are settings of PEFT's `LoraConfig`.

    Args:
        rank: r, width of the low-rank update.
        alpha: the update is scaled by `alpha` / `rank`; the default is `rank`.
        rslora: scale by `alpha` / sqrt(`rank`) instead.
        dora: learn the norms of the weights apart from their directions.
        targets: endings of the names of the denoiser's layers that it is on; the default is all projections of
            attention.
        text_encoder: put it on the attention of the text encoder as well. Text is then encoded while it trains.
    """

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0)
    rslora: bool = False
    dora: bool = False
    targets: tuple[str, ...] | None = None
    text_encoder: bool = False


class SharedConfig(Section):
    """What every training run has.

    Args:
        output_dir: where everything goes.
        seed: of weights, data order, noise and samples.
    """

    output_dir: str = "runs/quickstart"
    seed: int = 0
    data: DataConfig = DataConfig()
    transform: TransformConfig = TransformConfig()
    cache: CacheConfig = CacheConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    hub: HubConfig = HubConfig()


class AdapterRunConfig(SharedConfig):
    """The training of an adapter.

    Resolution, autoencoder, text, prediction and the settings of sampling are the base's. They need not be given, and
    cannot be changed.

    Args:
        base: folder or Hub id of the pipeline that the adapter is for.
    """

    short_names: ClassVar[dict[str, str]] = {"data": "data.source"}

    base: str
    lora: LoraConfig = LoraConfig()


class RunConfig(SharedConfig):
    """The training of a model.

    Args:
        stages: resolutions to train at, one after the other; none trains at `transform.resolution`.
        after: what a stage begins with, in the configuration of a stage alone; a run has nothing to say here.
    """

    denoiser: DenoiserConfig = DenoiserConfig()
    stages: tuple[StageConfig, ...] = ()
    after: dict[str, Any] | None = None

    def of_stage(self, number: int) -> "RunConfig":
        """The configuration of a stage, counted from 0; the last one ends in the run's own folder."""
        stage, last = self.stages[number], number == len(self.stages) - 1
        policy = stage.crop_policy or self.transform.crop_policy
        folder = Path(self.output_dir) / f"stage-{number + 1}-{stage.resolution}"
        changes = {
            "output_dir": self.output_dir if last else folder.as_posix(),
            "data": {"source": stage.source, "split": stage.split},
            "transform": {
                "resolution": stage.resolution,
                "crop_policy": policy,
                "min_crop": None if policy == "crop_then_resize" else 1.0,  # the other policies know one size
            },
            "optimizer": {"learning_rate": stage.learning_rate},
            "training": {"steps": stage.steps, "batch_size": stage.batch_size},
            "stages": (),
        }
        values = self.model_dump()
        for section, change in changes.items():
            if isinstance(change, dict):
                values[section] |= {key: value for key, value in change.items() if value is not None}
            else:
                values[section] = change
        at_target = policy == "crop_at_target_scale"
        values["transform"]["target_scale"] = self.stages[-1].resolution if at_target else None
        return RunConfig.model_validate(values)


def parse_config(config_class: type[ConfigType], argv: list[str], default_yaml: Path | None = None) -> ConfigType:
    """Read a configuration from a YAML file and command-line overrides.

    Args:
        config_class: the typed configuration.
        argv: `--config FILE` and `--section.key VALUE` pairs, values in YAML.
        default_yaml: the file that is read where `--config` names none.

    Returns:
        The configuration, checked.

    Raises:
        ConfigError: naming the key, the value and what would be valid.
    """
    overrides = _pair_arguments(argv)
    path = overrides.pop("config", default_yaml)
    values = {}
    if path is not None:
        if not Path(path).is_file():
            raise ConfigError(f"--config {path}: there is no such file.")
        values = yaml.safe_load(Path(path).read_text()) or {}
    short_names = getattr(config_class, "short_names", {})
    texts = {path for path, field in _key_paths(config_class) if field.annotation in (str, str | None)}
    for key, value in overrides.items():
        name = short_names.get(key, key)
        _set_nested(values, name, _parse_value(key, value, is_text=name in texts))
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        problems = [_explain(config_class, problem) for problem in error.errors()]
        raise ConfigError("\n".join(problems)) from None


def parse_config_or_exit(
    config_class: type[ConfigType], argv: list[str], default_yaml: Path | None = None
) -> ConfigType:
    """`parse_config` for a script: an error ends the process with its message alone, `--help` with the keys."""
    if {"--help", "-h"} & set(argv):
        print(f"--config FILE  (default: {default_yaml})", *_describe_keys(config_class), sep="\n")
        sys.exit(0)
    try:
        return parse_config(config_class, argv, default_yaml)
    except ConfigError as error:
        sys.exit(f"configuration error: {error}")


@contextmanager
def exit_on_error(what: str, *errors: type[Exception]) -> Iterator[None]:
    """End a script with one line where what it was given is wrong or cannot be had, or where it is interrupted.

    Args:
        what: did not happen; it begins the line.
        errors: that are expected beside `OSError` and `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError, *errors) as error:
        sys.exit(f"{what}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from there")


def _pair_arguments(argv: list[str]) -> dict[str, str]:
    pairs, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} stands alone; arguments are written `--section.key value`.")
        key, has_value, value = word[2:].partition("=")
        if not has_value:
            if not words:
                raise ConfigError(f"--{key} has no value.")
            value = words.pop(0)
        pairs[key] = value
    return pairs


def _parse_value(key: str, value: str, is_text: bool):
    """A value of the command line, read as YAML; where a text is asked for, a number or a date is its own text."""
    try:
        parsed = yaml.safe_load(value)
        return value if is_text and isinstance(parsed, int | float | date) else parsed
    except yaml.YAMLError:
        raise ConfigError(f"--{key} is {value!r}, which is not YAML; quote it: --{key} '\"{value}\"'.") from None


def _set_nested(values: dict, key: str, value):
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--{key}: {section!r} is not a section.")
    values[name] = value


def _explain(config_class: type[BaseModel], problem: dict) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"`{key}` is not given; give `--{key}`."
    if problem["type"] != "extra_forbidden":
        return f"`{key}` is {problem['input']!r}: {problem['msg']}."
    known = dict(_key_paths(config_class))
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not nearest:  # the right name in a wrong section
        nearest = [path for path in known if path.rsplit(".", 1)[-1] == problem["loc"][-1]]
    hint = f"; the nearest valid key is `{nearest[0]}`" if nearest else f"; valid keys are {', '.join(known)}"
    return f"`{key}` is not a key{hint}."


def _describe_keys(config_class: type[BaseModel]) -> list[str]:
    """A line for every key that is not a section: its name, type and default."""
    return [
        f"--{path}  {field.annotation.__name__ if isinstance(field.annotation, type) else field.annotation}"
        + ("" if field.is_required() else f"  (default: {field.default!r})")
        for path, field in _key_paths(config_class)
        if not _is_section(field.annotation)
    ]


def _is_section(annotation) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _key_paths(config_class: type[BaseModel], prefix: str = ""):
    for name, field in config_class.model_fields.items():
        yield prefix + name, field
        if _is_section(field.annotation):
            yield from _key_paths(field.annotation, f"{prefix}{name}.")
