"""A sweep over guidance scales: its points, and the plot of FID against CLIP score or guidance."""

import itertools
import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from improved_ldm.evaluation.comparability import differences
from improved_ldm.evaluation.meaning import is_inception
from improved_ldm.evaluation.measures import score_measure
from improved_ldm.provenance import write_json

AXES = ("guidance_scale", "control_guidance_scale")
NUMBER = r"[-+]?\d+(?:\.\d*)?"
RANGE = re.compile(rf"(\w+)=({NUMBER})(?::({NUMBER}):({NUMBER}))?")


def parse_sweep(text: str) -> list[dict[str, float]]:
    """Parse the guidance scales of a sweep.

    Args:
        text: Scales such as `guidance_scale=1:8:0.5 control_guidance_scale=0:2:0.5`. Each is start:stop:step with
            `stop` included, or a single value.

    Returns:
        Every combination of the values by name, in order.

    Raises:
        ValueError: If the format is wrong, a name is unknown or repeated, or a range has no values.
    """
    axes = {}
    for word in text.split():
        match = RANGE.fullmatch(word)
        if match is None or match[1] not in AXES:
            raise ValueError(
                f"`sweep` has {word!r}; it must be name=start:stop:step, where name is one of {', '.join(AXES)}."
            )
        if match[1] in axes:
            raise ValueError(f"`sweep` has {match[1]} twice.")
        axes[match[1]] = [float(match[2])] if match[3] is None else _values(word, *map(float, match.groups()[1:]))
    if not axes:
        raise ValueError(f"`sweep` is {text!r}; it must name {' or '.join(AXES)}.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _values(word: str, start: float, stop: float, step: float) -> list[float]:
    if step <= 0 or stop < start:
        raise ValueError(f"`sweep` has {word!r}; the step must be > 0 and the stop ≥ the start.")
    return [round(start + step * number, 6) for number in range(int((stop - start) / step + 1e-6) + 1)]


def point_name(point: dict[str, float]) -> str:
    """Name of the folder of a combination."""
    return "-".join(f"{name}_{value:g}" for name, value in point.items())


def write_sweep(records: list[dict[str, Any]], folder: Path):
    """Write `sweep.json` and `sweep.png` for the points of a sweep.

    Args:
        records: Content of `metrics.json` for each point.
        folder: Folder of the two files.
    """
    points = [
        {name: record["samples"][name] for name in AXES} | {"scores": record["scores"], "seconds": record["seconds"]}
        for record in records
    ]
    shared = {name: value for name, value in records[0].items() if name not in ("scores", "seconds")}
    shared["samples"] = {name: value for name, value in shared["samples"].items() if name not in AXES}
    mixed = differences(records)
    label = "FID" if is_inception(records[0]) else score_measure(records[0], "fid").label
    plot_sweep(points, folder / "sweep.png", f"{label} (numbers do not compare)" if mixed else label)
    write_json(folder / "sweep.json", {"points": points, **shared} | ({"mixed": mixed} if mixed else {}))


def plot_sweep(points: list[dict[str, Any]], file: Path, distance: str = "FID"):
    """Plot the Fréchet distance against CLIP score or, without CLIP scores, against guidance.

    There is one line per scale of the control guidance.

    Args:
        points: Dicts with `guidance_scale`, `control_guidance_scale` and `scores`.
        file: PNG file to write.
        distance: Label of the distance.
    """
    has_clip = all("clip_score" in point["scores"] for point in points)
    figure, axes = pyplot.subplots(figsize=(7, 5), layout="constrained")
    by_control = sorted(points, key=lambda point: (point["control_guidance_scale"], point["guidance_scale"]))
    for control, line in itertools.groupby(by_control, key=lambda point: point["control_guidance_scale"]):
        line = list(line)
        x = [point["scores"]["clip_score"] if has_clip else point["guidance_scale"] for point in line]
        y = [point["scores"]["fid"] for point in line]
        axes.plot(x, y, marker="o", markersize=4, label=f"β = {control:g}")
        for point, *place in zip(line, x, y, strict=True):
            axes.annotate(f"{point['guidance_scale']:g}", place, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="CLIP score" if has_clip else "guidance scale λ", ylabel=distance)
    axes.set_title("points: guidance scale λ; lines: control guidance scale β", fontsize=9)
    axes.grid(True, alpha=0.2)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
