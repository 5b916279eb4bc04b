"""The random draws of a training step, a function of (seed, step, rank), so that a resumed run is the same run."""

import torch

from improved_ldm.diffusion.objectives import Objective
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.config import TrainingConfig


class StepDraws:
    """Timesteps, noise, dropout and masks of one step on one process.

    Every purpose has a stream of its own that is read in the order of the images, so on a CPU splitting a batch into
    micro-batches changes nothing; a GPU draws other noise for other splits.

    Args:
        config: batch size, accumulation and dropout probabilities.
        objective: draws the timesteps.
        seed: of the run.
        step: counted from 0.
        rank: of the process.
        device: of the draws.
    """

    def __init__(
        self, config: TrainingConfig, objective: Objective, seed: int, step: int, rank: int, device: torch.device
    ):
        def stream(purpose: int) -> torch.Generator:
            return torch.Generator(device).manual_seed(derive_seed(seed, step, rank, purpose))

        images = config.batch_size * config.gradient_accumulation_steps
        self._timesteps = objective.draw_timesteps(images, stream(0))
        dropout = torch.rand(images, 2, generator=stream(1), device=device)
        self._drops_semantic = dropout[:, 0] < config.semantic_dropout
        self._drops_control = dropout[:, 1] < config.control_dropout
        self._noise, self.text_noise, self.masks = stream(2), stream(3), stream(4)
        self.mask_level = torch.rand(
            (), generator=torch.Generator().manual_seed(derive_seed(seed, step, rank, 5))
        ).item()
        self._batch_size = config.batch_size

    def noise_like(self, latents: torch.Tensor) -> torch.Tensor:
        """The noise of the next micro-batch, float32."""
        return torch.randn(latents.shape, generator=self._noise, device=latents.device)

    def of_micro_batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Timesteps (batch,), and which images lose their semantic condition and their control, (batch,) bool."""
        part = slice(number * self._batch_size, (number + 1) * self._batch_size)
        return self._timesteps[part], self._drops_semantic[part], self._drops_control[part]
