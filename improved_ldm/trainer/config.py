"""The configuration of a training run; `trainer.sections` has its parts, `settings` reads it."""

from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from pydantic import Field, model_validator

from improved_ldm.bounds import (
    SHAREABLE,
    BatchSize,
    Classes,
    Columns,
    Count,
    Place,
    Positive,
    Seed,
    Sides,
    Text,
    Width,
)
from improved_ldm.data.transforms import CropPolicy
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.evaluation.obedience_config import ObedienceConfig
from improved_ldm.models.positions import PositionTransfer
from improved_ldm.naming import naming_keys
from improved_ldm.resolution import size_text
from improved_ldm.sampling.steps import set_steps
from improved_ldm.settings import Section
from improved_ldm.trainer.data_sections import DataConfig, SourceConfig, TransformConfig
from improved_ldm.trainer.optimizer_config import OptimizerConfig
from improved_ldm.trainer.sections import (
    AutoencoderConfig,
    CacheConfig,
    DenoiserConfig,
    HubConfig,
    ObjectiveConfig,
    SamplingConfig,
    TextConfig,
    TrainingConfig,
    ValidationConfig,
)
from improved_ldm.transfer.resolution import GuidanceTransfer, NoiseTransfer

__all__ = [
    "AdapterRunConfig",
    "AutoencoderConfig",
    "DataConfig",
    "DenoiserConfig",
    "HubConfig",
    "LoraConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "SharedConfig",
    "StageConfig",
    "TextConfig",
    "TrainingConfig",
    "ValidationConfig",
]

MAX_STAGES = 100
Carry = Literal["carry", "reset"]
Condition = Literal["class", "text"]  # kinds of semantic condition
FLOW_KEYS = ("shift", "logit_mean", "logit_std")
VARIANCE_PRESERVING_KEYS = ("loss_weighting", "beta_schedule", "beta_start", "beta_end", "learned_variance")
STAGE_KEYS = {  # field of a stage → key of the run that it replaces
    "resolution": "transform.resolution",
    "steps": "training.steps",
    "batch_size": "training.batch_size",
    "crop_policy": "transform.crop_policy",
    "source": "data.source",
    "sources": "data.sources",
    "split": "data.split",
    "name": "data.name",
    "image_column": "data.image_column",
    "caption_column": "data.caption_column",
    "label_column": "data.label_column",
    "num_classes": "data.num_classes",
    "text_encoder": "text.pretrained",
    "max_tokens": "text.max_tokens",
    "learning_rate": "optimizer.learning_rate",
    "validation_source": "validation.source",
    "validation_split": "validation.split",
}
KEYS_OF_CONDITIONS: dict[Condition, tuple[str, ...]] = {  # keys of a stage that only stages of one kind read
    "class": ("label_column", "num_classes"),
    "text": ("caption_column", "text_encoder", "max_tokens"),
}


def check_trackers(names: Collection[str]):
    """Raise a ValueError for a tracker that accelerate does not know, or that is not installed."""
    installed = {str(tracker) for tracker in get_available_trackers()}  # not equal to their names
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"`training.trackers` has {name!r}; it may have {', '.join(LOGGER_TYPE_TO_CLASS)}.")
        if name not in installed:
            raise ValueError(f"`training.trackers` has {name!r}, which is not installed: pip install {name}")


def check_adan():
    """Raise a ValueError if timm, which has Adan, is not installed."""
    if find_spec("timm") is None:
        raise ValueError("`optimizer.name` is adan, which needs timm: pip install timm")


class SharedConfig(Section):
    """Settings of every training run."""

    output_dir: Place = "runs/quickstart"
    """Folder for everything that the run writes."""
    seed: Seed = 0
    """Seed of weights, data order, noise and samples."""
    data: DataConfig = DataConfig()
    transform: TransformConfig = TransformConfig()
    cache: CacheConfig = CacheConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    text: TextConfig = TextConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    sampling: SamplingConfig = SamplingConfig()
    validation: ValidationConfig = ValidationConfig()
    evaluation: ObedienceConfig = ObedienceConfig()
    hub: HubConfig = HubConfig()

    @model_validator(mode="after")
    def _updates_its_average(self):
        """Refuse a run whose average would stay at the initial weights."""
        if self.optimizer.ema_every > self.training.steps:
            every, steps = self.optimizer.ema_every, self.training.steps
            raise ValueError(
                f"`optimizer.ema_every` is {every}; it must be at most `training.steps`, which is {steps}."
            )
        return self

    def check_given(self, typed: Collection[str], filed: Collection[str]):
        if "training.trackers" in {*typed, *filed}:
            check_trackers(self.training.trackers)
        if self.optimizer.name == "adan":
            check_adan()

    def file_values(self) -> dict[str, Any]:
        """The keys and values to save next to the weights, without local folders, because they may be published."""
        return self.model_dump(mode="json", context=SHAREABLE)


class LoraConfig(Section):
    """The adapter; the fields are settings of PEFT's `LoraConfig`."""

    rank: Width = 8
    """r, width of the low-rank update."""
    alpha: Positive | None = None
    """The update is scaled by `alpha` / `rank`; default: `rank`."""
    rslora: bool = False
    """Scale the update by `alpha` / sqrt(`rank`) instead."""
    dora: bool = False
    """Learn the norms of the weights separately from their directions."""
    targets: tuple[Text, ...] | None = None
    """Layers of the denoiser to adapt, by the endings of their names; default: all attention projections."""
    text_encoder: bool = False
    """Also adapt the attention of the text encoder, which then encodes text during training."""


class AdapterRunConfig(SharedConfig):
    """Settings of the training of an adapter.

    Resolution, autoencoder, text, prediction and the settings of sampling are those of the base. They need not be
    given, and cannot be changed.
    """

    base: Place
    """Folder or Hub id of the pipeline that the adapter is for."""
    lora: LoraConfig = LoraConfig()


class StageConfig(Section):
    """One stage of a run; keys that it does not give are those of the run."""

    resolution: Sides
    """Side length of training images in pixels, or [height, width]."""
    steps: Count
    """Optimizer steps of the stage."""
    batch_size: BatchSize | None = None
    """Images per process and micro-batch."""
    crop_policy: CropPolicy | None = None
    """Crop policy; `crop_at_target_scale` crops at the scale of the last stage."""
    condition: Condition | None = None
    """What images are conditioned on; default: as in the stage before, and in the first stage as the script says."""
    source: Place | None = None
    """Images of the stage, as in `data.source`."""
    sources: tuple[SourceConfig, ...] | None = None
    """Images of the stage, as in `data.sources`."""
    split: Text | None = None
    """Split of that set."""
    name: Text | None = None
    """Configuration of a Hub dataset that has several."""
    image_column: Text | None = None
    """Column of the images."""
    caption_column: Columns | None = None
    """Column or columns of the captions, in a stage with text."""
    label_column: Text | None = None
    """Column of the class labels, in a stage with classes."""
    num_classes: Classes | None = None
    """Number of classes, in a stage with classes whose set does not name them."""
    text_encoder: Place | None = None
    """Text encoder, as in `text.pretrained`, in a stage with text."""
    max_tokens: Width | None = None
    """Number of tokens per prompt, in a stage with text."""
    learning_rate: Positive | None = None
    """Peak learning rate."""
    validation_source: Place | None = None
    """Held-out images of the stage, as in `validation.source`."""
    validation_split: Text | None = None
    """Split of the held-out images, as in `validation.split`."""
    positions: PositionTransfer = "resample"
    """How the positions of patches change when the stage begins."""
    noise: NoiseTransfer = "rescale"
    """How the noise schedule changes when the stage begins."""
    guidance: GuidanceTransfer = "keep"
    """How the default guidance scale changes from the stage before; the first stage has `sampling.guidance_scale`."""
    optimizer: Carry = "carry"
    """Whether the moments of the optimizer are carried over from the stage before."""
    average: Carry = "carry"
    """Whether the averaged weights are carried over, or start from the weights."""


class RunConfig(SharedConfig):
    """Settings of the training of a model."""

    denoiser: DenoiserConfig = DenoiserConfig()
    stages: Annotated[tuple[StageConfig, ...], Field(max_length=MAX_STAGES)] = ()
    """Stages with their resolutions, in order; by default there is one, at `transform.resolution`."""

    @model_validator(mode="before")
    @classmethod
    def _is_of_a_whole_run(cls, values: Any) -> Any:
        """Drop the empty `after` in files of earlier versions, and refuse the file of a later stage."""
        if "after" in cls.model_fields or not isinstance(values, dict) or "after" not in values:
            return values
        if values["after"] is not None:
            raise ValueError(
                "`after` describes the stage before and cannot be given: this file is of one stage of a run. Give the "
                "file of the whole run, or start from that stage's weights with `--denoiser.pretrained`."
            )
        return {key: value for key, value in values.items() if key != "after"}

    @model_validator(mode="after")
    def _samples_its_objective(self):
        objective, sampling = make_objective(**self.objective.model_dump()), self.sampling
        names = ("sampler", "timestep_spacing", "num_inference_steps")
        with naming_keys(**{name: f"sampling.{name}" for name in names}):
            scheduler = objective.sampling_scheduler(sampling.sampler, sampling.timestep_spacing)
            set_steps(scheduler, "num_inference_steps", sampling.num_inference_steps)
        return self

    def check_given(self, typed: Collection[str], filed: Collection[str]):
        super().check_given(typed, filed)
        self._check_objective(typed)
        if not self.stages:
            return
        # stages of the command line override a file's keys, which may be for a run without stages
        given = {*typed} if "stages" in typed else {*typed, *filed}
        ignored = sorted(self._decided_by_stages() & given)
        if ignored:
            keys = ", ".join(f"`{key}`" for key in ignored)
            stages = ", ".join(
                f"{{resolution: {stage['resolution']}, steps: {stage['steps']}}}"
                for stage in self.model_dump(mode="json")["stages"]
            )
            raise ValueError(
                f"{keys} would be ignored, because `stages` decide instead. Change the stages, as in --stages "
                f'"[{stages}]", or train without stages: --stages "[]".'
            )

    def _check_objective(self, typed: Collection[str]):
        """Raise a ValueError for typed keys of the objective that its prediction does not read."""
        prediction = self.objective.prediction
        for key in VARIANCE_PRESERVING_KEYS if prediction == "flow" else FLOW_KEYS:
            if f"objective.{key}" in typed:
                only = "'flow'" if key in FLOW_KEYS else "'epsilon' and 'v_prediction'"
                raise ValueError(
                    f"`objective.{key}` is given, but `objective.prediction` is {prediction!r}; it is for {only} only."
                )

    def file_values(self) -> dict[str, Any]:
        values = super().file_values()
        for section, _, key in (name.partition(".") for name in self._decided_by_stages()):
            del values[section][key]
        return values

    def _decided_by_stages(self) -> set[str]:
        """The keys of the run that none of its stages reads."""
        if not self.stages:
            return set()
        decided = {key for field, key in STAGE_KEYS.items() if all(getattr(stage, field) for stage in self.stages)}
        policies = {stage.crop_policy or self.transform.crop_policy for stage in self.stages}
        if "crop_then_resize" not in policies:
            decided.add("transform.min_crop")
        return decided | {"transform.target_scale"}

    def stage_names(self) -> list[str]:
        """The stages as messages name them."""
        return [f"stage {number} of {len(self.stages)}" for number in range(1, len(self.stages) + 1)]

    def stage_conditions(self, first: Condition) -> list[Condition]:
        """The kind of condition of each stage; that of the first is `first` if it gives none.

        Raises:
            ValueError: if a stage gives a key that only stages of the other kind read.
        """
        kinds = []
        for name, stage in zip(self.stage_names(), self.stages, strict=True):
            kind = stage.condition or (kinds[-1] if kinds else first)
            other: Condition = "class" if kind == "text" else "text"
            ignored = [f"`{key}`" for key in KEYS_OF_CONDITIONS[other] if getattr(stage, key) is not None]
            if ignored:
                raise ValueError(
                    f"{name}: {', '.join(ignored)} would be ignored, because its condition is {kind!r}; leave it out, "
                    f"or give `condition: {other}`."
                )
            kinds.append(kind)
        return kinds

    def of_stage(self, number: int) -> "RunConfig":
        """The configuration of a stage, counted from 0; the last one uses the run's own folder."""
        stage, last = self.stages[number], number == len(self.stages) - 1
        folder = Path(self.output_dir) / f"stage-{number + 1}-{size_text(stage.resolution)}"
        values = self.model_dump() | {"output_dir": self.output_dir if last else folder.as_posix(), "stages": ()}
        if stage.source is not None:
            values["data"]["sources"] = ()
        elif stage.sources:
            values["data"]["source"] = DataConfig.model_fields["source"].default
        for field, key in STAGE_KEYS.items():
            section, _, name = key.partition(".")
            if (value := getattr(stage, field)) is not None:
                values[section][name] = value
        transform = values["transform"]
        if transform["crop_policy"] != "crop_then_resize":  # the other policies have one size
            transform["min_crop"] = 1.0
        at_target = transform["crop_policy"] == "crop_at_target_scale"
        transform["target_scale"] = self.stages[-1].resolution if at_target else None
        return RunConfig.model_validate(values)
