"""UNet: convolutions and cross-attention at falling, then rising resolution (Rombach et al., 2022, and SDXL)."""

from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2DCrossAttn, get_down_block, get_up_block
from diffusers.utils import apply_lora_scale
from torch import nn

from improved_ldm.conditioning.control import DEFAULT_PARTS, ControlPart
from improved_ldm.conditioning.control_embedding import ControlWeight
from improved_ldm.models.denoiser import GIVE_TOKENS, Denoiser
from improved_ldm.models.layers import AttentionProcessor, project
from improved_ldm.models.published import PooledEmbedding, PublishedUNet, make_trunk
from improved_ldm.models.trunk import ConditioningMode, ControlRoute, TrunkSpec

GROUP_NORM_EPS = 1e-5


class UNetAttentionProcessor(AttentionProcessor):
    """Attention of diffusers' UNet blocks, on the attention backends of diffusers."""

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
            states.unflatten(-1, (attn.heads, -1)) for states in project(attn, hidden_states, context)
        )
        attention_mask = None if attention_mask is None else attention_mask[:, None]
        return attn.to_out[0](self.attend(query, key, value, attention_mask))


class UNetDenoiser(Denoiser):
    """The UNet of LDM and SDXL with text or classes, disentangled or as published, on diffusers' blocks.

    Args:
        block_out_channels: Channels per level; the resolution halves from one level to the next.
        down_block_types: Class of diffusers' block per level on the way down.
        up_block_types: Class of diffusers' block per level on the way up.
        layers_per_block: Residual blocks per level.
        transformer_layers_per_block: Transformer blocks after each residual block, per level.
        num_attention_heads: Heads per level.
        use_linear_projection: Whether linear layers project to the transformer blocks, as in SDXL, or convolutions.
        norm_num_groups: Groups of the group norms.
        text_dim: Channels of the text tokens, or None.
        class_token_dim: Channels of class tokens and of the control's, without text; by default those of the deepest
            level.
        published: Fields of `PublishedUNet`, or None.

    The other arguments are those of `Denoiser`.

    Raises:
        ValueError: If there are no tokens to attend to, or conditions contradict the mode.

    Source: SDXL; the disentangled mode from Berrada et al., 2024.
    """

    component = "unet"
    published_form = PublishedUNet

    _no_split_modules = ("BasicTransformerBlock", "ResnetBlock2D")
    _repeated_blocks = ("BasicTransformerBlock",)
    _skip_layerwise_casting_patterns = ("trunk", "norm")
    _skip_connections = True

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
        conditioning: ConditioningMode = "disentangled",
        num_classes: int | None = None,
        num_class_tokens: int = 1,
        class_token_dim: int | None = None,
        text_dim: int | None = None,
        pooled_dim: int | None = None,
        control_weight: ControlWeight = "cosine",
        control_power: float = 1.0,
        control_parts: tuple[ControlPart, ...] = DEFAULT_PARTS,
        control_route: ControlRoute = "norm",
        num_train_timesteps: int = 1000,
        published: dict[str, Any] | None = None,
    ):
        super().__init__()
        if not self.attends:
            raise ValueError(f"a UNet attends to tokens: {GIVE_TOKENS}.")
        channels, embedding_dim, token_dim = (
            block_out_channels,
            4 * block_out_channels[0],
            text_dim or class_token_dim or block_out_channels[-1],
        )
        size_features = self.published.size_features
        adds = pooled_dim is not None or (conditioning == "published" and size_features > 0)
        self.trunk = make_trunk(
            self.config,
            TrunkSpec(embedding_dim, token_dim, attends=True, timestep_features=channels[0]),
            text_projection=nn.Identity(),
            embeds_class=False,
            added_embedding=PooledEmbedding(embedding_dim, pooled_dim, size_features) if adds else None,
        )
        level = {  # arguments that diffusers' blocks share
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
        """1: latents can have any size."""
        return 1

    @property
    def summary(self) -> str:
        """Widths and depths in words."""
        config = self.config
        return (
            f"levels of {', '.join(map(str, config.block_out_channels))} channels with "
            f"{', '.join(map(str, config.transformer_layers_per_block))} transformer blocks"
        )

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

        `added_cond_kwargs` may give the published model's pooled text and sizes under diffusers' names:
        `text_embeds` (batch, pooled_dim), and `time_ids` (batch, 6) in place of the control.
        """
        if added_cond_kwargs is not None and "text_embeds" in added_cond_kwargs:
            if pooled_projections is not None:
                raise ValueError("`pooled_projections` and `text_embeds` are both given; give one of them.")
            added_cond_kwargs = dict(added_cond_kwargs)
            pooled_projections = added_cond_kwargs.pop("text_embeds")
        semantic = (encoder_hidden_states, encoder_attention_mask, pooled_projections, class_labels)
        timestep, conditions, _ = self.read_inputs(hidden_states, timestep, *semantic, control)
        sizes = self.added_sizes(added_cond_kwargs or None, ("time_ids",), control)

        # conditions: embedding (batch, 4 · channels), context (batch, context, token_dim), mask (batch, 1, context)
        embedding, context, mask = self.trunk(timestep, conditions, **sizes)
        semantic = {"encoder_hidden_states": context, "encoder_attention_mask": None if mask is None else mask[:, 0]}

        # down: (batch, channels, height, width) → (batch, deepest channels, height / 2^levels, width / 2^levels)
        hidden_states = self.conv_in(hidden_states)
        skips = [hidden_states]
        for block in self.down_blocks:
            hidden_states, states = block(hidden_states, embedding, **(semantic if attends(block) else {}))
            skips.extend(states)

        # middle
        hidden_states = self.mid_block(hidden_states, embedding, **semantic)

        # up: every residual block joins the states of its counterpart on the way down
        for block in self.up_blocks:
            joined = tuple(skips.pop() for _ in block.resnets)[::-1]
            size = skips[-1].shape[-2:] if skips else None  # doubling does not give an odd side
            hidden_states = block(
                hidden_states, joined, embedding, upsample_size=size, **(semantic if attends(block) else {})
            )

        # output: (batch, channels, height, width) → (batch, out_channels, height, width)
        sample = self.conv_out(nn.functional.silu(self.conv_norm_out(hidden_states)))
        return self.output(sample, return_dict)


def attends(block: nn.Module) -> bool:
    """Whether a block of diffusers attends to context tokens."""
    return getattr(block, "has_cross_attention", False)
