"""The labelled grid of samples: prompts down, control inputs across, one seed."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
from PIL import Image

from improved_ldm.evaluation.obedience import original_side
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.adapters import put_into

matplotlib.use("Agg")
from matplotlib import pyplot

CROP_FRACTION = 0.65
SIZE_FRACTION = 0.3


def control_variants(pipeline: ImprovedLDMPipeline) -> dict[str, dict]:
    """What the columns of a grid ask for: label → control arguments of the pipeline."""
    side = original_side(pipeline)
    small = max(1, round(side * SIZE_FRACTION))
    crop = side * CROP_FRACTION
    variants = {
        "plain": {},
        "flip": {"flip": True},
        f"original_size\n{small} x {small}": {"original_size": (small, small)},
        f"crop_size\n{CROP_FRACTION:.0%}, top left": {"crops_coords_top_left": (0, 0), "crop_size": (crop, crop)},
    }
    read = pipeline.denoiser.control_inputs
    return {label: arguments for label, arguments in variants.items() if arguments.keys() <= read}


def draw_grid(pipeline: ImprovedLDMPipeline, rows: list[str] | list[int], seed: int, file: Path):
    """Sample every row with every control variant from one seed and save the labelled grid.

    Beside an adapter's samples stand those of its base.

    Args:
        pipeline: draws the images.
        rows: prompts, or class labels.
        seed: of every image.
        file: PNG to write.
    """
    variants = control_variants(pipeline)
    columns = {label: _draw(pipeline, rows, seed, arguments) for label, arguments in variants.items()}
    if pipeline.get_active_adapters():
        pipeline.disable_lora()
        columns = {"base": _draw(pipeline, rows, seed, {}), **columns}
        pipeline.enable_lora()
    labels = [row if isinstance(row, str) else _class_name(pipeline, row) for row in rows]
    save_grid(list(columns.values()), labels, list(columns), file)


def control_views(pipeline: ImprovedLDMPipeline) -> dict[str, dict]:
    """What the columns of a control picture ask for: sizes from small to whole, then crops from corner to corner."""
    side = original_side(pipeline)
    crop = side * CROP_FRACTION
    sizes = [max(1, round(side * share)) for share in (SIZE_FRACTION, (1 + SIZE_FRACTION) / 2, 1)]
    views = {f"original_size\n{size} x {size}": {"original_size": (size, size)} for size in sizes}
    for label, top, left in (("top left", 0, 0), ("top right", 0, 1), ("bottom left", 1, 0), ("bottom right", 1, 1)):
        corner = (top * (side - crop), left * (side - crop))
        arguments = {"crops_coords_top_left": corner, "crop_size": (crop, crop)}
        views[f"crop {CROP_FRACTION:.0%}\n{label}"] = arguments
    read = pipeline.denoiser.control_inputs
    return {label: arguments for label, arguments in views.items() if arguments.keys() <= read}


def draw_control(pipeline: ImprovedLDMPipeline, row: str | int, seed: int, file: Path) -> Path | None:
    """Draw one prompt or class from one seed at several sizes and crops, as it is and mirrored, and save the grid.

    Args:
        pipeline: draws the images.
        row: the prompt, or the class label.
        seed: of every image.
        file: PNG to write.

    Returns:
        The file; None for a model that reads no such control.
    """
    name = row if isinstance(row, str) else _class_name(pipeline, row)
    views, labels, mirrored = control_views(pipeline) or {"plain": {}}, [name], {}
    if "flip" in pipeline.denoiser.control_inputs:
        labels, mirrored = [name, f"flip: {name}"], {"flip": [False, True]}
    if len(views) * len(labels) == 1:
        return None
    columns = [_draw(pipeline, [row] * len(labels), seed, arguments | mirrored) for arguments in views.values()]
    save_grid(columns, labels, list(views), file)
    return file


def grid_drawer(
    pipeline: ImprovedLDMPipeline, rows: list[str] | list[int], seed: int, folder: Path
) -> Callable[[Denoiser, int], None]:
    """A function of a denoiser and a step that draws the grid of that denoiser into a folder."""

    def draw(denoiser: Denoiser, step: int):
        put_into(pipeline, denoiser)
        draw_grid(pipeline, rows, seed, folder / f"step-{step:07d}.png")

    return draw


def _draw(pipeline: ImprovedLDMPipeline, rows: list, seed: int, arguments: dict) -> list[Image.Image]:
    generators = [torch.Generator().manual_seed(seed) for _ in rows]
    semantic = {"prompt": rows} if isinstance(rows[0], str) else {"class_labels": rows}
    return pipeline(**semantic, **arguments, generator=generators).images


def _class_name(pipeline: ImprovedLDMPipeline, label: int) -> str:
    names = pipeline.config.class_names
    return names[label] if names else f"class {label}"


def save_grid(columns: list[list[Image.Image]], row_labels: list[str], column_labels: list[str], file: Path):
    """Save images as a grid with labels.

    Args:
        columns: images, column by column.
        row_labels: one a row, wrapped to the margin.
        column_labels: one a column.
        file: PNG to write.
    """
    height, width = len(row_labels), len(columns)
    figure, axes = pyplot.subplots(
        height, width, figsize=(1.25 * width + 2.2, 1.2 * height + 0.5), squeeze=False, layout="constrained"
    )
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
    """Captions that lie far from one another, the first given one among them.

    Args:
        captions: to choose from.
        features: (captions, dim), one vector each.
        count: how many to choose at most.

    Source: greedy farthest-point selection.
    """
    features = torch.nn.functional.normalize(features.float().cpu(), dim=1)
    chosen, nearest = [0], torch.full((len(captions),), torch.inf)
    while len(chosen) < min(count, len(captions)):
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).norm(dim=1))
        chosen.append(int(nearest.argmax()))
    return [captions[number] for number in chosen]
