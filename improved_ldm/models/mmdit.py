"""mmDiT: image tokens and context tokens in two streams that attend to each other (Esser et al., 2024)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import DEFAULT_PARTS, ControlPart
from improved_ldm.conditioning.control_embedding import ControlWeight
from improved_ldm.models.denoiser import GIVE_TOKENS
from improved_ldm.models.layers import (
    Attention,
    JointAttention,
    ModulatedNorm,
    Modulation,
    OutputLayer,
    PatchEmbedding,
    initialize,
    register_block,
)
from improved_ldm.models.patch_denoiser import PatchDenoiser
from improved_ldm.models.published import PositionTable, PublishedMMDiT
from improved_ldm.models.trunk import ConditioningMode, ControlRoute


class MMDiTBlock(nn.Module):
    """Joint attention of two streams, then a feed-forward for each; every stream is modulated by its own vectors.

    Args:
        dim: Channels of both streams.
        num_heads: Attention heads.
        mlp_ratio: Width of the feed-forward divided by `dim`.
        qk_norm: RMS-normalise queries and keys per head.
        context_pre_only: Whether the context is read but not updated (the last block).
        dual_attention: Whether the image tokens, besides joint attention, have an attention over themselves only.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        context_pre_only: bool,
        dual_attention: bool = False,
    ):
        super().__init__()
        self.context_pre_only = context_pre_only
        self.modulation = Modulation(dim, 9 if dual_attention else 6)
        self.context_modulation = Modulation(dim, 2 if context_pre_only else 6)
        self.norm1, self.norm1_context = ModulatedNorm(dim), ModulatedNorm(dim)
        self.attn = JointAttention(dim, num_heads, qk_norm, context_pre_only)
        self.attn2 = Attention(dim, num_heads, qk_norm) if dual_attention else None
        self.norm2 = ModulatedNorm(dim)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))
        if not context_pre_only:
            self.norm2_context = ModulatedNorm(dim)
            self.ff_context = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        embedding: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # (batch, tokens, dim), (batch, context, dim), (batch, dim), (batch, 1, 1, tokens + context) → both streams
        shift1, scale1, gate1, shift2, scale2, gate2, *dual = self.modulation(embedding)
        context_shift1, context_scale1, *context_rest = self.context_modulation(embedding)

        block_input = hidden_states
        attended, context_attended = self.attn(
            self.norm1(block_input, shift1, scale1),
            self.norm1_context(encoder_hidden_states, context_shift1, context_scale1),
            attention_mask,
        )
        # addcmul(x, gate, y) is x + gate * y
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        if self.attn2 is not None:
            dual_shift, dual_scale, dual_gate = dual
            hidden_states = torch.addcmul(
                hidden_states, dual_gate, self.attn2(self.norm1(block_input, dual_shift, dual_scale))
            )
        hidden_states = torch.addcmul(hidden_states, gate2, self.ff(self.norm2(hidden_states, shift2, scale2)))
        if self.context_pre_only:
            return hidden_states, encoder_hidden_states

        context_gate1, context_shift2, context_scale2, context_gate2 = context_rest
        context = torch.addcmul(encoder_hidden_states, context_gate1, context_attended)
        modulated = self.norm2_context(context, context_shift2, context_scale2)
        return hidden_states, torch.addcmul(context, context_gate2, self.ff_context(modulated))


register_block(MMDiTBlock, return_encoder_hidden_states_index=1)


class MMDiTDenoiser(PositionTable, PatchDenoiser):
    """mmDiT with text or classes, disentangled or as published.

    Args:
        position_extent: Coordinates that a side of the grid, or of the table, spans; default: the number of patches
            per side at training.
        dual_attention_layers: Indices of the blocks with `dual_attention`, as in Stable Diffusion 3.5.
        published: Fields of `PublishedMMDiT`, or None.

    The other arguments are those of `PatchDenoiser` and `Denoiser`.

    Raises:
        ValueError: If sizes are not divisible, or the model has no context.

    Source: Stable Diffusion 3; the disentangled mode from Berrada et al., 2024.
    """

    _no_split_modules = ("MMDiTBlock",)
    _repeated_blocks = ("MMDiTBlock",)
    published_form = PublishedMMDiT

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        num_layers: int = 15,
        num_attention_heads: int = 16,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
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
        dual_attention_layers: tuple[int, ...] = (),
        published: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.check_sizes()
        if not self.attends:
            raise ValueError(f"an mmDiT needs a context: {GIVE_TOKENS}.")
        self.trunk = self.make_trunk(attends=True)
        self.patch_embedding = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.register_positions()
        self.transformer_blocks = nn.ModuleList(
            MMDiTBlock(
                hidden_size,
                num_attention_heads,
                mlp_ratio,
                qk_norm,
                context_pre_only=i == num_layers - 1,
                dual_attention=i in dual_attention_layers,
            )
            for i in range(num_layers)
        )
        self.output_layer = OutputLayer(hidden_size, patch_size, out_channels)
        self.gradient_checkpointing = False
        initialize(self)

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
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the objective's target; see `Denoiser` for arguments and result."""
        # inputs: timestep (batch,), grid (rows, columns) of patches
        semantic = (encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels)
        timestep, conditions, grid = self.read_inputs(hidden_states, timestep, *semantic, control)

        # conditions: embedding (batch, dim), context (batch, context, dim), context_mask (batch, 1, 1, context)
        embedding, context, context_mask = self.trunk(timestep, conditions)

        # patches: (batch, channels, height, width) → (batch, tokens, dim)
        hidden_states = self.patch_embedding(hidden_states) + self.positions_for(grid)

        # blocks: (batch, tokens, dim) and (batch, context, dim); image tokens are never masked
        joint_mask = None
        if context_mask is not None:
            joint_mask = nn.functional.pad(context_mask, (hidden_states.shape[1], 0), value=True)
        for block in self.transformer_blocks:
            hidden_states, context = self.run_block(block, hidden_states, context, embedding, joint_mask)

        # output: (batch, tokens, dim) → (batch, out_channels, height, width)
        sample = self.output_layer(hidden_states, embedding, grid)
        return self.output(sample, return_dict)
