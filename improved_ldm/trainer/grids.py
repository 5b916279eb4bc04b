"""Labelled grids of samples from one seed: one row per prompt, one column per control input."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.conditioning.control_row import Variable
from improved_ldm.evaluation.sampling import call_pipeline
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.resolution import side_of
from improved_ldm.trainer.adapters import set_trained

matplotlib.use("Agg")
from matplotlib import pyplot


def control_variants(pipeline: ImprovedLDMPipeline) -> dict[str, dict]:
    """The columns of a grid: label → control arguments of the pipeline, one per control input."""
    firsts = (next(iter(views.items())) for views in _shown(pipeline).values())
    return {"plain": {}, **dict(firsts)}


def sample_grid(pipeline: ImprovedLDMPipeline, rows: list[str] | list[int], seed: int, file: Path) -> Path:
    """Sample every row with every control variant from one seed and save the labelled grid.

    If the pipeline has an adapter, samples of its base are shown next to those of the adapter.

    Args:
        pipeline: pipeline to sample with.
        rows: prompts, or class labels.
        seed: seed of every image.
        file: PNG file to write.

    Returns:
        The file.
    """
    variants = control_variants(pipeline)
    columns = {label: _sample(pipeline, rows, seed, arguments) for label, arguments in variants.items()}
    if pipeline.get_active_adapters():
        pipeline.disable_lora()
        try:
            columns = {"base": _sample(pipeline, rows, seed, {}), **columns}
        finally:
            pipeline.enable_lora()
    labels = [row if isinstance(row, str) else pipeline.class_name(row) for row in rows]
    save_grid(list(columns.values()), labels, list(columns), file)
    return file


def control_views(pipeline: ImprovedLDMPipeline) -> dict[str, dict]:
    """The columns of a grid of the control: label → control arguments, all that are shown except switches."""
    shown = _shown(pipeline).items()
    return {label: arguments for row, views in shown if not row.is_switch for label, arguments in views.items()}


def _shown(pipeline: ImprovedLDMPipeline) -> dict[Variable, dict[str, dict]]:
    """The values that grids show of each control input that varied in training, switches first."""
    shown = {}
    for row in sorted(pipeline.varied_control(), key=lambda row: not row.is_switch):
        views = row.views(pipeline.default_image_size).items()
        seen = {label: arguments for label, arguments in views if pipeline.saw_control(**arguments)}
        if len(seen) > 1 or (seen and row.is_switch):  # one alone could be the default
            shown[row] = seen
    return shown


def sample_control_grid(pipeline: ImprovedLDMPipeline, row: str | int, seed: int, file: Path) -> Path | None:
    """Sample one prompt or class from one seed at every shown control value, one row per switch, and save the grid.

    Args:
        pipeline: pipeline to sample with.
        row: the prompt, or the class label.
        seed: seed of every image.
        file: PNG file to write.

    Returns:
        The file; None for a model that reads no such control.
    """
    name = row if isinstance(row, str) else pipeline.class_name(row)
    views = control_views(pipeline) or {"plain": {}}
    switches = [switch.name for switch in _shown(pipeline) if switch.is_switch]
    labels = [name, *(f"{switch}: {name}" for switch in switches)]
    if len(views) * len(labels) == 1:
        return None
    # one row of the grid per switch, with only that switch on
    rows = {switch: [switch == other for other in [None, *switches]] for switch in switches}
    columns = [_sample(pipeline, [row] * len(labels), seed, arguments | rows) for arguments in views.values()]
    save_grid(columns, labels, list(views), file)
    return file


def grid_sampler(
    pipeline: ImprovedLDMPipeline,
    rows: list[str] | list[int],
    seed: int,
    folder: Path,
    control_seen: ControlRanges | None = None,
) -> Callable[[Denoiser, int], None]:
    """A function of a denoiser and a step that saves a sample grid of that denoiser in a folder.

    The arguments are those of `sample_grid`, the folder, and that of `set_trained`.
    """

    def sample(denoiser: Denoiser, step: int):
        set_trained(pipeline, denoiser, control_seen)
        sample_grid(pipeline, rows, seed, folder / f"step-{step:07d}.png")

    return sample


def _sample(pipeline: ImprovedLDMPipeline, rows: list, seed: int, arguments: dict) -> list[Image.Image]:
    return call_pipeline(pipeline, rows, [seed] * len(rows), **arguments)


def save_grid(columns: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], file: Path):
    """Save images as a grid with labels.

    Args:
        columns: images, column by column.
        row_labels: one per row, wrapped to the margin.
        column_labels: one per column.
        file: PNG file to write.
    """
    height, width = len(row_labels), len(columns)
    across, down = (side / side_of(columns[0][0].size) for side in columns[0][0].size)  # 1 for a square
    figsize = (1.25 * across * width + 2.2, 1.2 * down * height + 0.5)
    figure, axes = pyplot.subplots(height, width, figsize=figsize, squeeze=False, layout="constrained")
    for x, column in enumerate(columns):
        for y, image in enumerate(column):
            axes[y, x].imshow(image, interpolation="nearest")
            axes[y, x].set(xticks=[], yticks=[])
        axes[0, x].set_title(column_labels[x], fontsize=8)
    for y, label in enumerate(row_labels):
        axes[y, 0].set_ylabel(_wrapped(label), fontsize=8, rotation=0, ha="right", va="center")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _wrapped(text: str, width: int = 24, lines: int = 4) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))


def diverse_prompts(captions: list[str], features: torch.Tensor, count: int) -> list[str]:
    """Captions that are far from each other, including the first given one.

    Args:
        captions: captions to choose from.
        features: (captions, dim), one vector per caption.
        count: largest number of captions to choose.

    Source: greedy farthest-point selection.
    """
    features = torch.nn.functional.normalize(features.float().cpu(), dim=1)
    chosen, nearest = [0], torch.full((len(captions),), torch.inf)
    while len(chosen) < min(count, len(captions)):
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).norm(dim=1))
        chosen.append(int(nearest.argmax()))
    return [captions[number] for number in chosen]
