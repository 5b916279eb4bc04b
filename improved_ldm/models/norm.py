"""The adaptive layer norm: one pass forward and one backward, with derivatives of every order and mode."""

import torch
from torch import nn

NORM_EPS = 1e-6


class ModulatedNorm(nn.Module):
    """Layer norm without parameters of its own, scaled and shifted: norm(x) · (1 + scale) + shift.

    Args:
        dim: Channels.
        eps: Constant that is added to the variance.
    """

    def __init__(self, dim: int, eps: float = NORM_EPS):
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        # (batch, tokens, dim), (batch, 1, dim), (batch, 1, dim) → (batch, tokens, dim)
        # layer_norm(hidden_states) * (1 + scale) + shift, as one function that saves few tensors for the backward
        # pass; torch.compile does not accept a function that defines its own forward mode
        function = _ModulatedNorm if torch.compiler.is_compiling() else _ForwardModeNorm
        return function.apply(hidden_states, shift, scale, self.eps)[0]


class _ModulatedNorm(torch.autograd.Function):
    # The backward pass recomputes norm(x) from tensors that the norm's gradient needs anyway: one state less to save.

    @staticmethod
    def forward(hidden_states, shift, scale, eps):
        normed, mean, rstd = torch.native_layer_norm(hidden_states, hidden_states.shape[-1:], None, None, eps)
        return torch.addcmul(shift, normed, 1 + scale), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden_states, _, scale, ctx.eps = inputs
        _, mean, rstd = output
        ctx.save_for_backward(hidden_states, scale, mean, rstd)
        ctx.save_for_forward(hidden_states, scale, mean)

    @staticmethod
    def backward(ctx, grad, *_):
        hidden_states, scale, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient itself will be differentiated
            return *_differentiable_gradients(hidden_states, scale, grad, ctx.eps), None
        grad_scale = ((hidden_states - mean).mul_(rstd) * grad).sum(1, keepdim=True)
        grad_states, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad * (1 + scale), hidden_states, hidden_states.shape[-1:], mean, rstd, None, None, [True, False, False]
        )
        return grad_states, grad.sum(1, keepdim=True), grad_scale, None


class _ForwardModeNorm(_ModulatedNorm):
    @staticmethod
    def vmap(info, in_dims, *inputs):
        # merge the new dimension into the batch
        *tensors, eps = inputs
        rows = [
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(tensors, in_dims, strict=False)
        ]
        outputs = _ForwardModeNorm.apply(*(value.flatten(0, 1) for value in rows), eps)
        return tuple(value.unflatten(0, (info.batch_size, -1)) for value in outputs), (0, 0, 0)

    @staticmethod
    def jvp(ctx, states_tangent, shift_tangent, scale_tangent, _):
        hidden_states, scale, mean = ctx.saved_tensors
        normed, rstd = _normalize(hidden_states, ctx.eps)
        tangent = torch.zeros_like(normed)
        mean_tangent = rstd_tangent = torch.zeros_like(mean)
        if states_tangent is not None:
            states_tangent = states_tangent.to(normed)
            tangent = tangent + _project(states_tangent, normed, rstd) * (1 + scale)
            mean_tangent = states_tangent.mean(-1, keepdim=True).to(mean)
            rstd_tangent = (-rstd.square() * (normed * states_tangent).mean(-1, keepdim=True)).to(mean)
        if scale_tangent is not None:
            tangent = tangent + normed * scale_tangent
        if shift_tangent is not None:
            tangent = tangent + shift_tangent
        return tangent.to(hidden_states.dtype), mean_tangent, rstd_tangent


def _differentiable_gradients(hidden_states, scale, grad, eps):
    """Gradients of the states, the shift and the scale, from operations that are differentiable themselves."""
    normed, rstd = _normalize(hidden_states, eps)
    grad_states = _project((grad * (1 + scale)).to(normed), normed, rstd).to(hidden_states.dtype)
    return grad_states, grad.sum(1, keepdim=True), (normed * grad).sum(1, keepdim=True).to(scale.dtype)


def _normalize(hidden_states, eps):
    """norm(x) and 1/σ, in float32 or better."""
    hidden_states = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    centred = hidden_states - hidden_states.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _project(tangent, normed, rstd):
    """The derivative of norm(x), a symmetric matrix, times a vector: (v - mean(v) - norm(x) mean(norm(x) v)) / σ."""
    return rstd * (tangent - tangent.mean(-1, keepdim=True) - normed * (normed * tangent).mean(-1, keepdim=True))
