"""The picture of a run's losses: of training, of held-out images, and of these at each timestep."""

from pathlib import Path
from typing import Any

import matplotlib

from improved_ldm.provenance import write_whole

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

PICTURE = "loss.png"


def plot_loss(history: list[dict[str, Any]], held_out: list[dict[str, Any]], file: Path):
    """Plot losses against the images seen, on logarithmic axes.

    Args:
        history: records of `Progress`.
        held_out: records of `Validation`; if some have a held-out loss, a second panel shows it at each timestep.
        file: PNG file to write.
    """
    held_out = [record for record in held_out if "loss" in record]
    columns = 2 if held_out else 1
    figure, axes = pyplot.subplots(1, columns, figsize=(6 * columns + 1, 4), squeeze=False, layout="constrained")
    _draw(axes[0, 0], history, "loss", "training images, mean of a log interval", color="tab:gray")
    if held_out:
        marker = {"marker": "."}
        _draw(axes[0, 0], held_out, "loss", "held-out images", color="tab:orange", **marker)
        _draw(axes[0, 0], held_out, "averaged_loss", "held-out images, averaged weights", color="tab:blue", **marker)
        axes[0, 0].legend(fontsize=8)
        _draw_levels(axes[0, 1], held_out)
    for panel in axes.flat:
        panel.set(xscale="log", yscale="log", xlabel="images seen")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # labels that do not overlap
        panel.xaxis.set_major_formatter(EngFormatter())
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="both", alpha=0.2)
    axes[0, 0].set(ylabel="loss")
    write_whole(file, lambda unfinished: figure.savefig(unfinished, dpi=120, format="png"))
    pyplot.close(figure)


def _draw(axes: Axes, records: list[dict[str, Any]], name: str, label: str, **style: Any):
    points = [(record["images"], record[name]) for record in records if record[name] is not None]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def _draw_levels(axes: Axes, held_out: list[dict[str, Any]]):
    """The held-out loss of the averaged weights at each timestep, from little noise (dark) to much (light)."""
    timesteps = held_out[-1]["timesteps"]
    shades = pyplot.get_cmap("viridis")
    for level, timestep in enumerate(timesteps):
        records = [
            {"images": record["images"], "loss": record["averaged_loss_by_level"][level]} for record in held_out
        ]
        shade = shades(level / len(timesteps))
        _draw(axes, records, "loss", f"t = {timestep:.0f}", color=shade, marker=".")
    axes.set_title("held-out images, averaged weights, by timestep", fontsize=9)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
