"""The random numbers of a training step: functions of the seed and an image's place in the order of the run.

They do not depend on the number of processes, the batch size or the accumulation, and are the same in a resumed run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from improved_ldm.seeds import derive_seed, derive_seeds, normal, uniform

# Every purpose reads its own part of an image's sequence of numbers, 2**40 long; a pass of the denoiser its own part
# of that, 2**36 long.
TIMESTEP, DROPOUT, NOISE, TEXT_NOISE, MASK, MIRROR = (number << 40 for number in range(6))
PASS = 1 << 36


@dataclass(frozen=True)
class ImageRandomness:
    """The random numbers of the images of one micro-batch; each image has a sequence of its own.

    Args:
        seeds: (batch,) int64, on the device of the results.
        mask_level: a number in (0, 1), the same for all images of the step on all processes.
    """

    seeds: torch.Tensor
    mask_level: float

    def timestep_fractions(self) -> torch.Tensor:
        """(batch,) uniform numbers in (0, 1), for the timesteps."""
        return uniform(self.seeds, (1,), TIMESTEP)[:, 0]

    def dropped(
        self, semantic_dropout: float, control_dropout: float, number: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Which images lose their semantic condition and which their control in a pass, each (batch,) bool."""
        semantic, control = uniform(self.seeds, (2,), DROPOUT + number * PASS).unbind(1)
        return semantic < semantic_dropout, control < control_dropout

    def noise(self, shape: Sequence[int], number: int = 0) -> torch.Tensor:
        """(batch, *shape) standard normal, added to the latents in a pass."""
        return normal(self.seeds, shape, NOISE + number * PASS)

    def text_noise(self, shape: Sequence[int]) -> torch.Tensor:
        """(batch, *shape) standard normal, added to the repeated text tokens."""
        return normal(self.seeds, shape, TEXT_NOISE)

    def mask_uniform(self, count: int) -> torch.Tensor:
        """(batch, count) uniform in (0, 1), for the mask of a denoiser."""
        return uniform(self.seeds, (count,), MASK)

    def mirrored(self, probability: float) -> torch.Tensor:
        """Which latents are mirrored before they are decoded, (batch,) bool."""
        return uniform(self.seeds, (1,), MIRROR)[:, 0] < probability


class StepRandomness:
    """The random numbers of one step on one process.

    Args:
        seed: seed of the run.
        step: step, counted from 0.
        batch_size: images per process and micro-batch.
        micro_batches: micro-batches per process and step.
        rank: rank of the process.
        world_size: number of processes.
        device: device of the results.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch_size: int,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.seed, self.step, self.batch_size, self.micro_batches = seed, step, batch_size, micro_batches
        self.rank, self.world_size, self.device = rank, world_size, device
        self.mask_level = uniform(torch.tensor([derive_seed(seed, step)]), (1,)).item()

    def images(self, micro_batch: int, count: int | None = None) -> ImageRandomness:
        """The random numbers of the images of a micro-batch.

        The processes take the batches of the run's order in turn.

        Args:
            micro_batch: number of the micro-batch, counted from 0.
            count: number of its images, if these are fewer than `batch_size`.
        """
        batch = (self.step * self.micro_batches + micro_batch) * self.world_size + self.rank
        places = torch.arange(count or self.batch_size, device=self.device) + batch * self.batch_size
        return ImageRandomness(derive_seeds(self.seed, places), self.mask_level)
