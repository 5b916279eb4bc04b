"""The stages of a run: the configuration of each, and what it begins from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from improved_ldm.diffusion.objectives import Objective
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.trainer.batches import image_transform
from improved_ldm.trainer.config import RunConfig, StageConfig
from improved_ldm.trainer.run import Run, start_run, write_config
from improved_ldm.trainer.state import check_same_run, checkpoint_steps, newest_checkpoint


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        number: counted from 0.
        config: of the stage alone.
        lineage: what its weights are made from, for the pipeline.
        switch: what happens on the way to it from the stage before; None in the first stage.
        previous: configuration of the stage before.
    """

    number: int
    config: RunConfig
    lineage: tuple[dict[str, Any], ...] = ()
    switch: StageConfig | None = None
    previous: RunConfig | None = None

    @property
    def folder(self) -> Path:
        """Where the stage leaves everything."""
        return Path(self.config.output_dir)

    @property
    def checkpoint_steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return checkpoint_steps(self.folder / "checkpoints")

    @property
    def is_finished(self) -> bool:
        """Whether the stage was trained to its last step, saved and evaluated."""
        trained = self.checkpoint_steps and self.checkpoint_steps[-1] >= self.config.training.steps
        return bool(trained) and (self.folder / "metrics.json").exists()


@dataclass(frozen=True)
class Start:
    """What the training of a stage begins with; the fields are arguments of `train`.

    Args:
        denoiser: the weights.
        objective: with the stage's noise schedule.
        averaged: the average of the weights, or None to begin it from them.
        optimizer_state: the optimizer's moments, or None.
    """

    denoiser: Denoiser
    objective: Objective
    averaged: Denoiser | None = None
    optimizer_state: dict[str, Any] | None = None


def stages_of(config: RunConfig) -> list[Stage]:
    """The stages of a configuration; one, where it names none."""
    if not config.stages:
        return [Stage(0, config, _source_lineage(config))]
    configs = [config.of_stage(number) for number in range(len(config.stages))]
    stages = [Stage(0, configs[0], _source_lineage(config))]
    for number, (previous, now, switch) in enumerate(zip(configs, configs[1:], config.stages[1:], strict=False), 1):
        step = {
            "source": previous.output_dir,
            "steps": previous.training.steps,
            "resolution": [previous.transform.resolution, now.transform.resolution],
            **switch.model_dump(include={"positions", "noise", "optimizer", "average"}),
        }
        begun = now.model_copy(update={"after": step})  # another beginning is another run
        stages.append(Stage(number, begun, (*stages[-1].lineage, step), switch, previous))
    return stages


def _source_lineage(config: RunConfig) -> tuple[dict[str, Any], ...]:
    """The lineage of the denoiser that a run begins from, and that denoiser itself."""
    source = config.denoiser.pretrained
    if source is None:
        return ()
    index = Path(source) / "model_index.json"
    before = json.loads(index.read_text()).get("lineage") if index.is_file() else None
    return (*(before or ()), {"source": source})


def check_stages(stages: list[Stage], denoiser: Denoiser, factor: int):
    """Raise a ValueError for a stage that could not begin, before the first one does.

    Args:
        stages: of the run.
        denoiser: of the first stage.
        factor: pixels a side of a latent pixel.
    """
    for stage in stages:
        check_same_run(stage.config, stage.folder)
        image_transform(stage.config)
        resolution, multiple = stage.config.transform.resolution, factor * denoiser.patch_size
        if resolution % multiple:
            raise ValueError(f"`resolution` of a stage is {resolution}; it must be a multiple of {multiple} pixels.")
        if stage.switch is not None:
            denoiser.resized_positions(resolution // factor, stage.switch.positions)


def begun_stages(
    stages: list[Stage], run: Run, denoiser: Denoiser, objective: Objective, config: RunConfig
) -> Iterator[tuple[Stage, Run, Start]]:
    """Begin the stages one after the other; those that are finished are passed over, but for the last.

    Args:
        stages: of the run, checked.
        run: of the first stage, started.
        denoiser: that the first stage begins with.
        objective: of the first stage.
        config: of the whole run; it is kept in its folder.
    """
    for stage in stages:
        start = begin_stage(stage, denoiser, objective)
        denoiser, objective = start.denoiser, start.objective
        if stage.is_finished and stage is not stages[-1]:
            continue
        if stage.switch is not None:
            run = start_run(stage.config)
        if config.stages and run.accelerator.is_main_process:
            write_config(config, Path(config.output_dir) / "stages.yaml")
        yield stage, run, start


def begin_stage(stage: Stage, denoiser: Denoiser, objective: Objective) -> Start:
    """What a stage begins with: what is given in the first stage, else the end of the stage before.

    The weights are read from the last checkpoint of the stage before, so that a run that was stopped begins a stage as
    an unbroken one does. A stage that has checkpoints of its own goes on with those.

    Args:
        stage: to begin.
        denoiser: of the stage before; its configuration counts.
        objective: of the stage before.
    """
    if stage.switch is None:
        return Start(denoiser, objective)
    old, new = stage.previous.transform.resolution, stage.config.transform.resolution
    sample_size = denoiser.config.sample_size * new // old
    if stage.switch.noise == "rescale":
        objective = objective.rescaled(old, new)
    if stage.checkpoint_steps:  # it goes on with its own
        return Start(denoiser.resized(sample_size, stage.switch.positions), objective)

    folder = newest_checkpoint(Path(stage.previous.output_dir) / "checkpoints")

    def resized(name: str) -> Denoiser:
        model = denoiser.remade()
        model.load_state_dict(_weights(folder / name))
        return model.resized(sample_size, stage.switch.positions)

    moments = None
    if stage.switch.optimizer == "carry":
        moments = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    averaged = resized("ema.safetensors") if stage.switch.average == "carry" else None
    return Start(resized("model.safetensors"), objective, averaged, moments)


def _weights(file: Path) -> dict[str, torch.Tensor]:
    """A model's tensors under its own names, without those of the wrappers of processes, compilation and average."""
    tensors = {
        name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in load_file(file).items()
    }
    tensors.pop("n_averaged", None)
    return tensors
