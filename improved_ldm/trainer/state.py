"""Checkpoints of a run: written whole or not at all, found by step, resumed exactly."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel

# Keys whose change leaves a run the same run.
FREE_KEYS = (
    "training.steps",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.trackers",
    "training.cpu_threads",
    "sampling",
    "evaluation",
    "hub",
)


class Checkpoints:
    """The checkpoints of a run: model, optimizer, EMA, place in the data of every rank.

    accelerate saves model and optimizer; the place in the data is one JSON file a rank.

    Args:
        accelerator: of the run; the model and the optimizer are prepared.
        folder: where checkpoints go.
        keep: how many are kept.
        ema: the averaged model.
        batches: the loader, with `state_dict` and `load_state_dict`.
        frozen: names of the model's weights that are not trained; they are left out.
    """

    def __init__(
        self, accelerator: Accelerator, folder: Path, keep: int, ema: AveragedModel, batches, frozen: frozenset[str]
    ):
        self.accelerator, self.folder, self.keep, self.ema, self.batches = accelerator, folder, keep, ema, batches
        self.frozen = frozen
        accelerator.register_save_state_pre_hook(self._leave_out_frozen)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, in order."""
        return checkpoint_steps(self.folder)

    def save(self, step: int):
        """Write the checkpoint of a step, all ranks together; it appears when it is complete."""
        unfinished, finished = self.folder / f"unfinished-{step}", self._path(step)
        if finished.exists():
            return
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(unfinished))
        self._rank_file(unfinished).write_text(json.dumps(self.batches.state_dict()))
        if self.accelerator.is_main_process:
            tensors = {name: value.contiguous() for name, value in self._trained(self.ema.state_dict()).items()}
            save_file(tensors, unfinished / "ema.safetensors")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            unfinished.rename(finished)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(self._path(old))
        self.accelerator.wait_for_everyone()

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return its step, else 0.

        Raises:
            FileNotFoundError: if it was written by fewer processes than there are now.
        """
        if not self.steps():
            return 0
        step = self.steps()[-1]
        path = self._path(step)
        if not self._rank_file(path).exists():
            raise FileNotFoundError(
                f"{path} has no place in the data for process {self.accelerator.process_index}; "
                f"resume with as many processes as it was written by."
            )
        self.accelerator.load_state(str(path), strict=not self.frozen)
        self.ema.load_state_dict(load_file(path / "ema.safetensors"), strict=not self.frozen)
        self.batches.load_state_dict(json.loads(self._rank_file(path).read_text()))
        return step

    def _trained(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """A model's tensors without the frozen ones; processes and average put `module.` before their names."""
        return {name: value for name, value in tensors.items() if name.removeprefix("module.") not in self.frozen}

    def _leave_out_frozen(self, models: list, weights: list[dict[str, Any]], folder: str):
        """accelerate's hook: `weights` is what it will write."""
        weights[:] = map(self._trained, weights)

    def _path(self, step: int) -> Path:
        return checkpoint_path(self.folder, step)

    def _rank_file(self, path: Path) -> Path:
        return path / f"data-rank{self.accelerator.process_index}.json"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, in order."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def newest_checkpoint(folder: Path) -> Path:
    """The last checkpoint in a folder.

    Raises:
        FileNotFoundError: if there is none.
    """
    steps = checkpoint_steps(folder)
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint to begin the next stage with.")
    return checkpoint_path(folder, steps[-1])


def check_same_run(config: BaseModel, folder: Path):
    """Raise a ValueError if the folder holds a run that was started with another configuration.

    Only the keys of `FREE_KEYS` may differ; under a cosine schedule the number of steps may not.
    """
    path = folder / "config.yaml"
    if not path.exists() or not list(folder.glob("checkpoints/step-*")):
        return
    earlier, now = (_flatten(values) for values in (yaml.safe_load(path.read_text()), config.model_dump(mode="json")))
    changed = [
        f"`{key}` was {earlier.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) != now.get(key) and not _is_free(key, now) and key != "output_dir"
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration: {'; '.join(changed)}. "
            f"Choose another `--output_dir`, or delete the folder to start over."
        )


def _is_free(key: str, config: dict[str, Any]) -> bool:
    if key == "training.steps" and config["optimizer.schedule"] == "cosine":
        return False
    return key.startswith(FREE_KEYS)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
