"""Fused query, key and value projections of a denoiser: one matrix product instead of three, for sampling only."""

import torch
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_processor import Attention as DiffusersAttention
from torch import nn

FUSED = ("to_qkv", "to_kv", "to_added_qkv")


class FusingMixin(AttentionMixin):
    """diffusers' interface to fused projections; the fused copies cannot be trained, adapted or saved."""

    @property
    def is_fused(self) -> bool:
        """Whether the projections are fused."""
        return any(attention.fused_projections for attention in self._attentions())

    def fuse_qkv_projections(self):
        """Compute queries, keys and values at once from copies of their weights, as long as no gradient is needed.

        Raises:
            ValueError: If the model is in training mode or has adapters, or weights are quantised, cast or offloaded.
        """
        if self.training:
            raise ValueError("fused projections cannot be trained; call `eval()` before `fuse_qkv_projections()`.")
        if getattr(self, "peft_config", None):
            raise ValueError(
                f"the denoiser has adapters ({', '.join(self.peft_config)}), which fused projections would ignore; "
                f"fuse them into the weights, or unload them, before `fuse_qkv_projections()`."
            )
        for attention in self._attentions():
            weight = attention.to_q.weight
            if type(weight.data) is not torch.Tensor or weight.is_meta or weight.dtype.itemsize < 2:
                raise ValueError(
                    "the denoiser's weights are quantised, cast or offloaded; call `fuse_qkv_projections()` before."
                )
        for attention in self._attentions():
            attention.fuse_projections()
            for name in FUSED:
                if hasattr(attention, name):
                    getattr(attention, name).requires_grad_(False)

    def unfuse_qkv_projections(self):
        """Compute queries, keys and values separately again."""
        for attention in self._attentions():
            for name in FUSED:
                if hasattr(attention, name):
                    delattr(attention, name)
            attention.fused_projections = False

    def train(self, mode: bool = True):
        """Set the training mode, which fused projections do not support."""
        if mode:
            self._check_unfused("trained")
        return super().train(mode)

    def add_adapter(self, *args, **kwargs):
        """Add a new adapter, which fused projections do not support."""
        self._check_unfused("adapted")
        super().add_adapter(*args, **kwargs)

    def load_lora_adapter(self, *args, **kwargs):
        """Load an adapter, which fused projections do not support."""
        self._check_unfused("adapted")
        super().load_lora_adapter(*args, **kwargs)

    def save_pretrained(self, *args, **kwargs):
        """Save the model, which must not have fused copies of its weights."""
        self._check_unfused("saved")
        super().save_pretrained(*args, **kwargs)

    def _check_unfused(self, what: str):
        if self.is_fused:
            raise ValueError(f"fused projections cannot be {what}; call `unfuse_qkv_projections()` first.")

    def _attentions(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, (AttentionModuleMixin, DiffusersAttention))]
