"""The settings of the optimizer, its learning rate and the average of the weights."""

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from improved_ldm.bounds import BatchSize, Count, CountOrZero, DecayRate, NotNegative, Positive
from improved_ldm.settings import Section

BETAS = {"adamw": (0.9, 0.95), "adan": (0.98, 0.92, 0.99)}  # AdamW: the paper's; Adan: Xie et al., 2024


class OptimizerConfig(Section):
    """The optimizer, its learning rate and the average of the weights."""

    name: Literal["adamw", "adan"] = "adamw"
    """`adamw`, or `adan` of timm."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    lr_scaling: Literal["none", "sqrt", "linear"] = "none"
    """Multiply the learning rate by images per step / `lr_base_batch`, or by the square root of that."""
    lr_base_batch: BatchSize | None = Field(None, validate_default=True)
    """Images per step for which `learning_rate` is meant; only with `lr_scaling`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`constant` after a linear warm-up, or `cosine` down to zero after it."""
    warmup_steps: CountOrZero = 0
    """Optimizer steps until the peak learning rate."""
    betas: tuple[DecayRate, ...] = Field(None, validate_default=True)
    """Decay rates of the moments; default: 0.9, 0.95, and for `adan` 0.98, 0.92, 0.99."""
    eps: Positive = 1e-8
    """ε of the denominator."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay."""
    max_grad_norm: Positive | None = 1.0
    """Norm that gradients are clipped to; null does not clip."""
    ema_decay: DecayRate = 0.9999
    """Decay per update of the averaged weights, which are saved and used for samples."""
    ema_warmup: bool = False
    """Let that decay rise as (1 + n) / (10 + n) over n updates until it has its value."""
    ema_every: Count = 1
    """Steps between updates of the average."""

    @field_validator("lr_base_batch")
    @classmethod
    def _is_given_if_the_rate_scales(cls, images: int | None, others: ValidationInfo):
        rule = others.data.get("lr_scaling")  # a wrong rule is reported alone
        if rule is not None and (rule == "none") != (images is None):
            raise ValueError(f"`lr_scaling` is {rule}, which {'has no' if rule == 'none' else 'needs a'} base")
        return images

    @field_validator("betas", mode="before")
    @classmethod
    def _are_those_of_the_optimizer(cls, betas: Any, others: ValidationInfo):
        default = BETAS.get(others.data.get("name"), ())  # a wrong name is reported alone
        if betas is None:
            return default
        if default and isinstance(betas, list | tuple) and len(betas) != len(default):
            raise ValueError(f"{others.data['name']} has {len(default)}, by default {', '.join(map(str, default))}")
        return betas
