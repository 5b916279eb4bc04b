"""Sample two images from equal noise: one with the default view and one with the requested view."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from PIL import Image

from improved_ldm.conditioning.control import RECTANGLE, VARIABLES, rectangle_arguments, variables_read
from improved_ldm.pipeline import ImprovedLDMPipeline

# The requested control as a record of the page: a rectangle of a square image, in pixels of the image, and for every
# other control input a boolean (for a switch) or the label of one of the shown values. "" stands for the default.
View = dict[str, Any]

# Control inputs that the rectangle does not set and that have values to choose from.
CHOICES = tuple(row for row in VARIABLES if row.name not in rectangle_arguments(1, 0, 0, 1, 1) and row.shown((1, 1)))


def whole_view(side: float, read: frozenset[str]) -> View:
    """The view of a whole image with a side of `side` pixels and defaults for the other inputs in `read`."""
    choices = {row.name: False if row.is_switch else "" for row in CHOICES if row.name in read}
    return dict(zip(RECTANGLE, (side, 0, 0, side, side), strict=True)) | choices


def default_view(pipeline: ImprovedLDMPipeline) -> View:
    """The view that a pipeline shows by default."""
    return whole_view(pipeline.default_original_side, pipeline.denoiser.control_inputs)


def view_arguments(view: View, read: frozenset[str]) -> dict[str, Any]:
    """The control arguments of the pipeline that request a view, limited to those that the denoiser reads.

    Args:
        view: The requested view.
        read: `control_inputs` of the denoiser.
    """
    side, *_ = rectangle = [view[name] for name in RECTANGLE]
    values = rectangle_arguments(*rectangle)
    for row in CHOICES:
        choice = view.get(row.name, "")
        values |= {row.name: choice} if row.is_switch else row.shown((side, side)).get(choice, {})
    return {name: value for name, value in values.items() if name in read}


def described(view: View) -> str:
    """A short description of a view, without values that are the default."""
    side, *crop = (view[name] for name in RECTANGLE)
    top, left, height, width = crop
    parts = [f"{side:g} px"]
    if crop != [0, 0, side, side]:
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

    def callback(pipeline, step, timestep, tensors) -> dict:
        on_step(step + 1)
        return {}

    views = (default_view(pipeline), settings.view)
    controls = [view_arguments(view, pipeline.denoiser.control_inputs) for view in views]
    asked = {name: [control.get(name) for control in controls] for control in controls for name in control}
    return tuple(
        pipeline(
            **{pipeline.semantic_argument: [settings.subject] * len(views)},
            **asked,
            guidance_scale=settings.guidance_scale,
            control_guidance_scale=settings.control_guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            generator=[torch.Generator().manual_seed(settings.seed) for _ in views],
            callback_on_step_end=callback,
        ).images
    )
