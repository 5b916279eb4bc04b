"""Sample two images from equal noise: one with the default view and one with the requested view."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image

from improved_ldm.conditioning.control import (
    RECTANGLE,
    VARIABLES,
    rectangle_arguments,
    variables_read,
    whole_image_size,
)
from improved_ldm.conditioning.values import Size
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.resolution import resolution_of, size_text

# The requested control as a record of the page: a rectangle of an image, in pixels of the image; the label of the
# shape, which is the aspect ratio of the image and of the samples; and for every other control input a boolean (for a
# switch) or the label of one of the shown values. "" stands for the default.
View = dict[str, Any]

SHAPE = "shape"
MAX_RATIO = 2  # of the sides of a shape
SQUARE = (1, 1)

# Control inputs that the rectangle does not set and that have values to choose from.
CHOICES = tuple(
    row for row in VARIABLES if row.name not in rectangle_arguments(SQUARE, *SQUARE, 0, 0, 1) and row.shown(SQUARE)
)


def shapes(pipeline: ImprovedLDMPipeline) -> dict[str, tuple[int, int]]:
    """The (height, width) in pixels that a pipeline can sample with about its default number of pixels, by label.

    The default has the label "" and comes first. The others, from the tallest to the widest, are those that the
    pipeline is known to have been trained with.
    """
    multiple = pipeline.vae_scale_factor * pipeline.denoiser.patch_size
    default = pipeline.default_size
    area = default[0] * default[1] / multiple**2  # in patches
    sides = [(side, round(area / side)) for side in range(1, int((MAX_RATIO * area) ** 0.5) + 1)]
    sizes = {(height * multiple, width * multiple) for pair in sides for height, width in (pair, pair[::-1])}
    near = [size for size in sizes - {default} if max(size) <= MAX_RATIO * min(size) and pipeline.saw_shape(*size)]
    others = {size_text(resolution_of(*size)): size for size in sorted(near, key=lambda size: size[1] / size[0])}
    return {"": default, **others}


def whole_view(side: float, read: frozenset[str], drawn: Size = SQUARE, shape: str = "") -> View:
    """The view of a whole image, with defaults for the other inputs.

    Args:
        side: Shorter side of the image in pixels.
        read: `control_inputs` of the denoiser.
        drawn: (height, width) of the samples.
        shape: Label of this size.
    """
    choices = {row.name: False if row.is_switch else "" for row in CHOICES if row.name in read}
    rectangle = zip(RECTANGLE, (side, 0, 0, *whole_image_size(drawn, side)), strict=True)
    return dict(rectangle) | choices | {SHAPE: shape}


def default_view(pipeline: ImprovedLDMPipeline, shape: str = "") -> View:
    """The view that a pipeline shows by default in one of its `shapes`."""
    drawn = shapes(pipeline)[shape]
    return whole_view(pipeline.default_original_side, pipeline.denoiser.control_inputs, drawn, shape)


def view_arguments(view: View, read: frozenset[str], drawn: Size = SQUARE) -> dict[str, Any]:
    """The control arguments of the pipeline that request a view, limited to those that the denoiser reads.

    Args:
        view: The requested view.
        read: `control_inputs` of the denoiser.
        drawn: (height, width) of the samples.
    """
    side, *_ = rectangle = [view[name] for name in RECTANGLE]
    values = rectangle_arguments(drawn, *rectangle)
    for row in CHOICES:
        choice = view.get(row.name, "")
        values |= {row.name: choice} if row.is_switch else row.shown((side, side)).get(choice, {})
    return {name: value for name, value in values.items() if name in read}


def described(view: View, drawn: Size = SQUARE) -> str:
    """A short description of a view of an image with the aspect ratio of `drawn`, without values of the default."""
    side, *crop = (view[name] for name in RECTANGLE)
    top, left, height, width = crop
    parts = [view[SHAPE]] * bool(view[SHAPE]) + [f"{side:g} px"]
    if crop != [0, 0, *whole_image_size(drawn, side)]:
        parts.append(f"crop {height:.3g}×{width:.3g} at {top:.3g}, {left:.3g}")
    chosen = {row.name: view[row.name] for row in variables_read(view) if row in CHOICES and view[row.name]}
    return " · ".join([*parts, *(name if choice is True else f"{name} {choice}" for name, choice in chosen.items())])


class Settings(NamedTuple):
    """All settings of an image, in the order of the page's inputs.

    Args:
        subject: Prompt or class label.
        seed: Seed of the noise.
        guidance_scale: Guidance scale λ.
        control_guidance_scale: Guidance scale β of the control.
        num_inference_steps: Number of sampler steps.
        view: The requested view.
    """

    subject: str | int
    seed: int
    guidance_scale: float
    control_guidance_scale: float
    num_inference_steps: int
    view: View


def compare(
    pipeline: ImprovedLDMPipeline, settings: Settings, on_step: Callable[[int], None] = lambda step: None
) -> tuple[Image.Image, Image.Image]:
    """Sample the default view and the requested view in one batch, with all other settings equal.

    Args:
        pipeline: Pipeline to sample from.
        settings: Settings of the images.
        on_step: Called after each step with the number of finished steps.

    Returns:
        The image of the default view and the image of the requested view.

    Raises:
        ValueError: If the pipeline refuses the settings.
    """
    return tuple(sample(pipeline, settings, [default_view(pipeline, settings.view[SHAPE]), settings.view], on_step))


def sample(
    pipeline: ImprovedLDMPipeline,
    settings: Settings,
    views: list[View],
    on_step: Callable[[int], None] = lambda step: None,
) -> list[Image.Image]:
    """Sample views of one shape from equal noise, with all settings except `settings.view`."""

    def callback(pipeline, step, timestep, tensors) -> dict:
        on_step(step + 1)
        return {}

    height, width = drawn = shapes(pipeline)[settings.view[SHAPE]]
    controls = [view_arguments(view, pipeline.denoiser.control_inputs, drawn) for view in views]
    asked = {name: [control.get(name) for control in controls] for control in controls for name in control}
    return pipeline(
        **{pipeline.semantic_argument: [settings.subject] * len(views)},
        **asked,
        height=height,
        width=width,
        guidance_scale=settings.guidance_scale,
        control_guidance_scale=settings.control_guidance_scale,
        num_inference_steps=settings.num_inference_steps,
        generator=[torch.Generator().manual_seed(settings.seed) for _ in views],
        callback_on_step_end=callback,
    ).images
