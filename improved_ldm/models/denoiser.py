"""What the denoisers share: the contract of `forward`, and for the transformers patches, positions and the trunk."""

import copy
from typing import Any, Literal, get_args

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.loading import CheckedModel
from improved_ldm.models.positions import interpolate_grid, sincos_grid
from improved_ldm.models.trunk import ConditioningMode, ConditioningTrunk, PooledEmbedding

PositionTransfer = Literal["resample", "interpolate", "extrapolate", "keep"]


class Denoiser(CheckedModel, ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
    """Base of the denoisers. Each keeps this contract:

    `forward(hidden_states, timestep, encoder_hidden_states=None, encoder_attention_mask=None, class_labels=None,
    control=None, pooled_projections=None, attention_kwargs=None, return_dict=True)` with

    - `hidden_states` (batch, latent_channels, height, width),
    - `timestep` (batch,) or scalar, in the scheduler's units,
    - `encoder_hidden_states` (batch, tokens, text_dim), a row of NaN is the null prompt,
    - `encoder_attention_mask` (batch, tokens) bool, or None where every token counts,
    - `class_labels` (batch,) int, `num_classes` is the null class,
    - `control` (batch, n_control) float32, a row of NaN is the null control,
    - `pooled_projections` (batch, pooled_dim), a row of NaN is the null prompt,

    and an output whose `.sample` is (batch, out_channels, height, width). A condition that is None is null (a text
    that is None is the null text); one that the model does not read is an error.
    """

    component = "transformer"  # name in the pipeline

    _supports_gradient_checkpointing = True
    # which of `text_dim` and `pooled_dim` a text-conditional model of the published mode takes
    _published_text_arguments: tuple[str, ...] = ("text_dim", "pooled_dim")

    trunk: ConditioningTrunk

    @classmethod
    def text_arguments(cls, conditioning: ConditioningMode) -> tuple[str, ...]:
        """Which of the constructor's `text_dim` and `pooled_dim` make a text-conditional model in a mode."""
        return cls._published_text_arguments if conditioning == "published" else ("text_dim",)

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the conditions that the model reads."""
        return self.trunk.inputs

    @property
    def patch_size(self) -> int:
        """What a side of the latents must be divisible by."""
        raise NotImplementedError

    @property
    def summary(self) -> str:
        """Width and depth in words."""
        raise NotImplementedError

    def training_passes(
        self, hidden_states: torch.Tensor, level: float, generator: torch.Generator
    ) -> list[dict[str, Any]]:
        """The forward passes of a training step, each as further arguments of `forward`; the loss is their mean.

        Args:
            hidden_states: (batch, channels, height, width) latents.
            level: random number in [0, 1), one a step, for what its micro-batches must agree on.
            generator: of what is drawn for each image, in their order.
        """
        return [{}]

    @property
    def control_inputs(self) -> frozenset[str]:
        """Names of the fields of the control that the model reads."""
        return self.trunk.control_inputs

    def check_inputs(self, hidden_states: torch.Tensor, conditions: Conditioning) -> tuple[int, int]:
        """The grid of patches (rows, columns) of valid inputs.

        Raises:
            ValueError: where the latents do not divide into patches, or a condition would be ignored or spread.
        """
        patch_size = self.patch_size
        height, width = hidden_states.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"`hidden_states` is {height}x{width} latent pixels; "
                f"both sides must be divisible by the patch size {patch_size}."
            )
        for name, value in conditions.kwargs().items():
            if value is not None and name not in self.inputs:
                raise ValueError(
                    f"`{name}` is given, but this {type(self).__name__} reads {', '.join(sorted(self.inputs))} only."
                )
            if value is not None and len(value) != len(hidden_states):
                raise ValueError(f"`{name}` has {len(value)} rows; it must have one for each of {len(hidden_states)}.")
        return height // patch_size, width // patch_size

    def added_sizes(
        self,
        added_cond_kwargs: dict[str, torch.Tensor] | None,
        names: tuple[str, ...],
        control: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The published model's sizes (batch, n), where a call gives them as numbers of these names.

        Raises:
            ValueError: for other names, a model that reads no such sizes, or a control beside them.
        """
        if added_cond_kwargs is None:
            return None
        if "control" not in self.inputs or self.config.conditioning != "published":
            raise ValueError(f"`added_cond_kwargs` is given, but this {type(self).__name__} reads no published sizes.")
        if control is not None:
            raise ValueError("`control` and `added_cond_kwargs` are both given; give the sizes once.")
        if set(added_cond_kwargs) != set(names):
            raise ValueError(
                f"`added_cond_kwargs` has {', '.join(added_cond_kwargs)}; it must have {', '.join(names)}."
            )
        return torch.cat([added_cond_kwargs[name] for name in names], dim=1)

    def remade(self, **config) -> "Denoiser":
        """A fresh model of the same class with other values in its config; dtype, device and modes are the same.

        Raises:
            ValueError: for a model with adapters, or one whose weights are offloaded.
        """
        if getattr(self, "peft_config", None):
            raise ValueError(f"the denoiser has adapters ({', '.join(self.peft_config)}); fuse or unload them first.")
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("the denoiser's weights are offloaded; take the offloading off first.")
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
            sample_size: latent pixels a side.
            positions: what becomes of the positions of patches: `resample` recomputes them on the coordinates of the
                old grid, `interpolate` interpolates the old ones, `extrapolate` goes on past them at the old step, and
                `keep` leaves the config's own rule alone. Learned tables are interpolated.

        Raises:
            ValueError: for another word, or a way that the model's positions cannot go.

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
        """Config values and tensors of positions for another latent size; here there are none."""
        return {}, {}

    def run_block(self, block: nn.Module, *args):
        """A block's output, recomputed in the backward pass where gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    @staticmethod
    def output(sample: torch.Tensor, return_dict: bool):
        """The prediction in the form that the caller asked for."""
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class PatchDenoiser(Denoiser):
    """Base of the transformers over latent patches, in one width throughout."""

    _skip_layerwise_casting_patterns = ("patch_embedding", "trunk", "norm")

    @property
    def patch_size(self) -> int:
        """Latent pixels a side of a patch."""
        return self.config.patch_size

    @property
    def summary(self) -> str:
        """Width, depth and patch in words."""
        config = self.config
        return f"{config.hidden_size} channels, {config.num_layers} blocks, patches of {config.patch_size}"

    def check_sizes(self):
        """Raise a ValueError where the width does not divide into heads or positions, or the latents into patches."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        side, patch_size = self.config.sample_size, self.config.patch_size
        if side % patch_size:
            raise ValueError(f"`sample_size` {side} must be divisible by `patch_size` {patch_size}.")
        if width % heads:
            raise ValueError(f"`hidden_size` {width} must be divisible by `num_attention_heads` {heads}.")
        if width % 4:
            raise ValueError(f"`hidden_size` {width} must be divisible by 4, the parts of a sin-cos position.")

    def make_trunk(self, attends: bool, **parts) -> ConditioningTrunk:
        """The trunk that the model's config describes; `parts` are further arguments of it."""
        config = self.config
        if config.get("pooled_dim") is not None:
            parts["added_embedding"] = PooledEmbedding(config.hidden_size, config.pooled_dim)
        return ConditioningTrunk(config, config.hidden_size, config.hidden_size, attends, **parts)

    def register_positions(self):
        """Keep the position embeddings of the configured latent size; they travel with the weights."""
        side = self.config.sample_size // self.config.patch_size
        self.register_buffer("positions", self.computed_positions(side, side))

    def computed_positions(self, rows: int, columns: int) -> torch.Tensor:
        """Sin-cos embeddings (rows · columns, dim) of a grid in the model's coordinate range."""
        extent = self.config.position_extent or self.config.sample_size / self.config.patch_size
        return sincos_grid(rows, columns, self.config.hidden_size, extent)

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config values and tensors of positions for another latent size."""
        old, new = (size // self.config.patch_size for size in (self.config.sample_size, sample_size))
        extent = self.config.position_extent or old
        if positions == "resample":
            return {"position_extent": extent}, {}
        if positions == "interpolate":
            table = interpolate_grid(self.positions, (old, old), (new, new))
            return {"position_extent": extent}, {"positions": table}
        return ({"position_extent": extent * new / old} if positions == "extrapolate" else {}), {}

    def positions_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (rows · columns, dim) of a grid of patches."""
        side = self.config.sample_size // self.config.patch_size
        return self.positions if grid == (side, side) else self.computed_positions(*grid).to(self.positions)
