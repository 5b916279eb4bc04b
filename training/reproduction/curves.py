"""A measure along a run: from the switch of resolution to the end."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.hub.content import run_config
from improved_ldm.lineage import read_lineage, stage_folders
from improved_ldm.trainer.checkpoints import checkpoint_path, read_record, read_weights
from improved_ldm.transfer import transfer

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator, NullLocator


def pipelines_before_the_end(folder: Path, device: torch.device) -> Iterator[ImprovedLDMPipeline]:
    """The pipelines of a run in stages as they are after the last switch, then at each of `_steps` before the last."""
    change = read_lineage(folder)[-1]
    low, pipeline = (
        ImprovedLDMPipeline.from_pretrained(part).to(device) for part in (stage_folders(folder)[-1], folder)
    )
    start = transfer(low, change["resolution"][1], change["positions"], change["noise"])
    for part in (start, pipeline):
        part.set_progress_bar_config(disable=True)
    yield start
    for step in _steps(folder)[:-1]:
        checkpoint = checkpoint_path(folder / "checkpoints", step)
        pipeline.denoiser.load_state_dict(read_weights(checkpoint / "ema.safetensors"))
        yield pipeline


def images_after_the_switch(folder: Path) -> list[int]:
    """The images that the pipelines of a run have seen in its last stage, and those of its end."""
    steps = _steps(folder)
    per_step = read_record(folder / "checkpoints", steps[-1])["images_per_step"]
    return [per_step * step for step in (0, *steps)]


def _steps(folder: Path) -> list[int]:
    """The steps of the last stage at which it left a checkpoint, the last one included."""
    training = run_config(folder)["training"]
    return [*range(training["checkpoint_every"], training["steps"], training["checkpoint_every"]), training["steps"]]


def images_to_reach(images: list[int], values: list[float], target: float) -> float | None:
    """Where a curve, straight between its points, first comes down to a target; None if it does not."""
    reached = np.flatnonzero(np.array(values) <= target)
    if not len(reached):
        return None
    span = slice(max(reached[0] - 1, 0), reached[0] + 1)
    return float(np.interp(-target, -np.array(values)[span], images[span]))


def curve_lines(record: dict[str, Any]) -> list[str]:
    """When each setting reaches, in the mean, what the worse one of each expectation has at its end."""
    images, curves = record["images"], {name: row["curve"]["mean"] for name, row in record["settings"].items()}
    lines = []
    for baseline in dict.fromkeys(expectation["worse"] for expectation in record["expectations"]):
        needed = {name: images_to_reach(images, curve, curves[baseline][-1]) for name, curve in curves.items()}
        said = "; ".join(f"{name}: {'–' if count is None else f'{count:,.0f}'}" for name, count in needed.items())
        lines.append(f"- Images until the mean FID reaches the last one of {baseline}. {said}.")
    return lines


def plot_curves(record: dict[str, Any], file: Path):
    """Draw mean and interval of every setting against the images since the switch."""
    images = np.array(record["images"]) / 1000
    figure, axis = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for name, row in record["settings"].items():
        (line,) = axis.plot(images, row["curve"]["mean"], marker="o", markersize=4, label=name)
        if row["curve"]["low"] is not None:
            axis.fill_between(images, row["curve"]["low"], row["curve"]["high"], color=line.get_color(), alpha=0.1)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())
    features = record["measured_with"]["features"]["name"]
    axis.set(xlabel="images seen after the switch, thousands", ylabel=f"FID ({features})")
    axis.set_title(f"{record['title']}: mean and {record['interval']}", size=9)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
