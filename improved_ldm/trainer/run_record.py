"""What `metrics.json` records of every run: the command, the data it has seen, the time and the memory."""

import json
import resource
from pathlib import Path
from typing import Any

import yaml

from improved_ldm.hub.card import skipped_text
from improved_ldm.places import shareable_place
from improved_ldm.provenance import device_name, launch_command, library_versions
from improved_ldm.trainer.checkpoints import (
    CONFIG,
    images_by_source,
    kept_file,
    newest_whole,
    read_record,
    skipped_rows_of_run,
)
from improved_ldm.trainer.reports import count_skipped, last_loss
from improved_ldm.trainer.run import Run


def run_record(run: Run, history: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run was and what it has seen, from its checkpoints and its history."""
    return {
        "command": launch_command(),
        "loss": last_loss(history),
        "skipped_steps": count_skipped(history),
        **_images_seen(run),
        "skipped_rows": skipped_rows_of_run(run.folder),
        **_images_by_source(run),
        "seed": run.config.seed,
        "device": device_name(run.accelerator.device),
        "libraries": library_versions(),
    }


def time_and_memory(run: Run, started: float) -> dict[str, float]:
    """Seconds of a run in all its parts, this one since `started`, and the largest memory of this process."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux
    return {"seconds": round(run.clock.seconds(started), 1), "peak_memory_gb": round(memory / 2**20, 2)}


def say_what_was_skipped(run: Run, record: dict[str, Any]):
    """Print the rows that a run skipped, if there are any."""
    if record["skipped_rows"]:
        run.say(f"rows of the set that were skipped: {skipped_text(record['skipped_rows'])}")


def _images_seen(run: Run) -> dict[str, Any]:
    """Number of images that the weights have seen, from the record of their checkpoint; over all stages, if any."""
    checkpoints = run.folder / "checkpoints"
    step = newest_whole(checkpoints, say=lambda _: None)  # damage was reported on loading
    images = read_record(checkpoints, step).get("images", step * run.images_per_step)
    if not run.stage:
        return {"images_seen": images}
    stage = {"resolution": run.config.transform.resolution, "steps": step, "images_seen": images}
    stages = [*_earlier_stages(run.config.model_dump(mode="json").get("after")), stage]
    return {"images_seen": sum(stage["images_seen"] for stage in stages), "stages": stages}


def _images_by_source(run: Run) -> dict[str, list[int]]:
    """Number of images that the weights have seen from each set, if they are several; printed too."""
    sources = run.config.data.sources
    if not sources:
        return {}
    seen = images_by_source(run.folder, len(sources))
    named = zip((shareable_place(source.source) for source in sources), seen, strict=True)
    run.say("images seen by source: " + ", ".join(f"{name} {count:,}" for name, count in named))
    return {"images_by_source": seen}


def _earlier_stages(after: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The stages before one, from the metrics of the last of them or, if these are missing, from its checkpoints."""
    if after is None:
        return []
    alone = {"resolution": after["resolution"][0], "steps": after["steps"]}
    try:
        metrics = json.loads((Path(after["source"]) / "metrics.json").read_text(encoding="utf-8"))
        return metrics["stages"] if "stages" in metrics else [alone | {"images_seen": metrics["images_seen"]}]
    except (OSError, ValueError, TypeError, KeyError):  # missing or damaged
        images, before = _seen_by_checkpoints(Path(after["source"]))
        return [*_earlier_stages(before), alone | {"images_seen": images}]


def _seen_by_checkpoints(folder: Path) -> tuple[int, dict[str, Any] | None]:
    """Number of images that a stage has seen, and what it started from."""
    checkpoints = folder / "checkpoints"
    step, config = newest_whole(checkpoints, say=lambda _: None), kept_file(checkpoints, CONFIG)
    if step is None or config is None:
        raise ValueError(
            f"{folder} holds neither metrics.json nor an intact checkpoint; one of them is needed to count the images "
            "of this stage. Restore one."
        )
    return read_record(checkpoints, step)["images"], yaml.safe_load(config.read_bytes()).get("after")
