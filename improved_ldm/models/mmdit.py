"""mmDiT: image tokens and context tokens in two streams that attend to each other (Esser et al., 2024)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import CONTROL_PARTS, ControlPart
from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.models.denoiser import PatchDenoiser, PositionTransfer
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
from improved_ldm.models.positions import centre_crop, interpolate_grid


class MMDiTBlock(nn.Module):
    """Joint attention of two streams, then a feed-forward of each; every stream is modulated by its own vectors.

    Args:
        dim: channels of both streams.
        num_heads: attention heads.
        mlp_ratio: width of the feed-forward over `dim`.
        qk_norm: RMS-normalise queries and keys.
        context_pre_only: the context is read but not updated (the last block).
        dual_attention: beside the joint attention, the image tokens attend to themselves alone.
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


class MMDiTDenoiser(PatchDenoiser):
    """mmDiT with text or classes, disentangled or as published.

    Args:
        sample_size: latent pixels a side at training.
        in_channels: latent channels.
        out_channels: channels of the prediction.
        patch_size: latent pixels a side of a patch.
        hidden_size: channels of a token, divisible by `num_attention_heads` and 4.
        num_layers: blocks.
        num_attention_heads: heads.
        mlp_ratio: width of the feed-forward over `hidden_size`.
        qk_norm: RMS-normalise queries and keys.
        conditioning: `disentangled` (timestep and control modulate, the context is semantic) or `published` (class or
            pooled text is added to the timestep as well; no control).
        num_classes: classes, or None.
        num_class_tokens: context tokens a class gives.
        text_dim: channels of the text tokens, or None.
        pooled_dim: channels of the pooled text that the published mode adds to the timestep, or None.
        control_weight: kind of γ_c: `cosine`, `linear`, `constant`, `zero`.
        control_power: α of the cosine ramp.
        control_parts: of the control that the disentangled mode reads: `size`, `crop`, `flip`; none reads no control.
        num_train_timesteps: T.
        position_extent: coordinates that a side of the grid, or of the table, spans; default: the grid's patches at
            training.
        position_table_size: positions a side of a table whose centre a grid takes, as in Stable Diffusion 3; by
            default every grid spans the whole extent.
        dual_attention_layers: blocks whose image tokens also attend to themselves alone, as in Stable Diffusion 3.5.

    Raises:
        ValueError: for sizes that do not divide, or a model without context.

    Source: Stable Diffusion 3; the disentangled mode from Berrada et al., 2024.
    """

    _no_split_modules = ("MMDiTBlock",)
    _repeated_blocks = ("MMDiTBlock",)

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
        position_table_size: int | None = None,
        dual_attention_layers: tuple[int, ...] = (),
    ):
        super().__init__()
        self.check_sizes()
        if num_classes is None and text_dim is None:
            raise ValueError("an mmDiT needs a context: set `num_classes` or `text_dim`.")
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

    def register_positions(self):
        """Keep the position embeddings of the table, where there is one, or of the configured latent size."""
        side = self.config.position_table_size or self.config.sample_size // self.config.patch_size
        self.register_buffer("positions", self.computed_positions(side, side))

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config values and tensors of positions for another latent size; a table is made denser, or cropped less.

        Raises:
            ValueError: for a table that is too small, or would not keep its centre.
        """
        side = self.config.position_table_size
        if side is None:
            return super().resized_positions(sample_size, positions)
        old, new = (size // self.config.patch_size for size in (self.config.sample_size, sample_size))
        extent = self.config.position_extent or old
        if positions in ("extrapolate", "keep"):
            centre_crop(self.positions, new, new)  # raises if it is too small
            return {"position_extent": extent}, {"positions": self.positions.clone()}
        new_side, remainder = divmod(side * sample_size, self.config.sample_size)
        if remainder or (side - old) % 2 or (new_side - new) % 2:
            raise ValueError(
                f"a table of {side} positions a side around {old} patches does not become one around {new} with the "
                f"same centre."
            )
        config = {"position_extent": extent, "position_table_size": new_side}
        if positions == "resample":
            return config, {}
        return config, {"positions": interpolate_grid(self.positions, (side, side), (new_side, new_side))}

    def positions_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (rows · columns, dim) of a grid of patches."""
        if self.config.position_table_size is None:
            return super().positions_for(grid)
        return centre_crop(self.positions, *grid)

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
        """Predict the objective's target; arguments and result as `Denoiser` says."""
        conditions = Conditioning(
            encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels, control
        )
        grid = self.check_inputs(hidden_states, conditions)  # (rows, columns) of patches

        # conditions: embedding (batch, dim), context (batch, context, dim), context_mask (batch, 1, 1, context)
        embedding, context, context_mask = self.trunk(hidden_states, timestep, conditions)

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
