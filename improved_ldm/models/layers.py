"""The layers that the denoisers are built of: attention, modulation, patches."""

import torch
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-6


class AttentionProcessor:
    """Scaled dot-product attention of `Attention` through diffusers' choice of backends."""

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
        query, key, value = attn.project(hidden_states, context, attn.to_q, attn.to_k, attn.to_v)
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
    """Attention of two streams over the tokens of both, with projections of their own."""

    def __call__(
        self,
        attn: "JointAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = attn.project(hidden_states, hidden_states, attn.to_q, attn.to_k, attn.to_v)
        context_query, context_key, context_value = attn.project(
            encoder_hidden_states, encoder_hidden_states, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj
        )
        query = torch.cat([attn.norm_q(query), attn.norm_added_q(context_query)], dim=1).to(value.dtype)
        key = torch.cat([attn.norm_k(key), attn.norm_added_k(context_key)], dim=1).to(value.dtype)
        value = torch.cat([value, context_value], dim=1)

        joint = self.attend(query, key, value, attention_mask)
        hidden_states, context = joint.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        context = None if attn.to_add_out is None else attn.to_add_out(context)
        return attn.to_out[0](hidden_states), context


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of a sequence over itself or over a context.

    Args:
        dim: channels, divisible by `num_heads`.
        num_heads: heads.
        qk_norm: RMS-normalise queries and keys a head.
    """

    _default_processor_cls = AttentionProcessor
    _available_processors = (AttentionProcessor,)
    _supports_qkv_fusion = False

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False):
        super().__init__()
        self.heads, self.head_dim = num_heads, dim // num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = _head_norm(self.head_dim, qk_norm), _head_norm(self.head_dim, qk_norm)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.set_processor(self._default_processor_cls())

    def project(self, hidden_states, context, to_query, to_key, to_value):
        """Queries of a sequence, keys and values of its context: (batch, tokens, heads, head_dim) each."""
        return (
            to_query(hidden_states).unflatten(-1, (-1, self.head_dim)),
            to_key(context).unflatten(-1, (-1, self.head_dim)),
            to_value(context).unflatten(-1, (-1, self.head_dim)),
        )

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask)


class JointAttention(Attention):
    """Attention of image tokens and context tokens over both.

    Args:
        dim: channels of both streams, divisible by `num_heads`.
        num_heads: heads.
        qk_norm: RMS-normalise queries and keys a head.
        context_pre_only: the context is read but not updated (the last block of an mmDiT).
    """

    _default_processor_cls = JointAttentionProcessor
    _available_processors = (JointAttentionProcessor,)

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, context_pre_only: bool = False):
        super().__init__(dim, num_heads, qk_norm)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_added_q, self.norm_added_k = (_head_norm(self.head_dim, qk_norm) for _ in range(2))
        self.to_add_out = None if context_pre_only else nn.Linear(dim, dim)


def _head_norm(head_dim: int, qk_norm: bool) -> nn.Module:
    return nn.RMSNorm(head_dim, eps=NORM_EPS) if qk_norm else nn.Identity()


class Modulation(nn.Module):
    """Shifts, scales and gates of an adaptive norm, linear in the embedding; zero at the start (adaLN-Zero).

    Args:
        dim: channels.
        num_vectors: how many vectors of `dim` channels to give.

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
        dim: channels.
        num_vectors: how many vectors of `dim` channels to give.

    Source: PixArt-α.
    """

    def __init__(self, dim: int, num_vectors: int):
        super().__init__()
        self.table = nn.Parameter(torch.randn(num_vectors, dim) / dim**0.5)

    def forward(self, vectors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # (batch, num_vectors or 1, dim) → num_vectors × (batch, 1, dim)
        return (self.table + vectors).split(1, dim=1)


class ModulatedNorm(nn.Module):
    """Layer norm without parameters of its own, scaled and shifted: norm(x) · (1 + scale) + shift.

    Args:
        dim: channels.
        eps: added to the variance.
    """

    def __init__(self, dim: int, eps: float = NORM_EPS):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # (batch, tokens, dim), (batch, 1, dim), (batch, 1, dim) → (batch, tokens, dim)
        return _ModulatedNorm.apply(hidden_states, shift, scale, self.eps)


class _ModulatedNorm(torch.autograd.Function):
    # The backward pass makes norm(x) anew from what the norm's own gradient keeps: one state less in memory. There is
    # no second derivative and no forward mode.

    @staticmethod
    def forward(ctx, hidden_states, shift, scale, eps):
        normed, mean, rstd = torch.native_layer_norm(hidden_states, hidden_states.shape[-1:], None, None, eps)
        ctx.save_for_backward(hidden_states, scale, mean, rstd)
        return torch.addcmul(shift, normed, 1 + scale)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden_states, scale, mean, rstd = ctx.saved_tensors
        grad_scale = ((hidden_states - mean) * rstd).mul_(grad).sum(1, keepdim=True)
        grad_states, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale), hidden_states, hidden_states.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        return grad_states, grad.sum(1, keepdim=True), grad_scale, None


class PatchEmbedding(nn.Module):
    """Latents to a sequence of patch tokens.

    Args:
        in_channels: latent channels.
        dim: channels of a token.
        patch_size: latent pixels a side of a patch.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # (batch, channels, height, width) → (batch, tokens, dim)
        # the layout of the blocks' states follows from this one's
        return self.proj(hidden_states).flatten(2).transpose(1, 2).contiguous()


class OutputLayer(nn.Module):
    """Tokens back to latents: adaptive norm, then a linear layer that starts at zero.

    Args:
        dim: channels of a token.
        patch_size: latent pixels a side of a patch.
        out_channels: latent channels of the prediction.
        modulation: from the embedding to a shift and a scale; default: linear.

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
        block: a class of transformer blocks.
        indices: of `TransformerBlockMetadata`.
    """
    TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0, **indices))


def initialize(model: nn.Module):
    """Xavier weights and zero biases for every projection, then zeros where a module asks to start at zero.

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
        if hasattr(module, "zero_start"):
            module.zero_start()
