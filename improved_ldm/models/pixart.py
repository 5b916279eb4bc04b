"""PixArt-α: a transformer with one shared adaptive norm and cross-attention to text (Chen et al., 2024)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PixArtAlphaTextProjection
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import CONTROL_PARTS, ControlPart
from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.models.denoiser import PatchDenoiser
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
from improved_ldm.models.trunk import SizeEmbedding


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the semantic tokens, feed-forward; modulated by shared vectors plus a table.

    Args:
        dim: channels.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward over `dim`.
        qk_norm: RMS-normalise queries and keys.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.modulation = TableModulation(dim, 6)
        self.norm1 = ModulatedNorm(dim)
        self.attn1 = Attention(dim, num_heads, qk_norm)
        self.attn2 = Attention(dim, num_heads, qk_norm)
        self.norm2 = ModulatedNorm(dim)
        self.ff = FeedForward(dim, activation_fn="gelu-approximate", inner_dim=int(dim * mlp_ratio))

    def zero_start(self):
        """Let the semantic tokens change nothing until they are trained."""
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
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)
        return torch.addcmul(hidden_states, gate2, self.ff(self.norm2(hidden_states, shift2, scale2)))


register_block(PixArtBlock)


class PixArtDenoiser(PatchDenoiser):
    """PixArt-α with text or classes, disentangled or as published.

    Args:
        sample_size: latent pixels a side at training.
        in_channels: latent channels.
        out_channels: channels of the prediction; twice `in_channels` where the variance is learned.
        patch_size: latent pixels a side of a patch.
        hidden_size: channels of a token, divisible by `num_attention_heads` and 4.
        num_layers: blocks.
        num_attention_heads: heads.
        mlp_ratio: width of the feed-forward over `hidden_size`.
        qk_norm: RMS-normalise queries and keys.
        conditioning: `disentangled` (timestep and control modulate) or `published` (the timestep modulates, and the
            sizes where `size_conditions` is set).
        num_classes: classes, or None.
        num_class_tokens: tokens a class gives.
        text_dim: channels of the text tokens, or None.
        control_weight: kind of γ_c: `cosine`, `linear`, `constant`, `zero`.
        control_power: α of the cosine ramp.
        control_parts: of the control that the disentangled mode reads: `size`, `crop`, `flip`; none reads no control.
        num_train_timesteps: T.
        position_extent: coordinates that a side of the grid spans; default: its patches at training.
        num_null_tokens: tokens of the null text: 1 for any position, or one a position as published (120).
        size_conditions: add resolution and aspect ratio to the timestep in the published mode, as the published
            1024-pixel model does.

    Raises:
        ValueError: for sizes that do not divide, a model without semantic tokens, or `size_conditions` in the
            disentangled mode.

    Source: PixArt-α; the disentangled mode from Berrada et al., 2024.
    """

    _no_split_modules = ("PixArtBlock",)
    _repeated_blocks = ("PixArtBlock",)
    _published_text_arguments = ("text_dim",)

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
        conditioning: str = "disentangled",
        num_classes: int | None = None,
        num_class_tokens: int = 1,
        text_dim: int | None = None,
        control_weight: str = "cosine",
        control_power: float = 1.0,
        control_parts: tuple[ControlPart, ...] = CONTROL_PARTS,
        num_train_timesteps: int = 1000,
        position_extent: float | None = None,
        num_null_tokens: int = 1,
        size_conditions: bool = False,
    ):
        super().__init__()
        self.check_sizes()
        if num_classes is None and text_dim is None:
            raise ValueError("a PixArt attends to semantic tokens: set `num_classes` or `text_dim`.")
        self.trunk = self.make_trunk(
            attends=True,
            text_projection=None if text_dim is None else PixArtAlphaTextProjection(text_dim, hidden_size),
            embeds_class=False,
            added_embedding=SizeEmbedding(hidden_size) if size_conditions else None,
            num_null_tokens=num_null_tokens,
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
        """Predict the objective's target; arguments and result as `Denoiser` says.

        `added_cond_kwargs` may give the published model's sizes as numbers, in place of the control: `resolution`
        (batch, 2) pixels and `aspect_ratio` (batch, 1), height over width.
        """
        conditions = Conditioning(
            encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels, control
        )
        grid = self.check_inputs(hidden_states, conditions)  # (rows, columns) of patches
        sizes = self.added_sizes(added_cond_kwargs, ("resolution", "aspect_ratio"), control)

        # conditions: embedding (batch, dim), context (batch, context, dim), context_mask (batch, 1, 1, context)
        embedding, context, context_mask = self.trunk(hidden_states, timestep, conditions, sizes)
        vectors = torch.cat(self.modulation(embedding), dim=1)  # (batch, 6, dim)

        # patches: (batch, channels, height, width) → (batch, tokens, dim)
        hidden_states = self.patch_embedding(hidden_states) + self.positions_for(grid)

        # blocks: (batch, tokens, dim)
        for block in self.transformer_blocks:
            hidden_states = self.run_block(block, hidden_states, vectors, context, context_mask)

        # output: (batch, tokens, dim) → (batch, out_channels, height, width)
        sample = self.output_layer(hidden_states, embedding[:, None], grid)
        return self.output(sample, return_dict)
