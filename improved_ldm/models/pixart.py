"""PixArt-α: a transformer with one shared adaptive norm and cross-attention to text (Chen et al., 2024)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import DEFAULT_PARTS, ControlPart
from improved_ldm.conditioning.control_embedding import ControlWeight
from improved_ldm.models.denoiser import GIVE_TOKENS
from improved_ldm.models.layers import (
    Attention,
    ModulatedNorm,
    Modulation,
    OutputLayer,
    PatchEmbedding,
    TableModulation,
    initialize,
    register_block,
)
from improved_ldm.models.patch_denoiser import PatchDenoiser
from improved_ldm.models.published import PublishedPixArt, SizeEmbedding
from improved_ldm.models.trunk import ConditioningMode, ControlRoute


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to context tokens and feed-forward, modulated by shared vectors plus a table.

    Args:
        dim: Channels.
        num_heads: Attention heads.
        mlp_ratio: Width of the feed-forward divided by `dim`.
        qk_norm: RMS-normalise queries and keys per head.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.modulation = TableModulation(dim, 6)
        self.norm1 = ModulatedNorm(dim)
        self.attn1 = Attention(dim, num_heads, qk_norm)
        self.attn2 = Attention(dim, num_heads, qk_norm, is_cross_attention=True)
        self.norm2 = ModulatedNorm(dim)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))

    def zero_start(self):
        """Make the context tokens contribute nothing until they are trained."""
        nn.init.zeros_(self.attn2.to_out[0].weight)

    def forward(
        self,
        hidden_states: torch.Tensor,
        vectors: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # (batch, tokens, dim), (batch, 6, dim), (batch, context, dim), (batch, 1, 1, context) → (batch, tokens, dim)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(vectors)
        attended = self.attn1(self.norm1(hidden_states, shift1, scale1))
        # addcmul(x, gate, y) is x + gate * y
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)
        return torch.addcmul(hidden_states, gate2, self.ff(self.norm2(hidden_states, shift2, scale2)))


register_block(PixArtBlock)


class PixArtDenoiser(PatchDenoiser):
    """PixArt-α with text or classes, disentangled or as published.

    Args:
        published: Fields of `PublishedPixArt`, or None.

    The other arguments are those of `PatchDenoiser` and `Denoiser`.

    Raises:
        ValueError: If sizes are not divisible, there are no tokens to attend to, or `size_conditions` is set in the
            disentangled mode.

    Source: PixArt-α; the disentangled mode from Berrada et al., 2024.
    """

    _no_split_modules = ("PixArtBlock",)
    _repeated_blocks = ("PixArtBlock",)
    _published_text_arguments = ("text_dim",)
    published_form = PublishedPixArt

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
        if not self.attends:
            raise ValueError(f"a PixArt attends to tokens: {GIVE_TOKENS}.")
        form = self.published
        self.trunk = self.make_trunk(
            attends=True,
            text_projection=None if text_dim is None else PixArtAlphaTextProjection(text_dim, hidden_size),
            embeds_class=False,
            added_embedding=SizeEmbedding(hidden_size) if form.size_conditions else None,
            num_null_tokens=form.num_null_tokens,
            random_null_text=True,
        )
        self.modulation = Modulation(hidden_size, 6)
        self.patch_embedding = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.register_positions()
        self.transformer_blocks = nn.ModuleList(
            PixArtBlock(hidden_size, num_attention_heads, mlp_ratio, qk_norm) for _ in range(num_layers)
        )
        self.output_layer = OutputLayer(hidden_size, patch_size, out_channels, TableModulation(hidden_size, 2))
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
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the objective's target; see `Denoiser` for arguments and result.

        `added_cond_kwargs` may give the published model's sizes as numbers, in place of the control: `resolution`
        (batch, 2) in pixels and `aspect_ratio` (batch, 1), height divided by width.
        """
        # inputs: timestep (batch,), grid (rows, columns) of patches
        semantic = (encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels)
        timestep, conditions, grid = self.read_inputs(hidden_states, timestep, *semantic, control)
        sizes = self.added_sizes(added_cond_kwargs, ("resolution", "aspect_ratio"), control)

        # conditions: embedding (batch, dim), context (batch, context, dim), context_mask (batch, 1, 1, context)
        embedding, context, context_mask = self.trunk(timestep, conditions, **sizes)
        vectors = torch.cat(self.modulation(embedding), dim=1)  # (batch, 6, dim)

        # patches: (batch, channels, height, width) → (batch, tokens, dim)
        hidden_states = self.patch_embedding(hidden_states) + self.positions_for(grid)

        # blocks: (batch, tokens, dim)
        for block in self.transformer_blocks:
            hidden_states = self.run_block(block, hidden_states, vectors, context, context_mask)

        # output: (batch, tokens, dim) → (batch, out_channels, height, width)
        sample = self.output_layer(hidden_states, embedding[:, None], grid)
        return self.output(sample, return_dict)
