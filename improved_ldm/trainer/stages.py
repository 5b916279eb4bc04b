"""The stages of a run: the configuration of each, and what it begins from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from improved_ldm.diffusion.objectives import Objective
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.trainer.config import RunConfig, StageConfig
from improved_ldm.trainer.state import newest_checkpoint


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        config: of the stage alone.
        lineage: what its weights are made from, for the pipeline.
        switch: what happens on the way to it from the stage before; None in the first stage.
        previous: configuration of the stage before.
    """

    config: RunConfig
    lineage: tuple[dict[str, Any], ...] = ()
    switch: StageConfig | None = None
    previous: RunConfig | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the stage was trained, saved and evaluated before."""
        return (Path(self.config.output_dir) / "metrics.json").exists()


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
    configs = [config.of_stage(number) for number in range(len(config.stages))] or [config]
    pretrained = config.denoiser.pretrained
    stages = [Stage(configs[0], () if pretrained is None else ({"source": pretrained},))]
    for previous, now, switch in zip(configs, configs[1:], config.stages[1:], strict=False):
        step = {
            "source": previous.output_dir,
            "steps": previous.training.steps,
            "resolution": [previous.transform.resolution, now.transform.resolution],
            **switch.model_dump(include={"positions", "noise", "optimizer", "average"}),
        }
        stages.append(Stage(now, (*stages[-1].lineage, step), switch, previous))
    return stages


def begin_stage(stage: Stage, denoiser: Denoiser, objective: Objective) -> Start:
    """What a stage begins with: what is given in the first stage, else the end of the stage before.

    The weights are read from the last checkpoint of the stage before, so that a run that was stopped begins a stage as
    an unbroken one does.

    Args:
        stage: to begin.
        denoiser: of the stage before; its configuration counts.
        objective: of the stage before.
    """
    if stage.switch is None:
        return Start(denoiser, objective)
    folder = newest_checkpoint(Path(stage.previous.output_dir) / "checkpoints")
    denoisers = [_like(denoiser, _weights(folder / name)) for name in ("model.safetensors", "ema.safetensors")]
    old, new = stage.previous.transform.resolution, stage.config.transform.resolution
    sample_size = denoiser.config.sample_size * new // old
    raw, averaged = (model.resized(sample_size, stage.switch.positions) for model in denoisers)
    moments = None
    if stage.switch.optimizer == "carry":
        moments = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    return Start(
        raw,
        objective.rescaled(old, new) if stage.switch.noise == "rescale" else objective,
        averaged if stage.switch.average == "carry" else None,
        moments,
    )


def write_stages(config: RunConfig):
    """Keep the configuration of all stages beside what they leave."""
    if config.stages:
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        values = config.model_dump(mode="json")
        (folder / "stages.yaml").write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def _like(denoiser: Denoiser, weights: dict[str, torch.Tensor]) -> Denoiser:
    model = denoiser.remade()
    model.load_state_dict(weights)
    return model


def _weights(file: Path) -> dict[str, torch.Tensor]:
    """A model's tensors under its own names, without those of the wrappers of processes, compilation and average."""
    tensors = {
        name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in load_file(file).items()
    }
    tensors.pop("n_averaged", None)
    return tensors
