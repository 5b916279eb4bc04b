"""mDT-v2: a DiT that also learns to predict from a part of the patches (Gao et al., 2023)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import CONTROL_PARTS, ControlPart
from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.models.denoiser import PatchDenoiser, PositionTransfer
from improved_ldm.models.dit import DiTBlock
from improved_ldm.models.layers import OutputLayer, PatchEmbedding, initialize
from improved_ldm.models.positions import RelativePositionBias, interpolate_grid, relative_offsets

MASK_RATIO_SPAN = 0.2  # the share of masked patches is drawn between the mask ratio and this much more
MASK_RATIO_STEPS = 8  # from so many values, so that a compiled model meets few lengths


class MDTBlock(DiTBlock):
    """A DiT block with relative position bias, and a long skip connection where it joins one.

    Args:
        dim: channels.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward over `dim`.
        cross_attention: whether the block reads semantic tokens (the disentangled mode).
        qk_norm: RMS-normalise queries and keys.
        side: patches a side at training.
        joins_skip: whether the block reads a skip connection.
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

    An encoder, whose second half reads skip connections from its first, a decoder that reads the embedded patches
    again, and for training a side block that stands in for masked patches between the two.

    Args:
        sample_size: latent pixels a side at training.
        in_channels: latent channels.
        out_channels: channels of the prediction; twice `in_channels` where the variance is learned.
        patch_size: latent pixels a side of a patch.
        hidden_size: channels of a token, divisible by `num_attention_heads` and 4.
        num_layers: blocks of encoder and decoder; an even number of them is the encoder.
        num_decoder_layers: blocks of the decoder.
        num_attention_heads: heads.
        mlp_ratio: width of the feed-forward over `hidden_size`.
        qk_norm: RMS-normalise queries and keys.
        conditioning: `disentangled` (cross-attention to semantic tokens; timestep and control modulate) or
            `published` (class or pooled text added to the timestep; no control).
        num_classes: classes, or None.
        num_class_tokens: tokens a class gives in the disentangled mode.
        text_dim: channels of the text tokens, or None.
        pooled_dim: channels of the pooled text that the published mode adds to the timestep, or None.
        control_weight: kind of γ_c: `cosine`, `linear`, `constant`, `zero`.
        control_power: α of the cosine ramp.
        control_parts: of the control that the disentangled mode reads: `size`, `crop`, `flip`; none reads no control.
        num_train_timesteps: T.
        position_extent: coordinates that a side of the grid spans at the start; default: its patches.
        mask_ratio: least share of the patches that the masked pass of a training step leaves out.

    Raises:
        ValueError: for sizes that do not divide, or conditions that contradict the mode.

    Source: MDTv2; the disentangled mode from Berrada et al., 2024.
    """

    _no_split_modules = ("MDTBlock",)
    _repeated_blocks = ("MDTBlock",)
    _published_text_arguments = ("pooled_dim",)

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
        conditioning: str = "disentangled",
        num_classes: int | None = None,
        num_class_tokens: int = 1,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        control_weight: str = "cosine",
        control_power: float = 1.0,
        control_parts: tuple[ControlPart, ...] = CONTROL_PARTS,
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
                f"`num_layers` {num_layers} less `num_decoder_layers` {num_decoder_layers} must be an even number ≥ 0."
            )
        attends = conditioning == "disentangled" and (num_classes is not None or text_dim is not None)
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

    def training_passes(
        self, hidden_states: torch.Tensor, level: float, generator: torch.Generator
    ) -> list[dict[str, Any]]:
        """The whole latents, and a random part of their patches; arguments as `Denoiser` says.

        Source: MDTv2; the steps of the mask ratio are our choice.
        """
        rows, columns = (side // self.patch_size for side in hidden_states.shape[-2:])
        step = int(level * (MASK_RATIO_STEPS + 1))
        noise = torch.rand(len(hidden_states), rows * columns, generator=generator, device=generator.device)
        ratio = self.config.mask_ratio + MASK_RATIO_SPAN * step / MASK_RATIO_STEPS
        return [{}, {"mask_noise": noise, "num_kept": int(rows * columns * (1 - ratio))}]

    @staticmethod
    def check_mask(mask_noise: torch.Tensor | None, num_kept: int | None, shape: tuple[int, int]):
        """Raise a ValueError where only one of the two is given, or they do not fit the (batch, tokens) patches."""
        if (mask_noise is None) != (num_kept is None):
            raise ValueError(
                "`mask_noise` and `num_kept` say together which patches are kept; one of them is missing."
            )
        if mask_noise is not None and tuple(mask_noise.shape) != shape:
            raise ValueError(f"`mask_noise` is {tuple(mask_noise.shape)}; it must be {shape}, a number a patch.")
        if num_kept is not None and not 1 <= num_kept <= shape[1]:
            raise ValueError(f"`num_kept` is {num_kept}; it must be from 1 to {shape[1]}.")

    def enable_cache(self, config):
        """Refuse: diffusers' caches skip blocks, which leaves the skip connections without an end."""
        raise ValueError("an mDT's blocks are joined by skip connections; diffusers' caches do not fit it.")

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The learned tables, interpolated to another latent size; they do not go on past their edge.

        Raises:
            ValueError: for `extrapolate`.
        """
        if positions == "extrapolate":
            raise ValueError(
                "`positions` is 'extrapolate', but an mDT's positions are learned: they are interpolated."
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
        return {}, {**tables, **biases}

    def positions_for(self, grid: tuple[int, int], positions: torch.Tensor) -> torch.Tensor:
        """A learned table (tokens, dim) for a grid of patches, interpolated where it differs from that of training."""
        side = self.config.sample_size // self.config.patch_size
        return positions if grid == (side, side) else interpolate_grid(positions, (side, side), grid)

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
        """Predict the objective's target; arguments and result as `Denoiser` says.

        With `mask_noise` (batch, tokens) the encoder sees only the `num_kept` patches of least noise.
        """
        conditions = Conditioning(
            encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels, control
        )
        grid = self.check_inputs(hidden_states, conditions)  # (rows, columns) of patches
        self.check_mask(mask_noise, num_kept, (len(hidden_states), grid[0] * grid[1]))

        # conditions: embedding (batch, dim), context (batch, context, dim), context_mask (batch, 1, 1, context)
        embedding, context, context_mask = self.trunk(hidden_states, timestep, conditions)
        offsets = relative_offsets(*grid, hidden_states.device)  # (tokens, tokens)

        def run(block, hidden_states, offsets, skip=None):
            return self.run_block(block, hidden_states, embedding, context, context_mask, offsets, grid, skip)

        # patches: (batch, channels, height, width) → (batch, tokens, dim)
        patches = hidden_states = self.patch_embedding(hidden_states) + self.positions_for(grid, self.positions)

        # masking: (batch, tokens, dim) → (batch, kept, dim)
        kept, seen_offsets = None, offsets
        if mask_noise is not None:
            kept = mask_noise.argsort(dim=1)[:, :num_kept]  # (batch, kept)
            hidden_states = hidden_states.gather(1, kept[..., None].expand(-1, -1, hidden_states.shape[-1]))
            seen_offsets = offsets[kept[:, :, None], kept[:, None]]  # (batch, kept, kept)

        # encoder: the second half joins what the first half made, last first
        skips = []
        for block in self.encoder_blocks:
            hidden_states = run(block, hidden_states, seen_offsets)
            skips.append(hidden_states)
        for block in self.encoder_skip_blocks:
            hidden_states = run(block, hidden_states, seen_offsets, skips.pop())

        # side interpolater: (batch, kept, dim) → (batch, tokens, dim), which replaces masked patches only
        decoder_positions = self.positions_for(grid, self.decoder_positions)
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
