"""What a run trains: a model, and the loss of a batch. The training loop is the same for all tasks."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import nn

from improved_ldm.trainer.randomness import ImageRandomness
from improved_ldm.trainer.run import Run


class Batch(Protocol):
    """A batch of named tensors, one row per image."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> Self: ...

    def tensors(self) -> dict[str, torch.Tensor]: ...

    @classmethod
    def from_tensors(cls, named: dict[str, torch.Tensor]) -> Self: ...


@dataclass(frozen=True)
class Samples:
    """A batch of tensors: pixels and what belongs to them, such as labels or tokens.

    Args:
        named: the tensors by name, one row per image.
    """

    named: dict[str, torch.Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.named.values())))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.named[name]

    def to(self, device: torch.device | str) -> "Samples":
        """The batch on a device."""
        return Samples({name: value.to(device, non_blocking=True) for name, value in self.named.items()})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The batch as named tensors."""
        return self.named

    @classmethod
    def from_tensors(cls, named: dict[str, torch.Tensor]) -> "Samples":
        """The inverse of `tensors`."""
        return cls(named)


class Task(ABC):
    """A model and its loss.

    Args:
        model: model with the weights to start from; those that require no gradient stay frozen.
        averaged: average of the weights; None starts it from the weights.
        optimizer_state: moments of a model with the same parameters; those whose shape differs start from scratch.
    """

    def __init__(
        self, model: nn.Module, averaged: nn.Module | None = None, optimizer_state: dict[str, Any] | None = None
    ):
        self.model, self.averaged, self.optimizer_state = model, averaged, optimizer_state

    def faster_model(self, run: Run) -> nn.Module:
        """The model with what saves time or memory turned on, which its average does without."""
        return self.model

    @abstractmethod
    def loss(self, run: Run, model: nn.Module, batch: Batch, images: ImageRandomness) -> torch.Tensor:
        """The loss of one micro-batch, a scalar whose gradient is NaN if the loss is not finite.

        Args:
            run: configuration, folder and processes.
            model: the model as accelerate has prepared it.
            batch: the micro-batch, on the device.
            images: random numbers of its images.
        """

    def flops_per_image(self, run: Run) -> float | None:
        """Floating-point operations of a training step per image; None if they are not known."""
        return None

    def random_choices(self, run: Run, images: ImageRandomness) -> dict[str, torch.Tensor]:
        """What is chosen at random for the images of a batch, for the file of the first skipped step."""
        return {}
