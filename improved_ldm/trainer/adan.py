"""The Adan optimizer of timm; only runs that train with it import this module."""

from collections.abc import Iterable

import torch
from timm.optim import Adan
from torch import nn

from improved_ldm.trainer.optimizer_config import OptimizerConfig


class SkippingAdan(Adan):
    """Adan that leaves weights, moments and step count as they are if a step is skipped.

    The step count is on the host, so that every step waits for the device.

    Args:
        parameters: parameters to train.
        config: configuration of the optimizer.

    Source: Xie et al., 2024; mDT-v2 trains with it.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: OptimizerConfig):
        super().__init__(
            parameters,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        self._skipped = torch.tensor(False)

    def skip_where(self, skipped: torch.Tensor):
        """Set whether the next step is skipped, by a scalar bool."""
        self._skipped = skipped

    def step(self, closure=None):
        """Update the weights unless the step is skipped."""
        return None if self._skipped else super().step(closure)
