"""What a run measures of held-out images while it trains; the training is the same with and without it."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from improved_ldm.data.latents import SampleEncoder
from improved_ldm.diffusion.objectives import Objective
from improved_ldm.output import writing
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.provenance import read_json_lines, write_json_lines
from improved_ldm.trainer.checkpoints import HISTORY, VALIDATION
from improved_ldm.trainer.denoiser_task import DenoiserTask
from improved_ldm.trainer.held_out import LEVELS, HeldOutImages, level_timesteps
from improved_ldm.trainer.held_out_data import NO_SPLIT, HeldOut
from improved_ldm.trainer.loss_plot import PICTURE, plot_loss
from improved_ldm.trainer.reports import finite_or_none, read_history
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.sample_distance import DISTANCES, SampleDistance

MAX_COST = 0.02  # share of the training's computation that held-out losses cost by default
FORWARD = 1 / 3  # computation of a forward pass, as a share of that of a training step
EVERY = 100  # the default number of steps is a multiple of it


class Validation:
    """Measures held-out losses and distances of samples at regular steps; writes them to a file and to the trackers.

    Args:
        run: configuration, folder and processes.
        objective: training objective.
        held_out: the held-out sets.
        images: held-out images of the loss; None measures none.
        distance: distance of samples; None measures none.
    """

    def __init__(
        self,
        run: Run,
        objective: Objective,
        held_out: HeldOut,
        images: HeldOutImages | None,
        distance: SampleDistance | None,
    ):
        self.run, self.objective, self.images, self.distance = run, objective, images, distance
        self.about = {"source": held_out.places, "split": held_out.config.split}
        self.file, self.records = run.folder / VALIDATION, []

    def resume(self, step: int):
        """Keep the records until a step; one that was made only because the run ended there is made again later."""
        goes_on = step < self.run.config.training.steps
        if not self.run.accelerator.is_main_process or not self.file.exists():
            return

        def stays(record: dict[str, Any]) -> bool:
            is_extra = "loss" in record and not self._is_regular(step)
            return record["step"] < step or (record["step"] == step and not (goes_on and is_extra))

        self.records = list(filter(stays, read_validation(self.run.folder, self.run.say)))
        with writing(self.file):
            write_json_lines(self.file, self.records)

    def _is_regular(self, step: int) -> bool:
        return self.images is not None and step % steps_between(self.run) == 0

    def after_step(self, step: int, live: nn.Module, averaged: nn.Module):
        """Measure what is due after a step, counted from 1, on all processes together.

        Args:
            step: the step.
            live: the trained model.
            averaged: the model with the averaged weights.
        """
        is_last = self.images is not None and step == self.run.config.training.steps
        if is_last or self._is_regular(step):
            self._record(step, self._losses(live, averaged))
        if self.distance is not None and step % self.run.config.validation.samples_every == 0:
            self._record(step, self.distance.measure(averaged, step))

    def _losses(self, live: nn.Module, averaged: nn.Module) -> dict[str, Any]:
        """The held-out losses of both models, over all images and for each level; empty except on the main process."""
        values = {}
        for name, model in (("loss", live), ("averaged_loss", averaged)):
            losses = self.images.losses(model, self.objective)
            if losses is not None:
                by_level = losses.double().mean(0)
                values[name] = finite_or_none(by_level.mean().item())
                values[f"{name}_by_level"] = list(map(finite_or_none, by_level.tolist()))
        if not values:
            return {}
        timesteps = [round(timestep, 1) for timestep in level_timesteps(self.objective).tolist()]
        return {"held_out_images": self.images.count, "timesteps": timesteps, **values}

    def _record(self, step: int, measured: dict[str, Any]):
        """Write what was measured to the file and the trackers; nothing is measured except on the main process."""
        if not measured:
            return
        self.records.append({"step": step, "images": step * self.run.images_per_step, **self.about, **measured})
        with writing(self.file):
            write_json_lines(self.file, self.records)
        if "loss" in measured:
            live, averaged = (_in_words(measured[name]) for name in ("loss", "averaged_loss"))
            self.run.say(f"step {step}: held-out loss {live}, of the averaged weights {averaged}")
        tracked = {f"validation/{name}": value for name, value in _tracked(measured).items() if value is not None}
        self.run.accelerator.log(tracked, step=step)

    def draw(self):
        """Draw the losses until now, on the main process."""
        if self.run.accelerator.is_main_process:
            plot_loss(read_history(self.run.folder / HISTORY, self.run.say), self.records, self.run.folder / PICTURE)


def _tracked(measured: dict[str, Any]) -> dict[str, float | None]:
    """The numbers of a record by their names in the trackers; distances are named with their samples and features."""
    if "samples" in measured:
        about = re.sub(r"\W+", "_", f"{measured['samples']} samples {measured['features']}")
        return {f"{name}_{about}": measured[name] for name in DISTANCES}
    values = {name: measured[name] for name in ("loss", "averaged_loss")}
    for name in ("loss_by_level", "averaged_loss_by_level"):
        values |= {f"{name}/{level}": loss for level, loss in enumerate(measured[name], 1)}
    return values


def open_validation(
    run: Run, held_out: HeldOut | None, task: DenoiserTask, encoder: SampleEncoder, pipeline: ImprovedLDMPipeline
) -> Validation | None:
    """Encode the held-out images of a run, and say what is measured; None if nothing is.

    Args:
        run: configuration, folder and processes.
        held_out: the held-out sets, or None.
        task: the denoiser and its objective.
        encoder: encoder of the training images.
        pipeline: pipeline to sample with.

    Raises:
        ValueError: if no held-out image can be used, or too few for a distance.
    """
    config = run.config.validation
    if held_out is None:
        if config.every != 0:
            run.say(f"no held-out loss: {NO_SPLIT}; `validation.split` or `validation.source` names held-out images")
        return None
    images = distance = None
    if config.every != 0:
        images = HeldOutImages(run, held_out.mixture, encoder, task.model)
        few = f", all that there are of {config.num_images}" if images.count < config.num_images else ""
        run.say(
            f"held-out loss every {steps_between(run)} steps and at the end, on {images.count} images{few}: "
            f"{held_out.described}"
        )
    if config.samples_every:
        distance = SampleDistance(run, held_out, pipeline)
    return Validation(run, task.objective, held_out, images, distance)


def steps_between(run: Run) -> int:
    """Steps between two held-out losses; by default as often as `MAX_COST` allows, in multiples of `EVERY`."""
    config = run.config.validation
    if config.every is not None:
        return config.every
    cost = 2 * LEVELS * config.num_images * FORWARD  # of both models, in training images
    return EVERY * math.ceil(cost / (MAX_COST * run.images_per_step * EVERY))


def read_validation(folder: Path, say: Callable[[str], Any]) -> list[dict[str, Any]]:
    """The records of a run's held-out measurements; `say` is told of damaged lines, which are left out."""
    return [record for record in read_json_lines(folder / VALIDATION, on_damage=say) if "step" in record]


def held_out_at(records: list[dict[str, Any]], step: int) -> dict[str, Any] | None:
    """The record with the held-out loss after a step; None if there is none."""
    return next((record for record in records if "loss" in record and record["step"] == step), None)


def _in_words(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"
