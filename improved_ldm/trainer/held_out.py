"""The loss of held-out images, a function of the weights alone: fixed images, noise and timesteps."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from improved_ldm.conditioning.text import encode_prompts
from improved_ldm.data.latents import EncodedBatch, SampleEncoder
from improved_ldm.data.loader import first_batches
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.spread import spread_if_possible
from improved_ldm.diffusion.objectives import Objective
from improved_ldm.evaluation.processes import gather_batches
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.seeds import normal
from improved_ldm.trainer.batches import encoder_of_run, image_transform, is_trained
from improved_ldm.trainer.data import run_buckets
from improved_ldm.trainer.denoiser_task import batch_conditions
from improved_ldm.trainer.randomness import PASS, ImageRandomness
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.sections import TextConfig

LEVELS = 8  # timesteps of each image


class HeldOutRandomness(ImageRandomness):
    """The random numbers of held-out images; each image has a sequence of its own, whose first part is that of the
    posterior sample of its latents."""

    def __init__(self, seeds: torch.Tensor):
        super().__init__(seeds, mask_level=0.5)  # nothing is masked

    def text_noise(self, shape: Sequence[int]) -> torch.Tensor:
        """(batch, *shape) standard normal, added to the repeated text tokens."""
        return normal(self.seeds, shape, PASS)

    def noise(self, shape: Sequence[int], number: int = 0) -> torch.Tensor:
        """(batch, *shape) standard normal, added to the latents at a level."""
        return normal(self.seeds, shape, (number + 2) * PASS)


def level_timesteps(objective: Objective) -> torch.Tensor:
    """(LEVELS,) timesteps in the middle of equally likely parts of the training's distribution."""
    return objective.timestep_quantile((torch.arange(LEVELS) + 0.5) / LEVELS)


@torch.no_grad()
def level_losses(
    denoiser: Denoiser, objective: Objective, batch: EncodedBatch, seeds: torch.Tensor, text: TextConfig
) -> torch.Tensor:
    """The training loss of images at each of `level_timesteps`, with no condition dropped.

    A denoiser of several training passes, such as mDT, is measured in the pass that it samples with, over all patches.

    Args:
        denoiser: the denoiser, in evaluation mode.
        objective: the training objective.
        batch: the images, encoded.
        seeds: (batch,) int64 seed of each image's noise.
        text: padding of the text.

    Returns:
        (batch, LEVELS) float32.

    Source: our choice.
    """
    randomness, losses = HeldOutRandomness(seeds), []
    conditions = batch_conditions(batch, text, randomness).only(denoiser.inputs)
    for level, timestep in enumerate(level_timesteps(objective).to(seeds.device)):
        timestep = timestep.expand(len(batch))
        noise = randomness.noise(batch.latents.shape[1:], level)
        noisy = objective.add_noise(batch.latents, noise, timestep)
        prediction = denoiser(noisy, timestep, **conditions.kwargs(), return_dict=False)[0]
        losses.append(sum(objective.losses(prediction, batch.latents, noise, timestep).values()))
    return torch.stack(losses, dim=1)


@dataclass(frozen=True)
class HeldOutBatch:
    """Held-out images of one size.

    Args:
        encoded: the images, on the device; without text if the text encoder is trained.
        seeds: (batch,) int64 seed of each image.
        captions: captions for a text encoder that is trained, else None.
    """

    encoded: EncodedBatch
    seeds: torch.Tensor
    captions: list[str] | None


class HeldOutImages:
    """The held-out images of a run, encoded once; each process has its share of the batches.

    Args:
        run: configuration, folder and processes.
        mixture: the held-out sets.
        encoder: encoder of the training images.
        denoiser: the denoiser, whose control inputs are measured.

    Raises:
        ValueError: if no image can be used.
    """

    def __init__(self, run: Run, mixture: Mixture, encoder: SampleEncoder, denoiser: Denoiser):
        self.run, self.encoder, self.count, self.batches = run, encoder_of_run(run, encoder), 0, []
        rank, processes = run.accelerator.process_index, run.accelerator.num_processes
        for number, batch in enumerate(_batches(run, mixture, denoiser)):
            self.count += len(batch["pixels"])
            if number % processes == rank:
                self.batches.append(self._encode(batch))
        if not self.count:
            raise ValueError("`validation`: none of the held-out images can be read and is used.")

    def _encode(self, batch: dict[str, Any]) -> HeldOutBatch:
        device, captions = self.run.accelerator.device, None
        if is_trained(self.encoder.text_encoder):
            latents, captions = self.encoder.latents(batch["pixels"], batch["seed"]), batch["caption"]
            encoded = EncodedBatch(latents, batch["control"])
        else:
            encoded = self.encoder(batch)
        return HeldOutBatch(encoded.to(device), batch["seed"].to(device), captions)

    def losses(self, model: nn.Module, objective: Objective) -> torch.Tensor | None:
        """`level_losses` of all images for a model, (images, LEVELS) on the CPU; None except on the main process."""
        config, parts = self.run.config, []
        with self.run.accelerator.autocast(), measuring(model, config.training.compile):
            for batch in self.batches:
                encoded = self._with_text(batch, model)
                parts.append(level_losses(model, objective, encoded, batch.seeds, config.text).cpu())
        parts = gather_batches(parts)
        return None if parts is None else torch.cat(parts)

    def _with_text(self, batch: HeldOutBatch, model: nn.Module) -> EncodedBatch:
        """A batch with its text; a text encoder that is trained belongs to the model."""
        if batch.captions is None:
            return batch.encoded
        encoder = self.encoder
        text = encode_prompts(batch.captions, encoder.tokenizer, model.text_encoder, encoder.max_tokens, warn=False)
        return replace(batch.encoded, text=text).to(batch.seeds.device)


def _batches(run: Run, mixture: Mixture, denoiser: Denoiser) -> Iterator[dict[str, Any]]:
    """The batches of all processes: images of each set by its share, in a centred crop."""
    config, processes = run.config, run.accelerator.num_processes
    transform = image_transform(config, denoiser.control_inputs).centred()
    for rows, count in mixture.parts(config.validation.num_images):
        batch_size = min(config.training.batch_size, -(-count // processes))
        yield from first_batches(
            spread_if_possible(rows, count), transform, count, batch_size, run_buckets(config.transform)
        )


@contextlib.contextmanager
def measuring(model: nn.Module, compiled: bool):
    """Measure a model in evaluation mode and leave everything as it was.

    Compiled blocks run as they are written, because other shapes would change what is compiled for training.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
