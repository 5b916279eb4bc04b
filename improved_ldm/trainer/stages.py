"""The stages of a run: the configuration of each, and what it starts from."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from improved_ldm.bounds import Count, Place, Sides
from improved_ldm.conditioning.guidance import rescaled_guidance_scale
from improved_ldm.diffusion.objectives import Objective
from improved_ldm.lineage import conditions_lines, lineage_record, read_control_seen, read_lineage
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.positions import PositionTransfer
from improved_ldm.naming import naming_part
from improved_ldm.places import shareable_place
from improved_ldm.provenance import write_json
from improved_ldm.resolution import latent_side, side_of, size_text
from improved_ldm.settings import Section
from improved_ldm.trainer.batches import image_transform
from improved_ldm.trainer.checkpoints import (
    SWITCH,
    checkpoint_path,
    checkpoint_steps,
    kept_file,
    newest_whole,
    read_weights,
    write_config,
)
from improved_ldm.trainer.components import check_resolution
from improved_ldm.trainer.config import Carry, Condition, RunConfig, StageConfig
from improved_ldm.trainer.data import check_buckets
from improved_ldm.trainer.denoiser_task import DenoiserTask
from improved_ldm.trainer.lock import lock_folder
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run, start_run
from improved_ldm.trainer.same_run import check_same_run
from improved_ldm.trainer.switch import ConditionSwitch, changes_record, kept_moments
from improved_ldm.transfer.conditions import ConditionChanges
from improved_ldm.transfer.resolution import NoiseTransfer, check_positions, resolution_change, transfer

STAGES = "stages.yaml"  # the configuration of a whole run with stages


class StageOrigin(Section):
    """What a stage after the first starts from."""

    source: Place
    """Folder of the stage before."""
    steps: Count
    """Optimizer steps of the stage before."""
    resolution: tuple[Sides, Sides]
    """Resolutions of the stage before and of the stage, in pixels."""
    condition: tuple[Condition, Condition] | None = None
    """Kinds of condition of the stage before and of the stage, if they differ."""
    positions: PositionTransfer
    """How positions of patches change."""
    noise: NoiseTransfer
    """How the noise schedule changes."""
    optimizer: Carry
    """Whether the moments of the optimizer are carried over."""
    average: Carry
    """Whether the averaged weights are carried over."""


class LaterStageConfig(RunConfig):
    """The configuration of a stage after the first, as saved in its folder and checkpoints; users do not write it."""

    after: StageOrigin
    """What the stage starts from; another origin makes it another run."""


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Args:
        number: number of the stage, counted from 0.
        config: configuration of the stage alone.
        condition: what its images are conditioned on.
        name: number of the stage and of all stages, for messages; empty without stages.
        lineage: what its weights are made from, for the pipeline.
        switch: settings of the switch from the stage before; None in the first stage.
        previous: configuration of the stage before; None in the first stage.
        conditions: change of the conditions from the stage before; None if they stay as they are.
    """

    number: int
    config: RunConfig
    condition: Condition
    name: str = ""
    lineage: tuple[dict[str, Any], ...] = ()
    switch: StageConfig | None = None
    previous: RunConfig | None = None
    conditions: ConditionSwitch | None = None

    @property
    def folder(self) -> Path:
        """Folder for everything that the stage writes."""
        return Path(self.config.output_dir)

    @property
    def has_begun(self) -> bool:
        """Whether the stage has checkpoints of its own."""
        return bool(checkpoint_steps(self.folder / "checkpoints"))

    @property
    def is_finished(self) -> bool:
        """Whether the stage was trained to its last step, saved and evaluated, and its last checkpoint is intact."""
        if not self.has_begun or not (self.folder / "metrics.json").exists():
            return False
        return on_main_process(self._newest_step) >= self.config.training.steps

    def control_seen(self) -> dict[str, Any] | None:
        """The ranges of the control that the weights it starts from were trained with; None if they are not known."""
        source = self.config.denoiser.pretrained if self.previous is None else self.previous.output_dir
        return {} if source is None else read_control_seen(Path(source))

    def _newest_step(self) -> int:
        return newest_whole(self.folder / "checkpoints", say=lambda _: None) or 0


def list_stages(config: RunConfig, condition: Condition) -> list[Stage]:
    """The stages of a configuration; a single one if it names none.

    Args:
        config: configuration of the whole run.
        condition: kind of condition of the first stage if that gives none.

    Raises:
        ValueError: if a stage gives a key of the other kind of condition, or the folder holds a run that has started
            another list of stages.
    """
    stages = _listed_stages(config, condition)
    _check_list(config, condition, stages)
    return stages


def _listed_stages(config: RunConfig, condition: Condition) -> list[Stage]:
    if not config.stages:
        return [Stage(0, config, condition, lineage=_source_lineage(config))]
    names, kinds = config.stage_names(), config.stage_conditions(condition)
    stages = [Stage(0, config.of_stage(0), kinds[0], names[0], _source_lineage(config))]
    for number, switch in enumerate(config.stages[1:], 1):
        previous, now = stages[-1].config, config.of_stage(number)
        sizes, guidance_scale = (previous.transform.resolution, switch.resolution), previous.sampling.guidance_scale
        if switch.guidance == "rescale":
            guidance_scale = rescaled_guidance_scale(guidance_scale, *map(side_of, sizes))
        origin = StageOrigin(
            source=previous.output_dir,
            steps=previous.training.steps,
            resolution=sizes,
            condition=None if kinds[number] == kinds[number - 1] else (kinds[number - 1], kinds[number]),
            **switch.model_dump(include={"positions", "noise", "optimizer", "average"}),
        )
        sampling = now.sampling.model_copy(update={"guidance_scale": guidance_scale})
        begun = LaterStageConfig(**{**now.model_dump(), "sampling": sampling}, after=origin)
        change = resolution_change(*sizes, switch.positions, switch.noise, switch.guidance)
        sources = [", ".join(map(shareable_place, one.data.places)) for one in (previous, now)]
        if sources[0] != sources[1]:
            change["data"] = sources
        # how the conditions change is known when the stage begins
        record = lineage_record(**{**origin.model_dump(mode="json", exclude={"condition"}), **change})
        lineage = (*stages[-1].lineage, record)
        stages.append(Stage(number, begun, kinds[number], names[number], lineage, switch, previous))
    return stages


def _check_list(config: RunConfig, condition: Condition, stages: list[Stage]):
    """Raise a ValueError if stages that have started differ; those that have not may change."""
    before = _earlier_list(config, condition)
    begun = [stage.folder for stage in before if stage.has_begun]
    if begun != [stage.folder for stage in stages[: len(begun)]]:
        was, now = (
            f"{len(part)} at {', '.join(size_text(stage.config.transform.resolution) for stage in part)} pixels"
            for part in (before, stages)
        )
        raise ValueError(
            f"`stages` are {now}, but {config.output_dir} holds a run of {was}, {len(begun)} of them started: these "
            "must stay as they are. Give the same `--stages`, or choose another `--output_dir`."
        )


def _earlier_list(config: RunConfig, condition: Condition) -> list[Stage]:
    """The stages of the run in the folder; none if its record of them is damaged."""
    file, without_stages = Path(config.output_dir) / STAGES, config.model_copy(update={"stages": ()})
    if not file.exists():
        return _listed_stages(without_stages, condition)
    try:
        kept = RunConfig.model_validate(yaml.safe_load(file.read_bytes()))
    except (ValueError, yaml.YAMLError):  # damaged; each stage is still compared with its own checkpoints
        return []
    return _listed_stages(kept.model_copy(update={"output_dir": config.output_dir}), condition)


def _source_lineage(config: RunConfig) -> tuple[dict[str, Any], ...]:
    """The lineage of the denoiser that a run begins from, and that denoiser itself."""
    source = config.denoiser.pretrained
    if source is None:
        return ()
    return tuple(lineage_record(**record) for record in (*read_lineage(Path(source)), {"source": source}))


def check_stages(stages: Sequence[Stage], denoiser: Denoiser, factor: int):
    """Raise a ValueError if a stage cannot start, before the first one does.

    Args:
        stages: stages of the run.
        denoiser: denoiser of the first stage.
        factor: side of a latent pixel, in pixels.
    """
    for stage in stages:
        check_same_run(stage.config, stage.folder)
        image_transform(stage.config)
        check_buckets(stage.config.transform, factor * denoiser.patch_size)
        check_resolution(stage.config, factor * denoiser.patch_size, "`resolution` of a stage")
        if stage.switch is not None:
            transform, positions = stage.config.transform, stage.switch.positions
            check_positions(denoiser, positions, isinstance(transform.resolution, int) and not transform.buckets)
            denoiser.resized_positions(latent_side(transform.resolution, factor, denoiser.patch_size), positions)
        if stage.conditions is not None:
            with naming_part(stage.name):
                stage.conditions.check(denoiser)


def iterate_stages(
    stages: Sequence[Stage], run: Run, denoiser: Denoiser, objective: Objective, config: RunConfig, factor: int
) -> Iterator[tuple[Stage, Run, DenoiserTask]]:
    """Start the stages one after the other; finished ones are skipped, except the last.

    Args:
        stages: checked stages of the run.
        run: started run of the first stage.
        denoiser: denoiser that the first stage starts from.
        objective: objective of the first stage.
        config: configuration of the whole run, which is saved in its folder.
        factor: side of a latent pixel, in pixels.
    """
    staged, lineage = bool(config.stages), stages[0].lineage
    if staged:
        on_main_process(lambda: lock_folder(Path(config.output_dir), run.say))
    for stage, following in zip(stages, (*stages[1:], None), strict=True):
        start = begin_stage(stage, denoiser, objective, factor)
        denoiser, objective = start.model, start.objective
        if stage.switch is not None:
            lineage = (*lineage, stage.lineage[-1] | start.changes)
        # a following stage that has started needs nothing from this one
        if following is not None and (following.has_begun or stage.is_finished):
            run.say(f"{stage.name} is finished")
            continue
        if staged:
            size = size_text(stage.config.transform.resolution)
            run.say(f"{stage.name}: {size} pixels, {stage.config.training.steps} steps")
        if stage.switch is not None:
            run = start_run(stage.config)
        if staged and run.accelerator.is_main_process:
            write_config(config.file_values(), Path(config.output_dir) / STAGES)
            _record_changes(stage, run, start)
        yield replace(stage, lineage=lineage), replace(run, stage=stage.name), start


def _record_changes(stage: Stage, run: Run, start: DenoiserTask):
    """Print and write what a stage that begins keeps of the stage before and what begins anew."""
    if start.changes and not stage.has_begun:
        run.say("\n".join(conditions_lines(start.changes)))
        write_json(stage.folder / SWITCH, start.changes)


def begin_stage(stage: Stage, denoiser: Denoiser, objective: Objective, factor: int) -> DenoiserTask:
    """What a stage starts from: what is given in the first stage, otherwise the end of the stage before.

    The weights are read from the last checkpoint of the stage before, so that a resumed run starts a stage like an
    uninterrupted one. A stage that has checkpoints of its own resumes from those.

    Args:
        stage: stage to start.
        denoiser: denoiser of the stage before; only its configuration is used.
        objective: objective of the stage before.
        factor: side of a latent pixel, in pixels.

    Raises:
        FileNotFoundError: if the stage before has no checkpoint.
        ValueError: if none of its checkpoints is intact.
    """
    if stage.switch is None:
        return DenoiserTask(denoiser, objective)
    old, new = stage.previous.transform.resolution, stage.config.transform.resolution
    if stage.switch.noise == "rescale":
        objective = objective.rescaled(side_of(old), side_of(new))

    def moved(model: Denoiser) -> tuple[Denoiser, ConditionChanges | None]:
        changes = None
        if stage.conditions is not None:
            model, changes = stage.conditions.apply(model)
        return transfer(model, new, stage.switch.positions, stage.switch.noise, factor), changes

    if stage.has_begun:  # it resumes from its own
        return DenoiserTask(moved(denoiser)[0], objective, changes=_changes_before(stage))

    folder = _end_of(Path(stage.previous.output_dir) / "checkpoints")

    def read(name: str) -> Denoiser:
        model = denoiser.remade().to("cpu")  # where a resumed run starts the stage, too
        model.load_state_dict(read_weights(folder / name))
        return model

    averages, moments = stage.switch.average == "carry", None
    averaged = moved(read("ema.safetensors"))[0] if averages else None
    model = read("model.safetensors")
    begun, changes = moved(model)
    if stage.switch.optimizer == "carry":
        moments = torch.load(folder / "optimizer.bin", map_location="cpu", weights_only=True)
    if changes is None:
        return DenoiserTask(begun, objective, averaged, moments)
    moments = moments and kept_moments(moments, model, begun, changes.kept)
    places = moments["state"] if moments else ()
    return DenoiserTask(
        begun,
        objective,
        averaged,
        moments,
        changes_record(stage.conditions, model, begun, changes, places, averages),
    )


def _changes_before(stage: Stage) -> dict[str, Any]:
    """What was recorded of a change of conditions when a stage began; without its record, the conditions alone."""
    if stage.conditions is None:
        return {}
    file = kept_file(stage.folder / "checkpoints", SWITCH) or stage.folder / SWITCH
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {"conditions": list(stage.conditions.described), **record}


def _end_of(folder: Path) -> Path:
    """The newest intact checkpoint in a folder."""
    step = on_main_process(lambda: newest_whole(folder, print))
    if step is None:
        raise FileNotFoundError(f"{folder} holds no checkpoint to begin the next stage with.")
    return checkpoint_path(folder, step)
