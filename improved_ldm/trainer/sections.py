"""The sections of a training run's configuration."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from huggingface_hub.constants import DEFAULT_REVISION
from pydantic import Field, ValidationError, ValidationInfo, WrapValidator, field_validator, model_validator

from improved_ldm.bounds import (
    BatchSize,
    Count,
    CountOrZero,
    NotNegative,
    Number,
    Passes,
    Place,
    Positive,
    Prefetched,
    Probability,
    SamplerSteps,
    Share,
    Text,
    Threads,
    Width,
)
from improved_ldm.conditioning.control import DEFAULT_PARTS, ControlPart
from improved_ldm.conditioning.control_embedding import ControlWeight
from improved_ldm.conditioning.guidance import GuidanceOptions
from improved_ldm.conditioning.text import TextPadding
from improved_ldm.data.cache import CacheDtype
from improved_ldm.diffusion.objectives import LossWeighting, Prediction, make_objective
from improved_ldm.diffusion.schedules import BetaSchedule, SamplerName, TimestepSpacing
from improved_ldm.models.family import check_options, denoiser_class, preset
from improved_ldm.models.trunk import ConditioningMode, ControlRoute
from improved_ldm.places import check_repository_name
from improved_ldm.settings import Section
from improved_ldm.trainer.launcher_variables import LAUNCHER_VARIABLES, UNLAUNCHED, launched_with

ComputeDtype = Literal["auto", "fp32", "bf16", "fp16"]


class CacheConfig(Section):
    """The cache of latents and text tokens."""

    passes: Passes = 0
    """Number of times that each image is encoded, with new crops and flips each time; 0 encodes during training."""
    folder: Place | None = None
    """Folder of the caches; default: `cache` in the output folder."""
    dtype: CacheDtype = "fp16"
    """Precision of latents and text; with `fp16`, values beyond its range are stored as bfloat16."""
    pretrained: Place | None = None
    """Finished cache to read instead of the images: its folder, or its Hub id as a dataset."""

    @model_validator(mode="after")
    def _is_written_or_taken_over(self):
        if self.passes and self.pretrained is not None:
            raise ValueError(f"`pretrained` is {self.pretrained!r}, and `passes` {self.passes}; it must be 0 then")
        return self


class AutoencoderConfig(Section):
    """The autoencoder."""

    pretrained: Place = "embedded:autoencoder"
    """`embedded:autoencoder`, a folder or a Hub id."""
    subfolder: Place | None = None
    """Subfolder of `pretrained`."""
    dtype: ComputeDtype = "auto"
    """Precision of encoding; `auto` is bf16 on a GPU that has it, else fp32. The saved weights stay as loaded."""


class TextConfig(Section):
    """The text encoder and the padding of its tokens."""

    pretrained: Place = "embedded:clip"
    """`embedded:clip`, a folder or a Hub id."""
    max_tokens: Width = 77
    """L, tokens per prompt."""
    dtype: ComputeDtype = "auto"
    """Precision of encoding prompts, in a copy; `auto` is bf16 on a GPU that has it, else fp32."""
    padding: TextPadding = "noisy_replicate"
    """How short prompts are padded."""
    noise_scale: NotNegative = 0.02
    """β_txt, noise scale of the noisy replicate padding."""


class DenoiserConfig(Section):
    """The denoiser; in the disentangled mode `options.qk_norm` is true by default if the backbone has it."""

    pretrained: Place | None = None
    """Folder or Hub id of a denoiser to start from, instead of new weights of `name` and `size`."""
    subfolder: Place | None = None
    """Subfolder of `pretrained`: `transformer` or `unet` in a pipeline."""
    name: Text = "dit"
    """Backbone: `dit`, `pixart`, `mmdit`, `mdt` or `unet`."""
    size: Text = "XL/2"
    """`tiny`, `S`, `B`, `L` or `XL`, a slash and the patch size; for `unet` also `LDM-tiny/2` and `LDM-4/2`."""
    conditioning: ConditioningMode = "disentangled"
    """How conditions enter the denoiser."""
    control_weight: ControlWeight = "cosine"
    """Shape of γ_c(t), the weight of the control over the timesteps."""
    control_power: Positive = 1.0
    """α of the cosine ramp."""
    control_parts: tuple[ControlPart, ...] = DEFAULT_PARTS
    """Parts of the control that the denoiser reads."""
    control_route: ControlRoute = "norm"
    """How the control enters: through the adaptive `norm`, or as `tokens` of the attention."""
    options: dict[str, Any] = Field({})
    """Further constructor arguments of the backbone, which override those of `size`."""

    @field_validator("name")
    @classmethod
    def _is_a_backbone(cls, name: str):
        denoiser_class(name)
        return name

    @field_validator("size")
    @classmethod
    def _is_in_the_table(cls, size: str, others: ValidationInfo):
        if "name" in others.data:  # a wrong name is reported alone
            preset(others.data["name"], size)
        return size

    @field_validator("options")
    @classmethod
    def _are_arguments(cls, options: dict[str, Any], others: ValidationInfo):
        return check_options(others.data["name"], options) if "name" in others.data else options


class ObjectiveConfig(Section):
    """What the denoiser predicts; the fields are the arguments of `make_objective`."""

    prediction: Prediction = "epsilon"
    """What the denoiser predicts."""
    loss_weighting: LossWeighting = "uniform"
    """Weight of the squared error over the timesteps."""
    beta_schedule: BetaSchedule = "scaled_linear"
    """Noise schedule of `epsilon` and `v_prediction`."""
    beta_start: Share | None = None
    """First β; default: 0.00085 of `scaled_linear`, 0.0001 of `linear`; `cosine` has none."""
    beta_end: Share | None = None
    """Last β; default: 0.012 of `scaled_linear`, 0.02 of `linear`; `cosine` has none."""
    learned_variance: bool = False
    """Also predict the variance of ancestral steps, in as many further channels, trained by the variational bound."""
    shift: Positive = 1.0
    """Shift of the noise schedule towards more noise; above 1 for high resolutions."""
    logit_mean: Number = 0.0
    """Mean of logit(t) if timesteps have a logit-normal distribution."""
    logit_std: Positive = 1.0
    """Standard deviation of logit(t) if timesteps have a logit-normal distribution."""

    @model_validator(mode="after")
    def _makes_an_objective(self):
        make_objective(**self.model_dump())
        return self


def _or_as_launched(key: str) -> WrapValidator:
    """Use the launcher's value for a key of `training` that is not given."""

    def check(value, validate: Callable):
        if value is not None:
            return validate(value)
        asked = launched_with(key)
        try:
            return validate(asked or UNLAUNCHED[key])
        except ValidationError as error:
            variable = LAUNCHER_VARIABLES[key]
            raise ValueError(f"{variable} is {asked!r}: {error.errors()[0]['msg']}") from error

    return WrapValidator(check)


class TrainingConfig(Section):
    """The training loop."""

    steps: Count = 400_000
    """Optimizer steps."""
    batch_size: BatchSize = 32
    """Images per process and micro-batch."""
    gradient_accumulation_steps: Annotated[BatchSize, _or_as_launched("gradient_accumulation_steps")] = Field(
        None, validate_default=True
    )
    """Micro-batches per step; default: the launcher's value, or 1."""
    mixed_precision: Annotated[Literal["no", "bf16", "fp16"], _or_as_launched("mixed_precision")] = Field(
        None, validate_default=True
    )
    """Mixed precision; default: the launcher's value, or `no`."""
    semantic_dropout: Probability = 0.1
    """Probability that an image is trained with the null prompt or class."""
    control_dropout: Probability = 0.1
    """Probability that an image is trained with the null control."""
    gradient_checkpointing: bool = False
    """Recompute blocks in the backward pass to save memory."""
    compile: bool = False
    """Compile the repeated blocks of the denoiser."""
    max_skipped_steps: CountOrZero = 100
    """Largest number of skipped (non-finite) steps in a row before the run stops; at most half of `steps`."""
    log_every: Count = 10
    """Steps between entries in the trackers and the loss curve."""
    checkpoint_every: Count = 5000
    """Steps between checkpoints."""
    keep_checkpoints: Count = 2
    """Number of checkpoints that are kept."""
    trackers: tuple[Text, ...] = ("tensorboard",)
    """Trackers of accelerate: `tensorboard`, `wandb`, …"""
    prefetch: Prefetched = 2
    """Batches that are read and encoded ahead, in a thread of each process; 0 prepares each when it is needed."""
    cpu_threads: Threads | None = None
    """Threads per process without a GPU; by default the processes share the cores."""

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_word(cls, value):
        return "no" if value is False else value  # YAML 1.1 reads a bare no as false


class SamplingConfig(Section):
    """The samples of a run, and the sampling defaults of its pipeline."""

    every: CountOrZero = 0
    """Steps between sample grids; with 0, there is only one at the end."""
    prompts: tuple[Text, ...] | None = None
    """Prompts of the grid, one per row; default: captions from the data. Class-conditional models show classes."""
    guidance_scale: Number = 5.0
    """λ, guidance scale."""
    num_inference_steps: SamplerSteps = 50
    """Sampler steps per image."""
    sampler: SamplerName | None = None
    """Scheduler of the pipeline; default: `ddpm` with a learned variance, `euler` for a flow, else `ddim`."""
    timestep_spacing: TimestepSpacing | None = None
    """Spacing of the sampler's timesteps; default: `trailing` for `ddim`, else `linspace`."""
    guidance_options: dict[str, Any] = Field({})
    """Where and when guidance acts: `channels`, `schedule`, `power` and `interval` of `GuidanceOptions`."""

    @field_validator("guidance_options")
    @classmethod
    def _are_guidance_options(cls, options: dict[str, Any]):
        GuidanceOptions.read(options)
        return options


class ValidationConfig(Section):
    """Held-out images: their loss during training, and the distance of a few samples to them."""

    source: Place | None = None
    """Set of the held-out images, with the columns of `data`; default: that of `data`."""
    split: Text | None = None
    """Split of the held-out images; default: `validation` or `test`, if a local set has one."""
    every: CountOrZero | None = None
    """Steps between held-out losses; default: as often as costs 2% of the training; 0 measures none."""
    num_images: Annotated[Count, Field(le=10_000)] = 64
    """Number of held-out images, which stay in memory."""
    samples_every: CountOrZero = 0
    """Steps between distances of samples to held-out images; 0 measures none."""
    num_samples: Annotated[Count, Field(ge=6, le=10_000)] = 200
    """Number of these samples, and of the images that they are compared with; few, so only for the trend."""
    features: Place = "inception"
    """Feature network of the distance: `inception`, `inception:FILE`, `embedded:judge`, …"""


class HubConfig(Section):
    """The license on the card, and the repository that a run pushes to while it trains."""

    license: Text = Field("unknown", pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """License of the weights, as the Hub names it: `apache-2.0`, `cc-by-nc-4.0`, …"""
    repo: Text | None = None
    """`user/name` on the Hub, created if it does not exist."""
    push_every: CountOrZero = 0
    """Steps between pushes of the pipeline with the averaged weights; 0 pushes nothing."""
    branch: Text = "training"
    """Branch to push to, with one commit per push; not `main`, which holds published versions."""
    private: bool = False
    """Require a private repository."""

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
            raise ValueError("it holds published versions; unfinished weights must go to another branch")
        return branch

    @model_validator(mode="after")
    def _has_a_place(self):
        if self.push_every and self.repo is None:
            raise ValueError("`push_every` needs a `repo` to push to")
        return self
