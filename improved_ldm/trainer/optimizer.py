"""The optimizers, their learning rate and the running average of the weights; a skipped step changes none of them."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from improved_ldm.trainer.optimizer_config import OptimizerConfig

MAX_SCALED_RATE = 0.1  # our choice; LDM's 1e-4, times its 1200 images, is above it


class SkippingAdamW(torch.optim.AdamW):
    """AdamW that leaves weights, moments and step counts as they are if a step is skipped.

    The fused kernel skips the step on the device. The loss scale of fp16 also skips only steps whose gradient is not
    finite.

    Args:
        parameters: parameters to train.
        config: configuration of the optimizer.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig):
        super().__init__(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,  # three times as fast as the default on CPU
        )
        self._skipped = None
        self.register_step_pre_hook(SkippingAdamW._tell_kernel)

    def skip_where(self, skipped: torch.Tensor):
        """Set whether the next step is skipped, by a scalar bool on the device of the parameters."""
        self._skipped = skipped.float()

    def _tell_kernel(self, *_):
        self.found_inf = self._skipped  # in a hook, because a loss scale sets its own value before the step


def make_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration names; its `skip_where` sets whether the next step is skipped."""
    if config.name == "adamw":
        return SkippingAdamW(parameters, config)
    from improved_ldm.trainer.adan import SkippingAdan  # imports timm

    return SkippingAdan(parameters, config)


class WeightAverage(AveragedModel):
    """Exponential moving average of a model's trained weights, in float32.

    Args:
        model: model that the average starts from; its frozen weights are shared, not copied.
        decay: decay per update.
        warmup: if true, the decay rises to that value as min(decay, (1 + n) / (10 + n)) after n updates.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        super().__init__(model)
        self.decay, self.warmup = decay, warmup
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # the adapters and their average share one base
                layer, _, own_name = name.rpartition(".")
                setattr(self.module.get_submodule(layer), own_name, parameter)

    def start_from(self, average: nn.Module):
        """Start from the average of an earlier training, whose warm-up is over."""
        self.module.load_state_dict(average.state_dict())
        self.n_averaged += math.ceil(9 / (1 - self.decay))  # from then on, (1 + n) / (10 + n) exceeds the decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module, skipped: torch.Tensor):
        """Update the average with the weights after a step; the first ones are copied. Nothing is synchronised.

        Args:
            model: the trained model.
            skipped: whether the step was skipped, a scalar bool; if so, the average stays as it is.
        """
        weight = torch.full((), 1 - self.decay, device=skipped.device)
        if self.warmup:
            weight = torch.maximum(weight, 9 / (10 + self.n_averaged))  # 1 - (1 + n) / (10 + n)
        weight = weight.masked_fill(self.n_averaged == 0, 1.0).masked_fill(skipped, 0.0)
        for average, parameter in zip(self.module.parameters(), model.parameters(), strict=True):
            if parameter.requires_grad:
                average.lerp_(parameter, weight)
        for average, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.n_averaged += ~skipped


def scaled(config: OptimizerConfig, images_per_step: int) -> OptimizerConfig:
    """The configuration with the learning rate for a number of images per step, which is not scaled any further.

    Raises:
        ValueError: if that rate is above `MAX_SCALED_RATE`.
    """
    if config.lr_scaling == "none":
        return config
    factor = images_per_step / config.lr_base_batch
    rate = config.learning_rate * (math.sqrt(factor) if config.lr_scaling == "sqrt" else factor)
    if rate > MAX_SCALED_RATE:
        raise ValueError(
            f"`optimizer.lr_scaling` is {config.lr_scaling}: it turns {config.learning_rate:g} into {rate:g} for "
            f"{images_per_step} images per step; a rate above {MAX_SCALED_RATE} does not train. Lower "
            f"`optimizer.learning_rate`, or raise `optimizer.lr_base_batch`, which is {config.lr_base_batch}."
        )
    return config.model_copy(update={"learning_rate": rate, "lr_scaling": "none", "lr_base_batch": None})


def learning_rate_at(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0: a linear warm-up, then constant or a cosine down to zero."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    fraction = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * fraction)).item())


def set_learning_rate(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int, steps: int):
    """Set the learning rate of a step; a function of the step alone, so there is no state to resume."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(config, step, steps)


def fitting_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict for an optimizer: its own settings, and of `state` the step counts and those moments that fit."""
    shapes = [parameter.shape for group in optimizer.param_groups for parameter in group["params"]]
    moments = {i: values for i, values in state["state"].items() if values["exp_avg"].shape == shapes[i]}
    counts = ({key: group[key] for key in group.keys() & {"step"}} for group in state["param_groups"])  # Adan's
    groups = zip(optimizer.state_dict()["param_groups"], counts, strict=True)
    return {"state": moments, "param_groups": [group | count for group, count in groups]}
