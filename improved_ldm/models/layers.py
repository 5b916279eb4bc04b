"""The layers of the denoisers: attention, modulation and patches."""

from typing import Protocol, runtime_checkable

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from improved_ldm.models.internals import TransformerBlockMetadata, TransformerBlockRegistry
from improved_ldm.models.norm import NORM_EPS, ModulatedNorm
from improved_ldm.models.positions import RelativePositionBias


class AttentionProcessor:
    """Scaled dot-product attention of `Attention`, on the attention backends of diffusers."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "Attention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.split_heads(*project(attn, hidden_states, context))
        query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
        hidden_states = self.attend(query, key, value, attention_mask)
        return attn.to_out[0](hidden_states)

    def attend(self, query, key, value, attention_mask):
        # (batch, tokens, heads, head_dim) each; attention_mask bool, or a bias, that broadcasts to
        # (batch, heads, tokens, key tokens), or None
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return hidden_states.flatten(2, 3)


class JointAttentionProcessor(AttentionProcessor):
    """Attention of two streams over the tokens of both; each stream has its own projections."""

    def __call__(
        self,
        attn: "JointAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query, key, value = attn.split_heads(*project(attn, hidden_states, hidden_states))
        context_query, context_key, context_value = attn.split_heads(*project_added(attn, encoder_hidden_states))
        query = torch.cat([attn.norm_q(query), attn.norm_added_q(context_query)], dim=1).to(value.dtype)
        key = torch.cat([attn.norm_k(key), attn.norm_added_k(context_key)], dim=1).to(value.dtype)
        value = torch.cat([value, context_value], dim=1)

        joint = self.attend(query, key, value, attention_mask)
        hidden_states, context = joint.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        context = context if attn.to_add_out is None else attn.to_add_out(context)
        return attn.to_out[0](hidden_states), context


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of a sequence over itself or over a context.

    Args:
        dim: Channels, divisible by `num_heads`.
        num_heads: Heads.
        qk_norm: RMS-normalise queries and keys per head.
        is_cross_attention: Whether the context is another sequence.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)
    use_bias = added_proj_bias = True  # read by diffusers when it fuses projections

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, is_cross_attention: bool = False):
        super().__init__()
        self.is_cross_attention = is_cross_attention
        self.heads, self.head_dim = num_heads, dim // num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = _head_norm(self.head_dim, qk_norm), _head_norm(self.head_dim, qk_norm)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(self._default_processor_cls())

    def split_heads(self, *projections: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # (batch, tokens, dim) → (batch, tokens, heads, head_dim) each
        return tuple(states.unflatten(-1, (-1, self.head_dim)) for states in projections)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class JointAttention(Attention):
    """Attention of image tokens and context tokens over both.

    Args:
        dim: Channels of both streams, divisible by `num_heads`.
        num_heads: Heads.
        qk_norm: RMS-normalise queries and keys per head.
        context_pre_only: Whether the context is read but not updated (the last block of an mmDiT).
    """

    _default_processor_cls = JointAttentionProcessor
    _available_processors = (JointAttentionProcessor,)

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, context_pre_only: bool = False):
        super().__init__(dim, num_heads, qk_norm)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (_head_norm(self.head_dim, qk_norm) for _ in range(2))
        self.to_add_out = None if context_pre_only else nn.Linear(dim, dim)


def project(attn: nn.Module, hidden_states: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries of a sequence, keys and values of its context: (batch, tokens, dim) each."""
    if not reads_fused(attn):
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
    if attn.is_cross_attention:
        return attn.to_q(hidden_states), *attn.to_kv(context).chunk(2, dim=-1)
    return attn.to_qkv(hidden_states).chunk(3, dim=-1)


def project_added(attn: JointAttention, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values of the second stream: (batch, context, dim) each."""
    if not reads_fused(attn):
        return attn.add_q_proj(context), attn.add_k_proj(context), attn.add_v_proj(context)
    return attn.to_added_qkv(context).chunk(3, dim=-1)


def reads_fused(attn: nn.Module) -> bool:
    """Whether to use fused projections: they exist, and no gradient is needed for the weights they are copies of."""
    return attn.fused_projections and not (torch.is_grad_enabled() and attn.to_q.weight.requires_grad)


def _head_norm(head_dim: int, qk_norm: bool) -> nn.Module:
    return nn.RMSNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()


class Modulation(nn.Module):
    """Shifts, scales and gates of an adaptive norm, linear in the embedding; zero at the start (adaLN-Zero).

    Args:
        dim: Channels.
        num_vectors: Number of output vectors of `dim` channels.

    Source: DiT.
    """

    def __init__(self, dim: int, num_vectors: int):
        super().__init__()
        self.num_vectors = num_vectors
        self.linear = nn.Linear(dim, num_vectors * dim)

    def zero_start(self):
        """Make a block with these gates the identity until it is trained."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # (batch, dim) → num_vectors × (batch, 1, dim)
        return self.linear(nn.functional.silu(embedding))[:, None].chunk(self.num_vectors, dim=-1)


class TableModulation(nn.Module):
    """Shifts, scales and gates that differ from shared ones by a learned table (adaLN-single).

    Args:
        dim: Channels.
        num_vectors: Number of output vectors of `dim` channels.

    Source: PixArt-α.
    """

    def __init__(self, dim: int, num_vectors: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_vectors, dim) / dim**0.5)

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # (batch, num_vectors or 1, dim) → num_vectors × (batch, 1, dim)
        return (self.table + vectors).split(1, dim=1)


class PatchEmbedding(nn.Module):
    """Latents to a sequence of patch tokens.

    Args:
        in_channels: Latent channels.
        dim: Channels of a token.
        patch_size: Latent pixels per side of a patch.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (batch, channels, height, width) → (batch, tokens, dim)
        # contiguous, because the states of all later blocks keep this layout, and norms read whole tokens
        return self.proj(hidden_states).flatten(2).transpose(1, 2).contiguous()


class OutputLayer(nn.Module):
    """Tokens back to latents: adaptive norm, then a linear layer that starts at zero.

    Args:
        dim: Channels of a token.
        patch_size: Latent pixels per side of a patch.
        out_channels: Latent channels of the prediction.
        modulation: Module from the embedding to a shift and a scale; default: linear.

    Source: DiT.
    """

    def __init__(self, dim: int, patch_size: int, out_channels: int, modulation: nn.Module | None = None):
        super().__init__()
        self.patch_size, self.out_channels = patch_size, out_channels
        self.norm = ModulatedNorm(dim)
        self.modulation = modulation or Modulation(dim, 2)
        self.linear = nn.Linear(dim, patch_size**2 * out_channels)

    def zero_start(self):
        """Make the prediction zero until it is trained."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: torch.Tensor, embedding: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        # (batch, tokens, dim) → (batch, out_channels, height, width)
        shift, scale = self.modulation(embedding)
        patches = self.linear(self.norm(hidden_states, shift, scale))
        patches = patches.unflatten(1, grid).unflatten(-1, (self.patch_size, self.patch_size, self.out_channels))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def register_block(block: type[nn.Module], **indices: int):
    """Let diffusers' caches find the states in a block's output.

    Args:
        block: Class of transformer blocks.
        indices: Further fields of `TransformerBlockMetadata`.
    """
    TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0, **indices))


@runtime_checkable
class StartsAtZero(Protocol):
    """A module that contributes nothing until it is trained."""

    def zero_start(self):
        """Set the weights that cause this to zero."""


def initialize(model: nn.Module):
    """Initialise every projection with Xavier weights and zero biases, then the modules that start at zero.

    Source: DiT.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, StartsAtZero):
            module.zero_start()
        elif isinstance(module, RelativePositionBias):
            module.reset_parameters()
