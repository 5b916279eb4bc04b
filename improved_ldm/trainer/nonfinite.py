"""Steps whose loss or gradient is NaN or infinite: how they are detected, and a file with the batch of the first."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from improved_ldm.trainer.randomness import ImageRandomness, StepRandomness
from improved_ldm.trainer.task import Batch

NONFINITE = "nonfinite"  # name of a folder in that of the run


class NonFiniteLossError(RuntimeError):
    """Losses, gradients or weights are NaN or infinite: the run cannot continue; its last checkpoint is intact."""


def pass_nonfinite_to_gradient(loss: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
    """The same loss; if it is not finite, its gradient becomes NaN, and so does the norm on every process.

    Args:
        loss: a scalar.
        conditions: conditions of the batch. A denoiser reads a row of NaN as a missing condition, so NaN in the data
            would otherwise go unnoticed.
    """
    finite = loss.detach().isfinite()
    for condition in conditions:
        if condition is not None and condition.is_floating_point():
            finite = finite & condition.detach().isfinite().all()
    return loss * torch.ones_like(loss).masked_fill(~finite, torch.nan)


def check_weights(model: nn.Module, step: int):
    """Raise a NonFiniteLossError if weights are not finite after a step, counted from 1, before they are saved."""
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters()):
        raise NonFiniteLossError(f"weights are NaN or infinite after step {step}; it is not saved")


@dataclass(frozen=True)
class Suspect:
    """The micro-batch of a step that explains its NaN: the first without a finite loss, otherwise the last.

    Args:
        batch: the micro-batch, on the device.
        number: number of the micro-batch, counted from 0; a scalar on the device.
        loss: its loss, a scalar.
    """

    batch: Batch
    number: torch.Tensor
    loss: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """All fields as named tensors."""
        return self.batch.tensors() | {"micro_batch": self.number, "loss": self.loss}

    def with_tensors(self, named: dict[str, torch.Tensor]) -> "Suspect":
        """A suspect of the same kind with other `tensors`."""
        batch = self.batch.from_tensors({name: named[name] for name in self.batch.tensors()})
        return Suspect(batch, named["micro_batch"], named["loss"])

    def unless(self, stays: torch.Tensor, earlier: "Suspect | None") -> "Suspect":
        """This suspect, or an earlier one if the scalar bool `stays` is true; chosen on the device if they fit."""
        if earlier is None:
            return self
        own, kept = self.tensors(), earlier.tensors()
        if any(value.shape != own[name].shape for name, value in kept.items()):  # batches of different buckets
            return earlier if stays else self
        return self.with_tensors({name: torch.where(stays, value, own[name]) for name, value in kept.items()})

    def unless_before(self, earlier: "Suspect | None") -> "Suspect":
        """This suspect, or an earlier one of the same step whose loss is not finite."""
        return self if earlier is None else self.unless(~earlier.loss.isfinite(), earlier)


class FirstSkipped:
    """Keeps the suspect of the first skipped step of a run, until a log step writes it to a file.

    The choice is made on the device with a copy of one micro-batch per step and no synchronisation; after the file is
    written there are no copies. Timesteps and noise follow from the seed and the positions of the images in the order.

    Args:
        folder: folder of the files, one per process; if that of this process exists, nothing is kept.
        rank: rank of this process.
        device: device of the batches.
    """

    def __init__(self, folder: Path, rank: int, device: torch.device):
        self.folder, self.rank = folder, rank
        self._is_written = any(folder.glob(f"*-rank{rank}.safetensors"))
        self._kept: Suspect | None = None
        self._step = torch.zeros((), dtype=torch.long, device=device)  # 0 if none was skipped so far

    def note(self, step: int, suspect: Suspect, skipped: torch.Tensor):
        """Keep the suspect of a step, counted from 1, if this is the first skipped step."""
        if self._is_written:
            return
        is_found = self._step > 0
        self._kept = suspect.unless(is_found, self._kept)
        self._step = self._step.masked_fill(skipped & ~is_found, step)

    def write(
        self,
        randomness_of: Callable[[int], StepRandomness],
        random_choices: Callable[[ImageRandomness], dict[str, torch.Tensor]],
    ) -> Path | None:
        """Write the kept suspect to a file, once.

        Args:
            randomness_of: function from a step, counted from 0, to its random numbers.
            random_choices: function from the random numbers of images to what they chose, as named tensors.

        Returns:
            The file; None if there is nothing to write, or it was written before.
        """
        if self._is_written or not self._step:
            return None
        step = int(self._step)
        images = randomness_of(step - 1).images(int(self._kept.number), len(self._kept.batch))
        named = self._kept.tensors() | random_choices(images)
        tensors = {name: value.cpu().contiguous() for name, value in named.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"step-{step:08d}-rank{self.rank}.safetensors"
        save_file(tensors, file, metadata={"step": str(step), "process": str(self.rank)})
        self._kept, self._is_written = None, True
        return file
