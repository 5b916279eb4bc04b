"""Whether the run in a folder is the one to start, so that it can resume from its checkpoints."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from improved_ldm.trainer.checkpoints import CONFIG, checkpoint_steps, kept_file, left_by_processes
from improved_ldm.trainer.config import SharedConfig

# Keys that may change without making it another run.
FREE_KEYS = (
    "training.steps",
    "training.log_every",
    "training.max_skipped_steps",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.trackers",
    "training.cpu_threads",
    "data.accept_changes",
    "sampling",
    "validation",
    "evaluation",
    "hub",
    "output_dir",
    "after.source",  # the folder of the stage before, which is in `output_dir`
)


def check_same_run(config: SharedConfig, folder: Path):
    """Raise a ValueError if the folder holds a run that was started with another configuration.

    The earlier configuration is that of the newest checkpoint. If no checkpoint has one, it is that of the folder,
    where local folders may be left out. Only the keys of `FREE_KEYS` may differ; with a cosine schedule, the number
    of steps may not.
    """
    if not checkpoint_steps(folder / "checkpoints"):
        return
    file = kept_file(folder / "checkpoints", CONFIG) or folder / CONFIG
    if not file.exists():
        return
    earlier = _flatten(_completed(type(config), _read_config(file)))
    now = _flatten(config.model_dump(mode="json"))
    shareable = _flatten(config.file_values())
    changed = [
        f"`{key}` was {earlier.get(key)!r} and is {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if earlier.get(key) not in (now.get(key), shareable.get(key)) and not _is_free(key, now)
    ]
    if changed:
        raise ValueError(
            f"{folder} holds a run with another configuration: {'; '.join(changed)}. "
            f"Choose another `--output_dir`, or delete the folder to start over."
        )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_bytes())
    except yaml.YAMLError:
        values = None
    if not isinstance(values, dict):
        raise ValueError(
            f"{file} holds no configuration, and no checkpoint holds a copy of it. Restore it, or choose another "
            "`--output_dir` to start over."
        )
    return values


def _completed(config_class: type[SharedConfig], values: dict[str, Any]) -> dict[str, Any]:
    """An earlier configuration with defaults for missing keys; one that is not valid stays as it is."""
    try:
        return config_class.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def check_same_processes(folder: Path, now: int):
    """Raise a ValueError if a run in the folder has another number of processes, which split the data differently."""
    before = left_by_processes(folder / "checkpoints")
    if before not in (None, now):
        raise ValueError(
            f"{folder} holds a run of {before} process{'es' * (before > 1)}, but this run has {now}: launch it with "
            f"`--num_processes {before}`, or choose another `--output_dir`."
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
