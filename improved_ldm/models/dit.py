"""DiT: a transformer over latent patches, modulated by adaLN-Zero (Peebles and Xie, 2023)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import DEFAULT_PARTS, ControlPart
from improved_ldm.conditioning.control_embedding import ControlWeight
from improved_ldm.models.layers import (
    NORM_EPS,
    Attention,
    ModulatedNorm,
    Modulation,
    OutputLayer,
    PatchEmbedding,
    initialize,
    register_block,
)
from improved_ldm.models.patch_denoiser import PatchDenoiser
from improved_ldm.models.published import PublishedDiT
from improved_ldm.models.trunk import ConditioningMode, ControlRoute


class DiTBlock(nn.Module):
    """Self-attention and feed-forward, each modulated; between them cross-attention to the context tokens.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_ratio: Width of the feed-forward divided by `dim`.
        cross_attention: Whether the block reads context tokens (the disentangled mode).
        qk_norm: RMS-normalise queries and keys per head.
        norm_eps: ε of the norm before the feed-forward.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        cross_attention: bool,
        qk_norm: bool,
        norm_eps: float = NORM_EPS,
    ):
        super().__init__()
        self.modulation = Modulation(dim, 6)
        self.norm1 = ModulatedNorm(dim)
        self.attn1 = Attention(dim, num_heads, qk_norm)
        self.norm_cross = nn.LayerNorm(dim, eps=NORM_EPS) if cross_attention else None
        self.attn2 = Attention(dim, num_heads, qk_norm, is_cross_attention=True) if cross_attention else None
        self.norm2 = ModulatedNorm(dim, norm_eps)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))

    def zero_start(self):
        """Make the context tokens contribute nothing until they are trained."""
        if self.attn2 is not None:
            nn.init.zeros_(self.attn2.to_out[0].weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        embedding: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # (batch, tokens, dim), (batch, dim), (batch, context, dim), (batch, 1, 1, context) and, for self-attention,
        # (batch or 1, heads, tokens, tokens) → (batch, tokens, dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding)
        attended = self.attn1(self.norm1(hidden_states, shift1, scale1), attention_mask=attention_bias)
        # addcmul(x, gate, y) is x + gate * y
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        if self.attn2 is not None:
            attended = self.attn2(self.norm_cross(hidden_states), encoder_hidden_states, encoder_attention_mask)
            hidden_states = hidden_states + attended
        return torch.addcmul(hidden_states, gate2, self.ff(self.norm2(hidden_states, shift2, scale2)))


register_block(DiTBlock)


class DiTDenoiser(PatchDenoiser):
    """DiT with classes or text, disentangled or as published.

    Args:
        published: Fields of `PublishedDiT`, or None.

    The other arguments are those of `PatchDenoiser` and `Denoiser`.

    Raises:
        ValueError: If sizes are not divisible, or conditions contradict the mode.

    Source: DiT; the disentangled mode from Berrada et al., 2024; the norm and zero start of cross-attention are our
    choice.
    """

    _no_split_modules = ("DiTBlock",)
    _repeated_blocks = ("DiTBlock",)
    _published_text_arguments = ("pooled_dim",)
    published_form = PublishedDiT

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        patch_size: int = 2,
        hidden_size: int = 1152,
        num_layers: int = 28,
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
        published: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.check_sizes()
        form, attends = self.published, conditioning == "disentangled" and self.attends
        if form.trunk_per_block and (text_dim is not None or control_route == "tokens"):
            raise ValueError(
                "`trunk_per_block` is set with `text_dim` or the `control_route` 'tokens'; only classes and a control "
                "in the norm can be embedded separately for every block."
            )
        self.trunk = self.make_trunk(attends, downscale_freq_shift=form.downscale_freq_shift)
        self.later_trunks = nn.ModuleList(
            self.make_trunk(attends=False, downscale_freq_shift=form.downscale_freq_shift)
            for _ in range(num_layers - 1 if form.trunk_per_block else 0)
        )
        self.patch_embedding = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.register_positions()
        self.transformer_blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_attention_heads, mlp_ratio, attends, qk_norm, form.norm_eps)
            for _ in range(num_layers)
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
        embeddings = [embedding] * len(self.transformer_blocks)
        if self.later_trunks:
            embeddings[1:] = (trunk(timestep, conditions)[0] for trunk in self.later_trunks)

        # patches: (batch, channels, height, width) → (batch, tokens, dim)
        hidden_states = self.patch_embedding(hidden_states) + self.positions_for(grid)

        # blocks: (batch, tokens, dim)
        for block, block_embedding in zip(self.transformer_blocks, embeddings, strict=True):
            hidden_states = self.run_block(block, hidden_states, block_embedding, context, context_mask)

        # output: (batch, tokens, dim) → (batch, out_channels, height, width)
        sample = self.output_layer(hidden_states, embedding, grid)
        return self.output(sample, return_dict)
