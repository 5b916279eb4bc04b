"""The checkpoints of a run: written completely or not at all, found again, and resumed exactly."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

from improved_ldm.data.tally import given_by_source, skipped_rows
from improved_ldm.manifest import MANIFEST, find_damage, has_manifest, is_intact, write_manifest
from improved_ldm.output import writing
from improved_ldm.provenance import write_json, write_text
from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.processes import on_main_process

CONFIG, HISTORY, VALIDATION, DATA = "config.yaml", "history.jsonl", "validation.jsonl", "data.json"
SWITCH = "switch.json"  # what a stage keeps of the stage before, if its conditions are others
RECORDS = (HISTORY, VALIDATION)  # what a run has measured until a step
KEPT = (*RECORDS, DATA, SWITCH)  # files of the run's folder of which checkpoints hold a copy
RECORD = "checkpoint.json"
NEEDED = ("ema.safetensors", "data-rank0.json")  # files that a checkpoint without a manifest must have


class Checkpoints:
    """The checkpoints of a run: model, optimizer, EMA, position of each rank in the data, and a manifest of all files.

    accelerate saves model and optimizer; position in the data and progress are JSON files, one of each per rank.

    Args:
        accelerator: accelerator of the run, after it has prepared the model and the optimizer.
        folder: folder of the checkpoints, in the run's folder.
        keep: number of checkpoints to keep.
        ema: the averaged model.
        batches: the loader, with `state_dict` and `load_state_dict`.
        frozen: names of the model's weights that are not trained; they are not saved.
        images_per_step: images per step of all processes.
        config: configuration of the run; checkpoints hold it as given, because they stay on this machine.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        keep: int,
        ema: AveragedModel,
        batches,
        frozen: frozenset[str],
        images_per_step: int,
        config: SharedConfig,
    ):
        self.accelerator, self.folder, self.keep, self.ema, self.batches = accelerator, folder, keep, ema, batches
        self.frozen, self.images_per_step, self.config = frozen, images_per_step, config
        self.whole: set[int] = set()  # steps of intact checkpoints that this process wrote or read
        self.damaged: set[int] = set()
        self.place: dict[str, Any] | None = None  # position in the data after the last finished step
        accelerator.register_save_state_pre_hook(self._leave_out_frozen)

    def steps(self) -> list[int]:
        """Steps of the existing checkpoints, in order."""
        return checkpoint_steps(self.folder)

    def mark_place(self):
        """Remember the position in the data after a step; batches of a later, unfinished step are read again."""
        self.place = self.batches.state_dict()

    def save(self, step: int, progress: dict[str, Any]):
        """Write the checkpoint of the last marked step, all ranks together; it appears when it is complete.

        Args:
            step: last finished step.
            progress: progress of this rank, as JSON values; `resume` returns it.

        Raises:
            OutputError: if it cannot be written; existing checkpoints stay.
        """
        if step in self.whole:
            return
        unfinished = self.folder / f"unfinished-{step}"
        try:
            with writing(self._path(step)):
                self._write(unfinished, step, progress)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self.whole.add(step)
        self.accelerator.wait_for_everyone()

    def _write(self, unfinished: Path, step: int, progress: dict[str, Any]):
        on_main_process(lambda: self._begin(unfinished))
        self.accelerator.save_state(str(unfinished))
        write_text(self._rank_file(unfinished, "data"), json.dumps(self.place))
        write_text(self._rank_file(unfinished, "progress"), json.dumps(progress))
        self.accelerator.wait_for_everyone()
        on_main_process(lambda: self._finish(unfinished, step))

    def _begin(self, unfinished: Path):
        for left in self.folder.glob("unfinished-*"):  # left by runs that were killed
            shutil.rmtree(left)
        unfinished.mkdir(parents=True)

    def _finish(self, unfinished: Path, step: int):
        with writing(self._path(step)):
            tensors = {name: value.contiguous() for name, value in self._trained(self.ema.state_dict()).items()}
            save_file(tensors, unfinished / "ema.safetensors")
            for file in (self.folder.parent / name for name in KEPT):
                if file.exists():
                    shutil.copyfile(file, unfinished / file.name)
            write_config(self.config.model_dump(mode="json"), unfinished / CONFIG)
            write_json(unfinished / RECORD, self._record(step))
            write_manifest(unfinished)
            if self._path(step).exists():  # a damaged one
                shutil.rmtree(self._path(step))
            unfinished.rename(self._path(step))
            self._remove_superseded(step)

    def _record(self, step: int) -> dict[str, int]:
        return {
            "step": step,
            "images": step * self.images_per_step,
            "images_per_step": self.images_per_step,
            "num_processes": self.accelerator.num_processes,
        }

    def _remove_superseded(self, step: int):
        """Remove damaged checkpoints before a new one, and intact ones beyond the number to keep."""
        self.damaged.discard(step)
        earlier = [other for other in self.steps() if other <= step]
        damaged = [other for other in earlier if other in self.damaged]
        whole = [other for other in earlier if other not in self.damaged]
        for other in (*damaged, *whole[: -self.keep]):
            shutil.rmtree(self._path(other))

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest intact checkpoint, if there is one.

        Returns:
            Its step and this rank's progress; 0 and an empty dict if there is no checkpoint.

        Raises:
            ValueError: if there are checkpoints but none is intact.
        """
        step = on_main_process(lambda: newest_whole(self.folder, print))
        if step is None:
            return 0, {}
        self.whole, self.damaged = {step}, {newer for newer in self.steps() if newer > step}
        path = self._path(step)
        self.accelerator.load_state(str(path), strict=not self.frozen)
        self.ema.load_state_dict(load_file(path / "ema.safetensors"), strict=not self.frozen)
        self.batches.load_state_dict(json.loads(self._rank_file(path, "data").read_text(encoding="utf-8")))
        for name in RECORDS:
            if self.accelerator.is_main_process and (path / name).exists():
                write_text(self.folder.parent / name, (path / name).read_text(encoding="utf-8"))
        progress = self._rank_file(path, "progress")
        return step, json.loads(progress.read_text(encoding="utf-8")) if progress.exists() else {}

    def _trained(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A model's tensors without the frozen ones; wrappers put `module.` before their names."""
        return {name: value for name, value in tensors.items() if name.removeprefix("module.") not in self.frozen}

    def _leave_out_frozen(self, models: list, weights: list[dict[str, Any]], folder: str):
        """Hook of accelerate, which then writes `weights`."""
        weights[:] = map(self._trained, weights)

    def _path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    def _rank_file(self, path: Path, what: str) -> Path:
        return path / f"{what}-rank{self.accelerator.process_index}.json"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return folder / f"step-{step:08d}"


def newest_whole(folder: Path, say: Callable[[str], Any]) -> int | None:
    """The step of the newest intact checkpoint, whose files are as they were written; None if there is no checkpoint.

    A checkpoint without a manifest counts if it has the files that a run needs and no older one has a manifest.

    Args:
        folder: folder of the checkpoints.
        say: called with one line on what is wrong with newer ones.

    Raises:
        ValueError: if there are checkpoints but none is intact.
    """
    steps, damaged = checkpoint_steps(folder), []
    for step in reversed(steps):
        path = checkpoint_path(folder, step)
        problem = _problem(path, [checkpoint_path(folder, earlier) for earlier in steps if earlier < step])
        if problem is not None:
            damaged.append(f"{path}: {problem}")
            continue
        if damaged:
            say(f"{'; '.join(damaged)}. Step {step}, the newest intact checkpoint, is used")
        if not has_manifest(path):
            say(f"{path} has no {MANIFEST} to check it against; it is used without a check")
        return step
    if damaged:
        raise ValueError(
            f"{folder} holds no intact checkpoint: {'; '.join(damaged)}. Restore one from a copy, or choose another "
            "`--output_dir` to start over."
        )
    return None


def _problem(path: Path, earlier: list[Path]) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if has_manifest(path) or (path / RECORD).exists() or any(map(has_manifest, earlier)):
        return find_damage(path)
    lacking = (name for name in NEEDED if not (path / name).is_file() or not (path / name).stat().st_size)
    return next((f"{name} is missing" for name in lacking), None)


def kept_file(folder: Path, name: str) -> Path | None:
    """The newest undamaged copy of a file in the checkpoints of a folder, or None."""
    paths = (checkpoint_path(folder, step) for step in reversed(checkpoint_steps(folder)))
    return next((path / name for path in paths if is_intact(path, name)), None)


def read_record(folder: Path, step: int) -> dict[str, int]:
    """The record of a checkpoint: `step`, `images` until then, `images_per_step` and `num_processes`.

    A checkpoint without a record only gives `step` and `num_processes`.
    """
    path = checkpoint_path(folder, step)
    if (path / RECORD).exists():
        return json.loads((path / RECORD).read_text(encoding="utf-8"))
    return {"step": step, "num_processes": len(list(path.glob("data-rank*.json")))}


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """A model's tensors under its own names, without those of the wrappers of processes, compilation and average."""
    tensors = {
        name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in load_file(file).items()
    }
    tensors.pop("n_averaged", None)
    return tensors


def left_by_processes(folder: Path) -> int | None:
    """The number of processes that wrote the newest checkpoint for which it is known; None if there is none."""
    kept = kept_file(folder, RECORD)
    if kept is not None:
        return json.loads(kept.read_text(encoding="utf-8"))["num_processes"]
    unrecorded = [step for step in checkpoint_steps(folder) if not has_manifest(checkpoint_path(folder, step))]
    return read_record(folder, unrecorded[-1])["num_processes"] or None if unrecorded else None


def skipped_rows_of_run(folder: Path) -> dict[str, int]:
    """Rows of the training set that a run skipped, by reason, over all ranks, as counted in its newest checkpoint."""
    return skipped_rows(_data_states(folder))


def images_by_source(folder: Path, num_sources: int) -> list[int]:
    """Number of images that a run has seen from each of its sets, over all ranks, as its newest checkpoint counts."""
    given = given_by_source(_data_states(folder))
    return [given[number] for number in range(num_sources)]


def _data_states(folder: Path) -> list[dict[str, Any]]:
    """The states of all ranks' loaders in the newest checkpoint of a run; none if there is no checkpoint."""
    steps = checkpoint_steps(folder / "checkpoints")
    files = sorted(checkpoint_path(folder / "checkpoints", steps[-1]).glob("data-rank*.json")) if steps else ()
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def write_config(values: dict[str, Any], file: Path):
    """Write the keys and values of a configuration as YAML."""
    write_text(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
