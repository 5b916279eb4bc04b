"""The summary of a run at the end of its log."""

from collections.abc import Iterable, Iterator
from typing import Any

from improved_ldm.evaluation.measures import judged_measure
from improved_ldm.trainer.bars import duration_text

REAL = "real_"  # begins the name of the judge's result on real images


def summary_lines(
    metrics: dict[str, Any], history: list[dict[str, Any]], reached: Iterable[tuple[str, str]]
) -> list[str]:
    """The lines of a summary.

    Args:
        metrics: content of `metrics.json`.
        history: records of `Progress`.
        reached: names and values of what the model reaches.
    """
    rows = [*_training_rows(metrics, history), *reached]
    rows.append(("time and memory", f"{duration_text(metrics['seconds'])}, {metrics['peak_memory_gb']:.1f} GiB"))
    width = max(len(name) for name, _ in rows)
    return ["summary", *(f"    {name:<{width}}  {value}" for name, value in rows)]


def _training_rows(metrics: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    images = f"{metrics['images_seen']:,} images seen"
    if history:
        speeds = sorted(record["images_per_second"] for record in history)
        images += f", {speeds[len(speeds) // 2]:.4g} per second at the median"
    yield "training", images
    if metrics["skipped_steps"]:
        yield "skipped steps", f"{metrics['skipped_steps']:,}, whose loss or gradient was NaN or infinite"
    yield "training loss", _number(metrics["loss"])
    if held_out := metrics.get("held_out"):
        live, averaged = (_number(held_out[name]) for name in ("loss", "averaged_loss"))
        yield "held-out loss", f"{live}, of the averaged weights {averaged}"


def measured_rows(measured_on: str, values: dict[str, float | None]) -> Iterator[tuple[str, str]]:
    """The numbers of a network that is measured on images."""
    yield "measured on", measured_on
    for name, value in values.items():
        if value is not None:
            yield name.replace("_", " "), _number(value)


def judged_rows(metrics: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The single numbers of the judge, each with its result on real images if there is one."""
    obedience, notes = metrics["obedience"], metrics["notes"]
    for name, value in obedience.items():
        if name.startswith(("num_", REAL)) or isinstance(value, list):
            continue
        real = f", of real images {_number(obedience[REAL + name])}" if REAL + name in obedience else ""
        note = f" (not meaningful: {notes[name]})" if name in notes else ""
        yield judged_measure(obedience, metrics["judge"], name).label, f"{_number(value)}{real}{note}"


def _number(value: float | None) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not finite" if value is None else f"{value:.4g}"
