"""mDT-v2: a DiT that also learns to predict from a part of the patches (Gao et al., 2023)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import DEFAULT_PARTS, ControlPart
from improved_ldm.conditioning.control_embedding import ControlWeight
from improved_ldm.models.dit import DiTBlock
from improved_ldm.models.layers import OutputLayer, PatchEmbedding, initialize
from improved_ldm.models.patch_denoiser import PatchDenoiser
from improved_ldm.models.positions import (
    PositionTransfer,
    RelativePositionBias,
    interpolate_grid,
    relative_offsets,
    resample_grid,
    sincos_beyond,
)
from improved_ldm.models.trunk import ConditioningMode, ControlRoute

MASK_RATIO_SPAN = 0.2  # the fraction of masked patches is random, from the mask ratio to this much more


class MDTBlock(DiTBlock):
    """A DiT block with relative position bias and, if `joins_skip` is set, a long skip connection.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_ratio: Width of the feed-forward divided by `dim`.
        cross_attention: Whether the block reads context tokens (the disentangled mode).
        qk_norm: RMS-normalise queries and keys per head.
        side: Patches per side at training.
        joins_skip: Whether the block reads a skip connection.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        cross_attention: bool,
        qk_norm: bool,
        side: int,
        joins_skip: bool = False,
    ):
        super().__init__(dim, num_heads, mlp_ratio, cross_attention, qk_norm)
        self.position_bias = RelativePositionBias(num_heads, side)
        self.skip_linear = nn.Linear(2 * dim, dim) if joins_skip else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedding: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None,
        encoder_attention_mask: torch.Tensor | None,
        offsets: torch.Tensor,
        grid: tuple[int, int],
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # as DiTBlock, with offsets (tokens, tokens) or (batch, tokens, tokens) and a skip (batch, tokens, dim)
        if self.skip_linear is not None:
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        bias = self.position_bias(offsets, grid)
        return super().forward(hidden_states, embedding, encoder_hidden_states, encoder_attention_mask, bias)


class MDTDenoiser(PatchDenoiser):
    """mDT-v2 with classes or text, disentangled or as published.

    The model has an encoder, whose second half reads skip connections from the first half, and a decoder that reads
    the embedded patches again. Between the two, a side block fills in masked patches during training.

    Args:
        num_layers: Blocks of encoder and decoder together; the encoder must have an even number of blocks.
        num_decoder_layers: Blocks of the decoder.
        position_extent: Coordinates that a side of a square grid spans at initialisation; default: its number of
            patches.
        mask_ratio: Minimum fraction of the patches that the masked pass of a training step leaves out.

    The other arguments are those of `PatchDenoiser` and `Denoiser`.

    Raises:
        ValueError: If sizes are not divisible, or conditions contradict the mode.

    Source: MDTv2; the disentangled mode from Berrada et al., 2024.
    """

    _no_split_modules = ("MDTBlock",)
    _repeated_blocks = ("MDTBlock",)
    _published_text_arguments = ("pooled_dim",)
    _skip_connections = True

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_decoder_layers: int = 4,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        conditioning: ConditioningMode = "disentangled",
        num_classes: int | None = None,
        num_class_tokens: int = 1,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        control_weight: ControlWeight = "cosine",
        control_power: float = 1.0,
        control_parts: tuple[ControlPart, ...] = DEFAULT_PARTS,
        control_route: ControlRoute = "norm",
        num_train_timesteps: int = 1000,
        position_extent: float | None = None,
        mask_ratio: float = 0.3,
    ):
        super().__init__()
        self.check_sizes()
        if not 0 <= mask_ratio < 1 - MASK_RATIO_SPAN:
            raise ValueError(f"`mask_ratio` is {mask_ratio}; it must be in [0, {1 - MASK_RATIO_SPAN}).")
        num_encoder_layers, odd = divmod(num_layers - num_decoder_layers, 2)
        if odd or num_encoder_layers < 0:
            raise ValueError(
                f"`num_layers` {num_layers} - `num_decoder_layers` {num_decoder_layers} must be an even number ≥ 0."
            )
        attends = conditioning == "disentangled" and self.attends
        side = sample_size // patch_size
        block = (hidden_size, num_attention_heads, mlp_ratio, attends, qk_norm, side)

        self.trunk = self.make_trunk(attends)
        self.patch_embedding = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.positions = nn.Parameter(self.computed_positions(side, side))
        self.encoder_blocks = nn.ModuleList(MDTBlock(*block) for _ in range(num_encoder_layers))
        self.encoder_skip_blocks = nn.ModuleList(MDTBlock(*block, joins_skip=True) for _ in range(num_encoder_layers))
        self.decoder_positions = nn.Parameter(self.computed_positions(side, side))
        self.mask_token = nn.Parameter(torch.zeros(hidden_size))
        self.side_block = MDTBlock(*block)
        self.decoder_blocks = nn.ModuleList(MDTBlock(*block, joins_skip=True) for _ in range(num_decoder_layers))
        self.output_layer = OutputLayer(hidden_size, patch_size, out_channels)
        self.gradient_checkpointing = False
        initialize(self)

    computes_positions = False  # they are learned

    def training_passes(
        self, hidden_states: torch.Tensor, level: float, uniform: Callable[[int], torch.Tensor]
    ) -> list[dict[str, Any]]:
        """One pass over the whole latents and one over a random part of their patches; see `Denoiser`.

        Source: MDTv2.
        """
        rows, columns = (side // self.patch_size for side in hidden_states.shape[-2:])
        ratio = self.config.mask_ratio + MASK_RATIO_SPAN * level
        return [{}, {"mask_noise": uniform(rows * columns), "num_kept": int(rows * columns * (1 - ratio))}]

    @staticmethod
    def check_mask(mask_noise: torch.Tensor | None, num_kept: int | None, shape: tuple[int, int]):
        """Raise a ValueError if only one of the two is given, or they do not fit the (batch, tokens) patches."""
        if (mask_noise is None) != (num_kept is None):
            raise ValueError("`mask_noise` and `num_kept` select the patches together; give both or neither.")
        if mask_noise is not None and tuple(mask_noise.shape) != shape:
            raise ValueError(f"`mask_noise` is {tuple(mask_noise.shape)}; it must be {shape}, one number per patch.")
        if num_kept is not None and not 1 <= num_kept <= shape[1]:
            raise ValueError(f"`num_kept` is {num_kept}; it must be from 1 to {shape[1]}.")

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The learned tables, interpolated to another latent size; they cannot be extrapolated.

        Raises:
            ValueError: If `positions` is `extrapolate`.
        """
        if positions == "extrapolate":
            raise ValueError(
                "`positions` is 'extrapolate', but an mDT's positions are learned and can only be interpolated."
            )
        old, new = (size // self.config.patch_size for size in (self.config.sample_size, sample_size))
        tables = {
            name: interpolate_grid(getattr(self, name), (old, old), (new, new))
            for name in ("positions", "decoder_positions")
        }
        biases = {
            f"{name}.table": module.resized(new)
            for name, module in self.named_modules()
            if isinstance(module, RelativePositionBias)
        }
        return {"position_extent": self.position_extent}, {**tables, **biases}

    def positions_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """The encoder's learned positions (rows · columns, dim) of a grid of patches."""
        return self.fitted(self.positions, grid)

    def fitted(self, table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """A learned table (tokens, dim), interpolated if the grid of patches differs from the grid at training.

        A grid that is not square is wider or higher than the table. There the sin-cos positions that the table started
        from continue it.
        """
        side = self.config.sample_size // self.config.patch_size
        if grid == (side, side):
            return table
        beyond = sincos_beyond(*grid, table.shape[-1], self.position_extent, table.device)
        return resample_grid(table, grid, span=math.sqrt(grid[0] * grid[1])) + beyond.to(table.dtype)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        control: torch.Tensor | None = None,
        pooled_projections: torch.Tensor | None = None,
        mask_noise: torch.Tensor | None = None,
        num_kept: int | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the objective's target; see `Denoiser` for arguments and result.

        With `mask_noise` (batch, tokens) the encoder sees only the `num_kept` patches with the lowest noise.
        """
        # inputs: timestep (batch,), grid (rows, columns) of patches
        semantic = (encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels)
        timestep, conditions, grid = self.read_inputs(hidden_states, timestep, *semantic, control)
        self.check_mask(mask_noise, num_kept, (hidden_states.shape[0], grid[0] * grid[1]))

        # conditions: embedding (batch, dim), context (batch, context, dim), context_mask (batch, 1, 1, context)
        embedding, context, context_mask = self.trunk(timestep, conditions)
        offsets = relative_offsets(*grid, hidden_states.device)  # (tokens, tokens)

        def run(block, hidden_states, offsets, skip=None):
            return self.run_block(block, hidden_states, embedding, context, context_mask, offsets, grid, skip)

        # patches: (batch, channels, height, width) → (batch, tokens, dim)
        patches = hidden_states = self.patch_embedding(hidden_states) + self.positions_for(grid)

        # masking: (batch, tokens, dim) → (batch, kept, dim)
        kept, seen_offsets = None, offsets
        if mask_noise is not None:
            kept = mask_noise.argsort(dim=1)[:, :num_kept]  # (batch, kept)
            hidden_states = hidden_states.gather(1, kept[..., None].expand(-1, -1, hidden_states.shape[-1]))
            seen_offsets = offsets[kept[:, :, None], kept[:, None]]  # (batch, kept, kept)

        # encoder: the second half joins the states of the first half, last first
        skips = []
        for block in self.encoder_blocks:
            hidden_states = run(block, hidden_states, seen_offsets)
            skips.append(hidden_states)
        for block in self.encoder_skip_blocks:
            hidden_states = run(block, hidden_states, seen_offsets, skips.pop())

        # side interpolater: (batch, kept, dim) → (batch, tokens, dim), which replaces masked patches only
        decoder_positions = self.fitted(self.decoder_positions, grid)
        if kept is None:
            hidden_states = hidden_states + decoder_positions
        else:
            index = kept[..., None].expand_as(hidden_states)
            mask_tokens = self.mask_token.to(hidden_states.dtype).expand_as(patches)
            filled = mask_tokens.scatter(1, index, hidden_states) + decoder_positions
            is_kept = torch.zeros_like(mask_noise, dtype=torch.bool).scatter(1, kept, True)
            hidden_states = torch.where(is_kept[..., None], filled, run(self.side_block, filled, offsets))

        # decoder: every block joins the embedded patches
        for block in self.decoder_blocks:
            hidden_states = run(block, hidden_states, offsets, patches)

        # output: (batch, tokens, dim) → (batch, out_channels, height, width)
        sample = self.output_layer(hidden_states, embedding, grid)
        return self.output(sample, return_dict)
