"""The configurations of the runs that train the networks around a denoiser: autoencoder, CLIP pair and judge."""

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from improved_ldm.bounds import Count, CountOrZero, Depth, NotNegative, Pixels, Place, Probability, Width
from improved_ldm.settings import Section, with_defaults
from improved_ldm.trainer.data_sections import DataConfig, HeldOutConfig, LabelledDataConfig, TransformConfig
from improved_ldm.trainer.loop_config import LoopConfig
from improved_ldm.trainer.optimizer_config import OptimizerConfig
from improved_ldm.trainer.task_config import TaskConfig

KEYS_OF_TYPES = {"kl": ("norm_num_groups", "kl_weight"), "dc": ("latent_noise",)}  # of an autoencoder


class MeasuringConfig(HeldOutConfig):
    """Held-out images, which are measured at each checkpoint and at the end."""

    num_images: Annotated[Count, Field(le=100_000)] = 2000
    """Number of held-out images."""


class NetworkConfig(TaskConfig):
    """Settings of the training of a network around a denoiser."""

    successors: ClassVar[dict[str, str]] = {"test_split": "validation.split"}

    validation: MeasuringConfig = MeasuringConfig()


class NewAutoencoderConfig(Section):
    """The autoencoder."""

    type: Literal["dc", "kl"] = "dc"
    """`dc` is `AutoencoderDC`, which does not compute at full resolution and trains faster; `kl` `AutoencoderKL`."""
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=10)] = (32, 32, 64, 128)
    """Channels per block; every block except the last halves the resolution. `dc` does not use the first."""
    layers_per_block: Depth = 2
    """Residual layers per block."""
    norm_num_groups: Width = 8
    """Groups per normalization; `kl` only."""
    latent_channels: Width = 4
    """Channels of the latents."""
    kl_weight: NotNegative = 3e-4
    """Weight of the KL divergence, which is a mean over latent values, in nats; `kl` only."""
    latent_noise: NotNegative = 0.05
    """Standard deviation of the noise in the latents that are decoded, whose own is about 1; `dc` only."""
    latent_flip_probability: Probability = 0.5
    """Probability of decoding a mirrored latent to the mirrored image."""


AutoencoderTransform = with_defaults(TransformConfig, resolution=64)
AutoencoderOptimizer = with_defaults(
    OptimizerConfig, learning_rate=2e-3, schedule="cosine", warmup_steps=100, ema_decay=0.998, ema_warmup=True
)
AutoencoderTraining = with_defaults(LoopConfig, steps=4000, batch_size=16, log_every=50, checkpoint_every=500)


class AutoencoderRunConfig(NetworkConfig):
    """Settings of the training of an autoencoder."""

    output_dir: Place = "runs/autoencoder"
    """Folder for everything that the run writes."""
    transform: AutoencoderTransform = AutoencoderTransform()
    optimizer: AutoencoderOptimizer = AutoencoderOptimizer()
    training: AutoencoderTraining = Field(default_factory=AutoencoderTraining)
    autoencoder: NewAutoencoderConfig = NewAutoencoderConfig()

    def check_given(self, typed: Collection[str], filed: Collection[str]):
        super().check_given(typed, filed)
        other = "kl" if self.autoencoder.type == "dc" else "dc"
        for key in KEYS_OF_TYPES[other]:
            if f"autoencoder.{key}" in typed:
                raise ValueError(
                    f"`autoencoder.{key}` is given, but `autoencoder.type` is '{self.autoencoder.type}'; it is for "
                    f"'{other}' only."
                )


class OneSizeConfig(NetworkConfig):
    """Settings of the training of a network that reads square images of one size."""

    @model_validator(mode="after")
    def _has_square_images(self):
        if self.transform.buckets:
            raise ValueError("`transform.buckets` is true; this network reads images of one size.")
        if not isinstance(self.transform.resolution, int):
            raise ValueError(
                f"`transform.resolution` is {list(self.transform.resolution)}; it must be one number, because this "
                "network reads square images."
            )
        return self


class ClipConfig(Section):
    """The CLIP pair: a tower for text, and one for images."""

    width: Width = 96
    """Width of both towers."""
    heads: Width = 4
    """Attention heads per layer."""
    text_layers: Depth = 2
    """Layers of the text tower."""
    vision_layers: Depth = 4
    """Layers of the image tower."""
    patch_size: Pixels = 8
    """Side length of a patch, in pixels."""
    projection_dim: Width = 64
    """Width of the shared embedding."""
    max_tokens: Annotated[Width, Field(ge=3)] | None = None
    """Tokens per caption with start and end; default: the length at which 1% of the captions are cut, at most 77."""
    max_merges: Count = 2048
    """Largest number of words and word parts that the tokenizer learns from the captions."""
    match: Literal["caption", "label"] = "caption"
    """Which images of a batch match a caption: those with an equal one, or with the same label."""


ClipTransform = with_defaults(TransformConfig, resolution=64, crop_policy="crop_then_resize", min_crop=0.8)
ClipOptimizer = with_defaults(
    OptimizerConfig, learning_rate=1e-3, schedule="cosine", warmup_steps=100, weight_decay=0.05, ema_decay=0.0
)
ClipTraining = with_defaults(LoopConfig, steps=2000, batch_size=64, log_every=50, checkpoint_every=500)


class ClipRunConfig(OneSizeConfig):
    """Settings of the training of a CLIP pair, whose text tower can condition a denoiser."""

    output_dir: Place = "runs/clip"
    """Folder for everything that the run writes."""
    data: DataConfig = DataConfig()
    transform: ClipTransform = ClipTransform()
    optimizer: ClipOptimizer = ClipOptimizer()
    training: ClipTraining = Field(default_factory=ClipTraining)
    clip: ClipConfig = ClipConfig()

    @model_validator(mode="after")
    def _has_whole_patches_and_heads(self):
        resolution, clip = self.transform.resolution, self.clip
        if resolution % clip.patch_size:
            raise ValueError(
                f"`transform.resolution` is {resolution}; it must be a multiple of `clip.patch_size`, which is "
                f"{clip.patch_size}."
            )
        if clip.width % clip.heads:
            raise ValueError(f"`clip.width` is {clip.width}; it must be a multiple of `clip.heads` {clip.heads}.")
        return self


class JudgeConfig(Section):
    """The judge."""

    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=10)] = (16, 32, 64, 128)
    """Channels per level; each level halves the resolution."""
    one_sided: tuple[CountOrZero, ...] = ()
    """Classes whose images all face the same way, on which the judged orientation is measured."""
    label_smoothing: Probability = 0.05
    """Share of the target that is spread over all classes."""


JudgeTransform = with_defaults(
    TransformConfig, resolution=64, crop_policy="crop_then_resize", min_crop=0.85, flip_probability=0.0
)
JudgeOptimizer = with_defaults(
    OptimizerConfig, learning_rate=4e-3, schedule="cosine", warmup_steps=100, weight_decay=0.05, ema_decay=0.0
)
JudgeTraining = with_defaults(LoopConfig, steps=1200, batch_size=64, log_every=50, checkpoint_every=400)


class JudgeRunConfig(OneSizeConfig):
    """Settings of the training of a judge, a classifier of what an image shows and whether it is mirrored."""

    output_dir: Place = "runs/judge"
    """Folder for everything that the run writes."""
    data: LabelledDataConfig = LabelledDataConfig()
    transform: JudgeTransform = JudgeTransform()
    optimizer: JudgeOptimizer = JudgeOptimizer()
    training: JudgeTraining = Field(default_factory=JudgeTraining)
    judge: JudgeConfig = JudgeConfig()

    @model_validator(mode="after")
    def _sees_which_way_images_face(self):
        if self.transform.flip_probability:
            raise ValueError(
                f"`transform.flip_probability` is {self.transform.flip_probability:g}; it must be 0, because the "
                "judge learns from each image and its mirror image which way it faces."
            )
        least = 2 ** len(self.judge.widths)
        if self.transform.resolution < least:
            raise ValueError(
                f"`transform.resolution` is {self.transform.resolution}; it must be at least {least}, because "
                f"`judge.widths` {list(self.judge.widths)} halve it {len(self.judge.widths)} times."
            )
        return self
