"""What the weights of a pipeline were made from: the records of its `lineage`, one for each change, oldest first."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from improved_ldm.places import shareable_place

INDEX = DiffusionPipeline.config_name  # model_index.json
CHANGES = ("conditions", "parameters", "moments", "averages", "classes")  # keys of a change of conditions


def lineage_record(source: str | Path | None, **change: Any) -> dict[str, Any]:
    """A record of a lineage.

    Args:
        source: folder or Hub id of the weights before; None for a model in memory.
        change: what was done to them.

    Returns:
        The record as it stands next to the weights, without local folders.
    """
    return {"source": source and shareable_place(str(source)), **change}


def conditions_lines(record: dict[str, Any]) -> list[str]:
    """What a change of conditions keeps and what begins anew, in words; nothing if a record has no such change."""
    if "conditions" not in record:
        return []
    lines = ["conditions: " + " to ".join(record["conditions"])]
    for part, groups in record.get("parameters", {}).items():
        named = ", ".join(f"{group} {count:,}" for group, count in groups.items())
        name = "parameters that start at zero" if part == "zero" else f"{part} parameters"
        lines.append(f"{name}: {sum(groups.values()):,}" + f" ({named})" * bool(named))
    for what, name in (("moments", "moments of the optimizer"), ("averages", "averages of the weights")):
        if counts := record.get(what):
            lines.append(f"{name}: kept for {counts['kept']:,} parameters, new for {counts['new']:,}")
    if classes := record.get("classes"):
        lines.append("classes: " + ", ".join(f"{count:,} {part}" for part, count in classes.items()))
    return lines


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The lineage of the pipeline in a folder; empty for a folder without a pipeline."""
    index = folder / INDEX
    return (json.loads(index.read_text(encoding="utf-8")).get("lineage") or []) if index.is_file() else []


def read_control_seen(folder: Path) -> dict[str, Any] | None:
    """The ranges of the control that the weights in a folder were trained with, as `ControlRanges` records them.

    None if the folder has no pipeline, or that of an earlier version: they are not known then.
    """
    index = folder / INDEX
    return json.loads(index.read_text(encoding="utf-8")).get("control_seen") if index.is_file() else None


def stage_folders(folder: Path) -> list[Path]:
    """The folders of the stages before the last one of a run in stages, in order, by the names in its lineage."""
    stages = [folder / Path(record["source"] or "").name for record in read_lineage(folder)]
    return [stage for stage in stages if stage != folder and (stage / INDEX).is_file()]
