"""What the page asks of a pipeline: one drawing as it comes, and one as asked, from equal noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image

from improved_ldm.pipeline import ImprovedLDMPipeline


@dataclass(frozen=True)
class View:
    """A rectangle of a square image, mirrored or not; numbers are pixels of that image.

    Args:
        original_size: side of the image.
        top: of the rectangle, from the upper edge.
        left: of the rectangle, from the left edge.
        height: of the rectangle.
        width: of the rectangle.
        flip: whether it is mirrored left to right.
    """

    original_size: float
    top: float
    left: float
    height: float
    width: float
    flip: bool = False

    @classmethod
    def of_whole_image(cls, original_size: float) -> "View":
        """All of an image."""
        return cls(original_size, 0, 0, original_size, original_size)

    @classmethod
    def by_default(cls, pipeline: ImprovedLDMPipeline) -> "View":
        """What a pipeline shows when nothing is asked."""
        return cls.of_whole_image(pipeline.config.default_original_size or pipeline.default_size)

    def arguments(self, read: frozenset[str]) -> dict[str, Any]:
        """The control arguments of the pipeline that ask for this view, as far as a denoiser reads them.

        Args:
            read: `control_inputs` of the denoiser.
        """
        values = {
            "original_size": (self.original_size, self.original_size),
            "crops_coords_top_left": (self.top, self.left),
            "crop_size": (self.height, self.width),
            "flip": self.flip,
        }
        return {name: value for name, value in values.items() if name in read}

    def __str__(self) -> str:
        whole = self.of_whole_image(self.original_size)
        parts = [f"{self.original_size:g} px"]
        if (self.top, self.left, self.height, self.width) != (whole.top, whole.left, whole.height, whole.width):
            parts.append(f"crop {self.height:.3g}×{self.width:.3g} at {self.top:.3g}, {self.left:.3g}")
        return " · ".join([*parts, "flip"] if self.flip else parts)


class Settings(NamedTuple):
    """All that makes a drawing, in the order of the page's inputs.

    Args:
        subject: a prompt, or a class label.
        seed: of the noise.
        guidance_scale: λ.
        control_guidance_scale: β.
        num_inference_steps: network evaluations.
        view: what is asked for of the control.
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
    """Draw the pipeline's default view and the asked one, all else equal, in one batch.

    Args:
        pipeline: draws.
        settings: what is asked.
        on_step: called with the number of steps that are done.

    Returns:
        The plain and the asked image.

    Raises:
        ValueError: where the seed is missing or the pipeline refuses the settings.
    """
    if settings.seed is None:
        raise ValueError("`seed` is None; it must be a whole number ≥ 0.")

    def callback(pipeline, step, timestep, tensors) -> dict:
        on_step(step + 1)
        return {}

    views = (View.by_default(pipeline), settings.view)
    controls = [view.arguments(pipeline.denoiser.control_inputs) for view in views]
    return tuple(
        pipeline(
            **{"prompt" if pipeline.takes_text else "class_labels": [settings.subject] * len(views)},
            **{name: [control[name] for control in controls] for name in controls[0]},
            guidance_scale=settings.guidance_scale,
            control_guidance_scale=settings.control_guidance_scale,
            num_inference_steps=settings.num_inference_steps,
            generator=[torch.Generator().manual_seed(settings.seed) for _ in views],
            callback_on_step_end=callback,
        ).images
    )
