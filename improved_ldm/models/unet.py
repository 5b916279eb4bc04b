"""UNet: convolutions and cross-attention at falling, then rising resolution (Rombach et al., 2022, and SDXL)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn, get_down_block, get_up_block
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import CONTROL_PARTS, ControlPart
from improved_ldm.conditioning.inputs import Conditioning
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.layers import AttentionProcessor
from improved_ldm.models.trunk import ConditioningTrunk, PooledEmbedding

GROUP_NORM_EPS = 1e-5


class UNetAttentionProcessor(AttentionProcessor):
    """Attention of diffusers' UNet blocks through diffusers' choice of backends."""

    def __call__(
        self,
        attn: DiffusersAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # (batch, tokens, dim), (batch, context, token_dim), (batch, 1, context) bool → (batch, tokens, dim)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(states).unflatten(-1, (attn.heads, -1))
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        attention_mask = None if attention_mask is None else attention_mask[:, None]
        return attn.to_out[0](self.attend(query, key, value, attention_mask))


class UNetDenoiser(Denoiser):
    """The UNet of LDM and SDXL with text or classes, disentangled or as published, on diffusers' blocks.

    Args:
        sample_size: latent pixels a side at training.
        in_channels: latent channels.
        out_channels: channels of the prediction.
        block_out_channels: channels of each level; the resolution halves from one to the next.
        down_block_types: diffusers' block of each level on the way down.
        up_block_types: diffusers' block of each level on the way up.
        layers_per_block: residual blocks a level.
        transformer_layers_per_block: transformer blocks behind each residual block, a level.
        num_attention_heads: heads, a level.
        use_linear_projection: project to the transformer blocks by linear layers, as SDXL does, not convolutions.
        norm_num_groups: groups of the group norms.
        conditioning: `disentangled` (timestep and control embedded) or `published` (pooled text and sizes added to the
            timestep).
        num_classes: classes, or None.
        num_class_tokens: tokens a class gives.
        text_dim: channels of the text tokens, or None; class tokens have those of the deepest level.
        pooled_dim: channels of the pooled text that the published mode adds to the timestep, or None.
        size_features: sinusoidal features of each size that the published mode adds to the timestep; 0 adds none, as
            in LDM.
        control_weight: kind of γ_c: `cosine`, `linear`, `constant`, `zero`.
        control_power: α of the cosine ramp.
        control_parts: of the control that the disentangled mode reads: `size`, `crop`, `flip`; none reads no control.
        num_train_timesteps: T.

    Raises:
        ValueError: for a model without semantic tokens, or conditions that contradict the mode.

    Source: SDXL; the disentangled mode from Berrada et al., 2024.
    """

    component = "unet"

    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock2D")
    _repeated_blocks = ("BasicTransformerBlock",)
    _skip_layerwise_casting_patterns = ("trunk", "norm")

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: tuple[int, ...] = (320, 640, 1280),
        down_block_types: tuple[str, ...] = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types: tuple[str, ...] = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block: int = 2,
        transformer_layers_per_block: tuple[int, ...] = (1, 2, 10),
        num_attention_heads: tuple[int, ...] = (5, 10, 20),
        use_linear_projection: bool = True,
        norm_num_groups: int = 32,
        conditioning: str = "disentangled",
        num_classes: int | None = None,
        num_class_tokens: int = 1,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        size_features: int = 256,
        control_weight: str = "cosine",
        control_power: float = 1.0,
        control_parts: tuple[ControlPart, ...] = CONTROL_PARTS,
        num_train_timesteps: int = 1000,
    ):
        super().__init__()
        if num_classes is None and text_dim is None:
            raise ValueError("a UNet attends to semantic tokens: set `num_classes` or `text_dim`.")
        channels, embedding_dim, token_dim = (
            block_out_channels,
            4 * block_out_channels[0],
            text_dim or block_out_channels[-1],
        )
        adds = pooled_dim is not None or (conditioning == "published" and size_features > 0)
        self.trunk = ConditioningTrunk(
            self.config,
            embedding_dim,
            token_dim,
            attends=True,
            text_projection=nn.Identity(),
            embeds_class=False,
            added_embedding=PooledEmbedding(embedding_dim, pooled_dim, size_features) if adds else None,
            timestep_features=channels[0],
        )
        level = {  # what diffusers' blocks have in common
            "temb_channels": embedding_dim,
            "cross_attention_dim": token_dim,
            "resnet_eps": GROUP_NORM_EPS,
            "resnet_act_fn": "silu",
            "resnet_groups": norm_num_groups,
            "use_linear_projection": use_linear_projection,
        }
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                down_block_types[i],
                num_layers=layers_per_block,
                in_channels=channels[max(i - 1, 0)],
                out_channels=channels[i],
                add_downsample=i < last,
                downsample_padding=1,
                transformer_layers_per_block=transformer_layers_per_block[i],
                num_attention_heads=num_attention_heads[i],
                attention_head_dim=num_attention_heads[i],
                **level,
            )
            for i in range(last + 1)
        )
        self.mid_block = UNetMidBlock2DCrossAttn(
            channels[-1],
            transformer_layers_per_block=transformer_layers_per_block[-1],
            num_attention_heads=num_attention_heads[-1],
            **level,
        )
        self.up_blocks = nn.ModuleList(
            get_up_block(
                up_block_types[last - i],
                num_layers=layers_per_block + 1,
                in_channels=channels[max(i - 1, 0)],
                out_channels=channels[i],
                prev_output_channel=channels[min(i + 1, last)],
                add_upsample=i > 0,
                transformer_layers_per_block=transformer_layers_per_block[i],
                num_attention_heads=num_attention_heads[i],
                attention_head_dim=num_attention_heads[i],
                **level,
            )
            for i in reversed(range(last + 1))
        )
        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=GROUP_NORM_EPS)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.set_attn_processor(UNetAttentionProcessor())
        self.gradient_checkpointing = False
        for parameter in self.conv_out.parameters():  # the prediction is zero until it is trained
            nn.init.zeros_(parameter)

    @property
    def patch_size(self) -> int:
        """1: latents of every size are taken."""
        return 1

    @property
    def summary(self) -> str:
        """Widths and depths in words."""
        config = self.config
        return (
            f"levels of {', '.join(map(str, config.block_out_channels))} channels with "
            f"{', '.join(map(str, config.transformer_layers_per_block))} transformer blocks"
        )

    def enable_cache(self, config):
        """Refuse: diffusers' caches skip blocks, which leaves the skip connections without an end."""
        raise ValueError("a UNet's blocks are joined by skip connections; diffusers' caches do not fit it.")

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

        `added_cond_kwargs` may give the published model's pooled text and sizes under diffusers' names:
        `text_embeds` (batch, pooled_dim), and `time_ids` (batch, 6) in place of the control.
        """
        if added_cond_kwargs is not None and "text_embeds" in added_cond_kwargs:
            if pooled_projections is not None:
                raise ValueError("`pooled_projections` and `text_embeds` are both given; give the pooled text once.")
            added_cond_kwargs = dict(added_cond_kwargs)
            pooled_projections = added_cond_kwargs.pop("text_embeds")
        conditions = Conditioning(
            encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels, control
        )
        self.check_inputs(hidden_states, conditions)
        sizes = self.added_sizes(added_cond_kwargs or None, ("time_ids",), control)

        # conditions: embedding (batch, 4 · channels), context (batch, context, token_dim), mask (batch, 1, context)
        embedding, context, mask = self.trunk(hidden_states, timestep, conditions, sizes)
        semantic = {"encoder_hidden_states": context, "encoder_attention_mask": None if mask is None else mask[:, 0]}

        # down: (batch, channels, height, width) → (batch, deepest channels, height / 2^levels, width / 2^levels)
        hidden_states = self.conv_in(hidden_states)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, states = block(hidden_states, embedding, **(semantic if attends(block) else {}))
            skips.extend(states)

        # middle
        hidden_states = self.mid_block(hidden_states, embedding, **semantic)

        # up: every residual block joins what its counterpart on the way down made
        for block in self.up_blocks:
            joined = tuple(skips.pop() for _ in block.resnets)[::-1]
            size = skips[-1].shape[-2:] if skips else None  # an odd side does not double
            hidden_states = block(
                hidden_states, joined, embedding, upsample_size=size, **(semantic if attends(block) else {})
            )

        # output: (batch, channels, height, width) → (batch, out_channels, height, width)
        sample = self.conv_out(nn.functional.silu(self.conv_norm_out(hidden_states)))
        return self.output(sample, return_dict)


def attends(block: nn.Module) -> bool:
    """Whether a block of diffusers reads semantic tokens."""
    return getattr(block, "has_cross_attention", False)
