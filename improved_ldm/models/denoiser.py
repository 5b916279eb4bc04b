"""What the denoisers share: the contract of `forward`, and the trunk: conditions to embedding and tokens."""

from typing import Literal

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from improved_ldm.conditioning.control import ControlEmbedding, null_control
from improved_ldm.models.positions import sincos_grid

ConditioningMode = Literal["disentangled", "published"]
TIMESTEP_FEATURES = 256


class ConditioningTrunk(nn.Module):
    """Timestep, control, class and text of a batch → the embedding that modulates and the tokens that are attended to.

    `disentangled`: the embedding carries timestep and control, `e(t, c) = e_time(t) + E_h(φ_h) + γ_c(t) E_l(φ_l)`;
    class and text are tokens only. `published`: class and pooled text are added to the embedding, there is no control,
    and the tokens are there if the backbone attends to them.

    Args:
        dim: channels of the embedding and of the tokens.
        conditioning: `disentangled` or `published`.
        attends: whether the backbone attends to semantic tokens.
        num_classes: classes, for a class-conditional model.
        num_class_tokens: tokens a class gives.
        text_dim: channels of the text encoder's tokens, for a text-conditional model.
        pooled_dim: channels of the pooled text, which only the published mode reads.
        control_weight: kind of γ_c.
        control_power: α of γ_c.
        num_train_timesteps: T.

    Raises:
        ValueError: for semantic conditions that the mode does not read.

    Source: Berrada et al., 2024.
    """

    def __init__(
        self,
        dim: int,
        conditioning: ConditioningMode,
        attends: bool,
        num_classes: int | None,
        num_class_tokens: int,
        text_dim: int | None,
        pooled_dim: int | None,
        control_weight: str,
        control_power: float,
        num_train_timesteps: int,
    ):
        super().__init__()
        published = conditioning == "published"
        if conditioning not in ("disentangled", "published"):
            raise ValueError(f"`conditioning` is {conditioning!r}; it must be 'disentangled' or 'published'.")
        if num_classes is not None and text_dim is not None:
            raise ValueError("`num_classes` and `text_dim` are both set; a denoiser reads classes or text.")
        if pooled_dim is not None and not published:
            raise ValueError("`pooled_dim` is set, but pooled text enters the embedding in 'published' mode only.")
        if text_dim is not None and not attends:
            raise ValueError("`text_dim` is set, but this denoiser attends to text in 'disentangled' mode only.")
        self.dim, self.pooled_dim = dim, pooled_dim
        self.num_classes, self.num_class_tokens = num_classes, num_class_tokens

        self.time_embedding = TimestepEmbedding(TIMESTEP_FEATURES, dim)
        self.control_embedding = (
            None if published else ControlEmbedding(dim, control_weight, control_power, num_train_timesteps)
        )
        has_class = num_classes is not None
        self.class_embedding = nn.Embedding(num_classes + 1, dim) if published and has_class else None
        self.class_tokens = nn.Embedding(num_classes + 1, num_class_tokens * dim) if attends and has_class else None
        self.pooled_embedding = None if pooled_dim is None else TimestepEmbedding(pooled_dim, dim)
        self.text_projection = None if text_dim is None else nn.Linear(text_dim, dim)
        self.null_text = None if text_dim is None else nn.Parameter(torch.zeros(text_dim))

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the conditions that are read."""
        read = {
            "encoder_hidden_states": self.text_projection is not None,
            "encoder_attention_mask": self.text_projection is not None,
            "class_labels": self.num_classes is not None,
            "control": self.control_embedding is not None,
            "pooled_projections": self.pooled_embedding is not None,
        }
        return frozenset(name for name, is_read in read.items() if is_read)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        class_labels: torch.Tensor | None,
        control: torch.Tensor | None,
        pooled_projections: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The embedding (batch, dim), the tokens (batch, tokens, dim) and their mask (batch, 1, 1, tokens)."""
        batch_size, device, dtype = len(hidden_states), hidden_states.device, self.time_embedding.linear_1.weight.dtype
        timestep = torch.as_tensor(timestep, device=device).expand(batch_size)
        if class_labels is None and self.num_classes is not None:
            class_labels = torch.full((batch_size,), self.num_classes, device=device)

        features = get_timestep_embedding(
            timestep, TIMESTEP_FEATURES, flip_sin_to_cos=True, downscale_freq_shift=0
        )  # (batch, 256)
        embedding = self.time_embedding(features.to(dtype))  # (batch, dim)
        if self.control_embedding is not None:
            if control is None:
                control = null_control(batch_size, device)
            embedding = embedding + self.control_embedding(control, timestep)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        if self.pooled_embedding is not None:
            if pooled_projections is None:
                pooled_projections = torch.full((batch_size, self.pooled_dim), torch.nan, device=device)
            is_null = pooled_projections.isnan().all(-1, keepdim=True)
            embedding = embedding + self.pooled_embedding(torch.where(is_null, 0, pooled_projections).to(dtype))

        if self.class_tokens is not None:
            return embedding, self.class_tokens(class_labels).unflatten(-1, (self.num_class_tokens, self.dim)), None
        if self.text_projection is None:
            return embedding, None, None
        if encoder_hidden_states is None:
            encoder_hidden_states = torch.full((batch_size, 1, 1), torch.nan, device=device)
        is_null = encoder_hidden_states.isnan().all(-1, keepdim=True)
        text = torch.where(is_null, self.null_text, encoder_hidden_states.to(dtype))
        mask = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None].bool()
        return embedding, self.text_projection(text), mask  # (batch, tokens, dim)


class Denoiser(ModelMixin, ConfigMixin, AttentionMixin, CacheMixin, PeftAdapterMixin):
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
    that is None is a single null token); one that the model does not read is an error.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ("patch_embedding", "trunk", "norm")

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

    def make_trunk(self, attends: bool) -> ConditioningTrunk:
        """The trunk that the model's config describes."""
        config = self.config
        return ConditioningTrunk(
            config.hidden_size,
            config.conditioning,
            attends,
            config.num_classes,
            config.num_class_tokens,
            config.text_dim,
            config.pooled_dim,
            config.control_weight,
            config.control_power,
            config.num_train_timesteps,
        )

    def check_inputs(self, hidden_states: torch.Tensor, **conditions: torch.Tensor | None) -> tuple[int, int]:
        """The grid of patches (rows, columns) of valid inputs.

        Raises:
            ValueError: where the latents do not divide into patches or a condition would be ignored.
        """
        patch_size = self.config.patch_size
        height, width = hidden_states.shape[-2:]
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"`hidden_states` is {height}x{width} latent pixels; "
                f"both sides must be divisible by the patch size {patch_size}."
            )
        for name, value in conditions.items():
            if value is not None and name not in self.inputs:
                raise ValueError(
                    f"`{name}` is given, but this {type(self).__name__} reads {', '.join(sorted(self.inputs))} only."
                )
        return height // patch_size, width // patch_size

    def register_positions(self):
        """Keep the position embeddings of the configured latent size."""
        side = self.config.sample_size // self.config.patch_size
        self.register_buffer("positions", self._positions(side, side), persistent=False)

    def _positions(self, rows: int, columns: int) -> torch.Tensor:
        extent = self.config.position_extent or self.config.sample_size / self.config.patch_size
        return sincos_grid(rows, columns, self.config.hidden_size, extent)

    def positions_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (rows · columns, dim) of a grid of patches in the model's coordinate range."""
        side = self.config.sample_size // self.config.patch_size
        positions = self.positions
        if grid != (side, side):
            positions = self._positions(*grid).to(positions.device)
        # loading in half precision converts parameters, not buffers
        return positions.to(self.patch_embedding.proj.weight.dtype)

    def run_block(self, block: nn.Module, *args):
        """A block's output, recomputed in the backward pass where gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    @staticmethod
    def output(sample: torch.Tensor, return_dict: bool):
        """The prediction in the form that the caller asked for."""
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
