"""The base class of the denoisers: the contract of `forward`, its checks, and copies with another config or size."""

import copy
from collections.abc import Callable
from typing import Any, get_args

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.loading import CheckedModel
from improved_ldm.models.adapters import AdapterMixin
from improved_ldm.models.caches import CachingMixin
from improved_ldm.models.fusion import FusingMixin
from improved_ldm.models.positions import PositionTransfer
from improved_ldm.models.published import PublishedForm
from improved_ldm.models.trunk import ConditioningMode, ConditioningTrunk

GIVE_TOKENS = "set `num_classes`, `text_dim`, or `control_route` to 'tokens'"


class Denoiser(CheckedModel, FusingMixin, ModelMixin, ConfigMixin, CachingMixin, AdapterMixin):
    """Base class of the denoisers. All of them implement this contract:

    `forward(hidden_states, timestep, encoder_hidden_states=None, encoder_attention_mask=None, class_labels=None,
    control=None, pooled_projections=None, attention_kwargs=None, return_dict=True)` with

    - `hidden_states` (batch, latent_channels, height, width),
    - `timestep` (batch,) or scalar, in the scheduler's units,
    - `encoder_hidden_states` (batch, tokens, text_dim), where a row of NaN is the null prompt,
    - `encoder_attention_mask` (batch, tokens) bool, or None to attend to every token,
    - `class_labels` (batch,) int, where `num_classes` is the null class,
    - `control` (batch, n_control) float32, where NaN is unknown and a row of NaN is the null control,
    - `pooled_projections` (batch, pooled_dim), where a row of NaN is the null prompt,

    and an output whose `.sample` is (batch, out_channels, height, width). None stands for the null condition. A
    condition that the model does not read raises an error.

    Arguments that the constructors share:

    Args:
        sample_size: Latent pixels per side at training.
        in_channels: Latent channels.
        out_channels: Channels of the prediction; twice `in_channels` if the variance is learned.
        conditioning: `disentangled` (the timestep and the control modulate, class or text is attended to) or
            `published` (the timestep and the conditions that the backbone's authors add to it modulate; no control).
        num_classes: Number of classes, or None.
        num_class_tokens: Tokens per class, if the backbone attends to them.
        text_dim: Channels of the text tokens, or None.
        pooled_dim: Channels of the pooled text that the published mode adds to the timestep, or None.
        control_weight: Kind of γ_c: `cosine`, `linear`, `constant` or `zero`.
        control_power: α of the cosine ramp.
        control_parts: Parts of the control that the disentangled mode reads, such as `size`, `crop` and `flip`; empty
            for no control.
        control_route: How the control enters: `norm` adds it to the embedding that modulates, `tokens` turns it into
            two tokens that are attended to; see `DisentangledTrunk`. The published mode has `norm` only.
        num_train_timesteps: T.
        published: How a published checkpoint differs from the family's own form, as the fields of `published_form`;
            a disentangled model that started from such a checkpoint keeps them. None for no difference.
    """

    component = "transformer"  # name in the pipeline

    _supports_gradient_checkpointing = True
    # which of `text_dim` and `pooled_dim` a text-conditional model in the published mode uses
    _published_text_arguments: tuple[str, ...] = ("text_dim", "pooled_dim")

    published_form: type[PublishedForm] = PublishedForm
    trunk: ConditioningTrunk

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs) -> tuple[dict, dict, dict]:
        """Split a config into the constructor's arguments, unused values and hidden values."""
        return super().extract_init_dict(cls.published_form.gather(config_dict), **kwargs)

    @property
    def published(self) -> PublishedForm:
        """How the model differs from the family's own form."""
        return self.published_form.read(self.config.get("published"))

    @property
    def attends(self) -> bool:
        """Whether there are tokens to attend to in the disentangled mode: from a class, a text or the control."""
        config = self.config
        control = config.control_route == "tokens" and bool(config.control_parts)
        return control or config.num_classes is not None or config.text_dim is not None

    @classmethod
    def text_arguments(cls, conditioning: ConditioningMode) -> tuple[str, ...]:
        """Which of the constructor's `text_dim` and `pooled_dim` a text-conditional model uses in a mode."""
        return cls._published_text_arguments if conditioning == "published" else ("text_dim",)

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the conditions that the model reads."""
        return self.trunk.inputs

    @property
    def predicts_variance(self) -> bool:
        """Whether the channels after those of the latents predict the variance of ancestral steps."""
        return self.config.out_channels == 2 * self.config.in_channels

    @property
    def computes_positions(self) -> bool:
        """Whether positions of grids that are not square are always computed, and never interpolated."""
        return False

    @property
    def null_keeps_mask(self) -> bool:
        """Whether the null prompt is attended to with the mask of the prompt, as in PixArt-α, or in whole."""
        return self.config.conditioning == "published"

    @property
    def patch_size(self) -> int:
        """Number that each side of the latents must be divisible by."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """Width and depth in words."""
        raise NotImplementedError

    def training_passes(
        self, hidden_states: torch.Tensor, level: float, uniform: Callable[[int], torch.Tensor]
    ) -> list[dict[str, Any]]:
        """The forward passes of a training step, each as additional arguments of `forward`; the loss is their sum.

        Every pass has its own noise and its own dropped conditions.

        Args:
            hidden_states: (batch, channels, height, width) latents.
            level: Random number in (0, 1), the same for all images of a step on all processes.
            uniform: Function from n to (batch, n) random numbers in (0, 1), where each row depends on its image only.
        """
        return [{}]

    @property
    def control_inputs(self) -> frozenset[str]:
        """Names of the control's fields that the model reads."""
        return self.trunk.control_inputs

    def enable_layerwise_casting(
        self, storage_dtype: torch.dtype = torch.float8_e4m3fn, compute_dtype: torch.dtype | None = None, **settings
    ):
        """Store weights in a small dtype and compute in the model's dtype; further settings are those of diffusers.

        Raises:
            ValueError: If `compute_dtype` is not the model's dtype, in which layers that are not cast stay.
        """
        if compute_dtype is not None and compute_dtype != self.dtype:
            raise ValueError(
                f"`compute_dtype` is {compute_dtype}, but the {type(self).__name__} is in {self.dtype}; "
                f"call `to({compute_dtype})` before `enable_layerwise_casting`."
            )
        super().enable_layerwise_casting(storage_dtype, compute_dtype, **settings)

    def check_inputs(self, hidden_states: torch.Tensor, conditions: Conditioning) -> tuple[int, int]:
        """Check the inputs and return their grid of patches (rows, columns).

        Raises:
            ValueError: If the latents do not divide into patches, or a condition would be ignored or broadcast.
        """
        patch_size = self.patch_size
        height, width = hidden_states.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"`hidden_states` has {height}x{width} latent pixels; "
                f"both sides must be divisible by the patch size {patch_size}."
            )
        for name, value in conditions.kwargs().items():
            if value is not None and name not in self.inputs:
                raise ValueError(
                    f"`{name}` is given, but this {type(self).__name__} reads only {', '.join(sorted(self.inputs))}."
                )
            if value is not None and (not isinstance(value, torch.Tensor) or value.ndim == 0):
                raise ValueError(f"`{name}` is {value!r}; it must be a tensor with one row per image.")
            if value is not None and value.shape[0] != hidden_states.shape[0]:
                raise ValueError(f"`{name}` has {len(value)} rows; it must have one per image, {len(hidden_states)}.")
        labels = conditions.class_labels
        if labels is not None and (labels.dtype not in (torch.int32, torch.int64) or labels.ndim != 1):
            raise ValueError(
                f"`class_labels` is {labels.dtype} of shape {tuple(labels.shape)}; it must be int64 or int32 of shape "
                f"({len(hidden_states)},), from 0 to {self.config.num_classes}, which is the null class."
            )
        return height // patch_size, width // patch_size

    def read_inputs(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor | float, *conditions: torch.Tensor | None
    ) -> tuple[torch.Tensor, Conditioning, tuple[int, int]]:
        """Check the arguments of `forward`.

        Args:
            hidden_states: (batch, channels, height, width) latents.
            timestep: (batch,) or scalar.
            conditions: The fields of `Conditioning`, in their order.

        Returns:
            The timestep (batch,), the conditions, and the grid of patches (rows, columns).

        Raises:
            ValueError: As `check_inputs`.
        """
        conditions = Conditioning(*conditions)
        grid = self.check_inputs(hidden_states, conditions)
        timestep = torch.as_tensor(timestep, device=hidden_states.device).expand(hidden_states.shape[0])
        return timestep, conditions, grid

    def added_sizes(
        self,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        names: tuple[str, ...],
        control: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The `sizes` (batch, n) of a `PublishedTrunk`, if a call gives them as numbers under these names.

        Raises:
            ValueError: If the names differ, the model reads no such sizes, or a control is given as well.
        """
        if added_cond_kwargs is None:
            return {}
        if "control" not in self.inputs or self.config.conditioning != "published":
            raise ValueError(f"`added_cond_kwargs` is given, but this {type(self).__name__} reads no published sizes.")
        if control is not None:
            raise ValueError("`control` and `added_cond_kwargs` are both given; give one of them.")
        if set(added_cond_kwargs) != set(names):
            raise ValueError(
                f"`added_cond_kwargs` has {', '.join(added_cond_kwargs)}; it must have {', '.join(names)}."
            )
        return {"sizes": torch.cat([added_cond_kwargs[name] for name in names], dim=1)}

    def remade(self, **config) -> "Denoiser":
        """A new model of the same class with some config values replaced; dtype, device and modes are the same.

        Raises:
            ValueError: If the model has adapters, or its weights are offloaded.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(f"the denoiser has adapters ({', '.join(self.peft_config)}); fuse or unload them first.")
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("the denoiser's weights are offloaded; disable offloading first.")
        values = {name: value for name, value in self.config.items() if not name.startswith("_")}
        denoiser = type(self)(**{**values, **config})
        denoiser.type(self.dtype).to(self.device).train(self.training)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            denoiser.requires_grad_(False)
        if self.is_gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        return denoiser

    def resized(self, sample_size: int, positions: PositionTransfer) -> "Denoiser":
        """A copy of the model for latents of another size.

        Args:
            sample_size: Latent pixels per side.
            positions: How the positions of patches change: `resample` recomputes them in the coordinate range of the
                old grid, `interpolate` interpolates the old ones, `extrapolate` continues beyond the old range with
                the same spacing, and `keep` applies the config's own rule. Learned tables are interpolated.

        Raises:
            ValueError: If `positions` is unknown, or does not work for the model's positions.

        Source: Berrada et al., 2024; learned tables: our choice.
        """
        if positions not in get_args(PositionTransfer):
            raise ValueError(
                f"`positions` is {positions!r}; it must be one of {', '.join(get_args(PositionTransfer))}."
            )
        if sample_size == self.config.sample_size:
            return copy.deepcopy(self)
        config, tensors = self.resized_positions(sample_size, positions)
        denoiser = self.remade(sample_size=sample_size, **config)
        computed = {name: buffer for name, buffer in denoiser.named_buffers() if name == "positions"}
        denoiser.load_state_dict({**self.state_dict(), **computed, **tensors})
        return denoiser

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config values and tensors of positions for another latent size; none by default."""
        return {}, {}

    def run_block(self, block: nn.Module, *args):
        """A block's output, recomputed in the backward pass if gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    @staticmethod
    def output(sample: torch.Tensor, return_dict: bool):
        """The prediction as an output object, or as a tuple if `return_dict` is False."""
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
