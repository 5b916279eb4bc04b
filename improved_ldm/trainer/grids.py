"""Labelled grids of samples, one row per prompt, one column per seed or control input; and of reconstructions."""

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.conditioning.control_row import Variable
from improved_ldm.evaluation.sampling import call_pipeline
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.picture_text import picture_text
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.resolution import side_of
from improved_ldm.trainer.adapters import set_trained
from improved_ldm.trainer.bars import sampling_bar
from improved_ldm.trainer.pictures import say_without_pictures, track_picture
from improved_ldm.trainer.run import Run

matplotlib.use("Agg")
from matplotlib import pyplot

SEEDS = 3  # columns of a grid without control inputs
STRIP = 8  # images on a strip of reconstructions
RECONSTRUCTIONS = "reconstructions.png"


def save_reconstructions(images: Sequence[torch.Tensor], decoded: Sequence[torch.Tensor], file: Path):
    """Save a labelled strip of images of the data, above what the autoencoder makes of them.

    Args:
        images: (3, height, width) each, in [-1, 1]; the first ones are shown.
        decoded: the same images, encoded and decoded.
        file: PNG file to write.
    """
    shown = list(zip(images, decoded, strict=True))[:STRIP]
    columns = [[to_pil_image((pixels.clamp(-1, 1) + 1) / 2) for pixels in pair] for pair in shown]
    save_grid(columns, ["images of the data", "what the autoencoder keeps"], [""] * len(columns), file)


def control_variants(pipeline: ImprovedLDMPipeline) -> dict[str, dict]:
    """Columns of a grid: label → control arguments of the pipeline, one per control input."""
    return dict(next(iter(views.items())) for views in _shown(pipeline).values())


def sample_grid(pipeline: ImprovedLDMPipeline, rows: list[str] | list[int], seed: int, file: Path) -> Path:
    """Sample every row from several seeds, then from the first one with each control input; save the labelled grid.

    If the pipeline has an adapter, samples of its base are shown next to those of the adapter.

    Args:
        pipeline: pipeline to sample with.
        rows: prompts, or class labels.
        seed: the first of the seeds, which follow each other.
        file: PNG file to write.

    Returns:
        The file.
    """
    seeds = list(range(seed, seed + SEEDS))
    columns = {f"seed {one}": _sample(pipeline, rows, one, {}) for one in seeds}
    variants = control_variants(pipeline)
    for label, arguments in variants.items():
        columns[f"seed {seed}\n{label}"] = _sample(pipeline, rows, seed, arguments)
    if pipeline.get_active_adapters():
        pipeline.disable_lora()
        try:
            columns = {f"seed {seed}\nbase": _sample(pipeline, rows, seed, {}), **columns}
        finally:
            pipeline.enable_lora()
    labels = [row if isinstance(row, str) else pipeline.class_name(row) for row in rows]
    save_grid(list(columns.values()), labels, list(columns), file, _text(pipeline, labels, seeds, variants))
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
    save_grid(columns, labels, list(views), file, _text(pipeline, [name], [seed], views))
    return file


def grid_sampler(
    run: Run, pipeline: ImprovedLDMPipeline, rows: list[str] | list[int], control_seen: ControlRanges | None = None
) -> Callable[[Denoiser, int], None]:
    """A function of a denoiser and a step that saves a sample grid of that denoiser and shows it in the trackers.

    Args:
        run: configuration, folder and processes.
        pipeline: pipeline of the denoiser.
        rows: prompts, or class labels.
        control_seen: see `set_trained`.
    """
    if run.config.sampling.every:
        say_without_pictures(run)

    def sample(denoiser: Denoiser, step: int):
        set_trained(pipeline, denoiser, control_seen)
        file = run.folder / "samples" / f"step-{step:07d}.png"
        with sampling_bar(pipeline, run.say, f"sampling {file.name}"):
            sample_grid(pipeline, rows, run.config.seed, file)
        track_picture(run, "samples", file, step)

    return sample


def _sample(pipeline: ImprovedLDMPipeline, rows: list, seed: int, arguments: dict) -> list[Image.Image]:
    return call_pipeline(pipeline, rows, [seed] * len(rows), **arguments)


def _text(
    pipeline: ImprovedLDMPipeline, rows: list[str], seeds: list[int], control: dict[str, dict]
) -> dict[str, str]:
    model = f"{type(pipeline.denoiser).__name__}, {pipeline.denoiser.num_parameters():,} parameters"
    views = {" ".join(label.split()): arguments for label, arguments in control.items()}
    return picture_text({pipeline.semantic_argument: rows}, seeds, views, model)


def save_grid(
    columns: list[list[Image.Image]],
    row_labels: list[str],
    column_labels: list[str],
    file: Path,
    text: dict[str, str] | None = None,
):
    """Save images as a grid with labels.

    Args:
        columns: images, column by column.
        row_labels: one per row, wrapped to the margin.
        column_labels: one per column.
        file: PNG file to write.
        text: what the file says of how the images were made; see `picture_text`.
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
    figure.savefig(file, dpi=110, metadata=text)
    pyplot.close(figure)


def _wrapped(text: str, width: int = 24, lines: int = 4) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …"))
