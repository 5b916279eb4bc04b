"""The bounds of the page's inputs. The server checks them for every client."""

import reprlib
from dataclasses import dataclass
from typing import Any

from improved_ldm.conditioning.control import RECTANGLE, whole_image_size
from improved_ldm.demo.comparison import CHOICES, SHAPE, Settings, View, default_view, shapes
from improved_ldm.pipeline import ImprovedLDMPipeline

MAX_PROMPT = 1000  # characters
MAX_SEED = 2**31 - 1
MAX_WAITING = 20  # requests in the queue
ROUNDING = 1e-6  # relative tolerance of a size, because a browser computes crops in float64 from rounded sizes


@dataclass(frozen=True)
class Range:
    """The numbers from `minimum` to `maximum`, both included.

    Args:
        minimum: Smallest number.
        maximum: Largest number.
        whole: Whether only integers are valid.
    """

    minimum: float
    maximum: float
    whole: bool = False

    def check(self, name: str, value: Any) -> float:
        """Check a value and return it, as an integer if only integers are valid.

        Raises:
            ValueError: If the value is not a number in the range. Strings and booleans are not numbers.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.minimum <= value <= self.maximum or (self.whole and value != int(value)):
            raise ValueError(f"`{name}` is {shown(value)}; it must be {self}.")
        return int(value) if self.whole else value

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        return f"a {kind} from {self.minimum:.12g} to {self.maximum:.12g}"


class Limits:
    """The bounds of all inputs of a pipeline's page.

    Args:
        pipeline: Pipeline of the page. Its defaults are within the bounds, and sizes are at most those of its default
            view.

    Source: our choice.
    """

    def __init__(self, pipeline: ImprovedLDMPipeline):
        scale, steps = pipeline.config.default_guidance_scale, pipeline.config.default_num_inference_steps
        self.subject = pipeline.semantic_argument
        self.num_classes = None if pipeline.takes_text else pipeline.denoiser.config.num_classes
        self.class_names = pipeline.config.class_names or []
        self.seed = Range(0, MAX_SEED, whole=True)
        self.guidance_scale = Range(1, max(10, scale))
        self.control_guidance_scale = Range(0, 5)
        self.num_inference_steps = Range(1, max(100, steps), whole=True)
        self.side = Range(1, pipeline.default_original_side)
        self.shapes = shapes(pipeline)
        self.views = {label: default_view(pipeline, label) for label in self.shapes}  # the default ones, by shape
        self.view = self.views[""]

    def check(
        self,
        subject: Any,
        seed: Any,
        guidance_scale: Any,
        control_guidance_scale: Any,
        num_inference_steps: Any,
        view: Any,
    ) -> Settings:
        """Check values from an unknown client and return them as settings.

        Args:
            subject: Prompt, or number or name of a class.
            seed: Seed of the noise.
            guidance_scale: Guidance scale λ.
            control_guidance_scale: Guidance scale β of the control.
            num_inference_steps: Number of sampler steps.
            view: A `View`, in which the shape and choices can be left out.

        Raises:
            ValueError: If a value is out of bounds. The message names the first such value as the client does.
        """
        return Settings(
            self._check_class(subject) if self.num_classes else self._check_prompt(subject),
            self.seed.check("seed", seed),
            self.guidance_scale.check("guidance_scale", guidance_scale),
            self.control_guidance_scale.check("control_guidance_scale", control_guidance_scale),
            self.num_inference_steps.check("num_inference_steps", num_inference_steps),
            self._check_view(view),
        )

    def _check_prompt(self, prompt: Any) -> str:
        if not isinstance(prompt, str):
            raise ValueError(f"`prompt` is {shown(prompt)}; it must be text.")
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"`prompt` has {len(prompt)} characters; it must have at most {MAX_PROMPT}.")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise ValueError(
                f"`prompt` is {shown(prompt)}; it contains half of a surrogate pair, which is not a character."
            )
        return prompt

    def _check_class(self, label: Any) -> int:
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        return Range(0, self.num_classes - 1, whole=True).check("class_labels", label)

    def _check_view(self, view: Any) -> View:
        choices = [SHAPE, *(row.name for row in CHOICES)]
        if not isinstance(view, dict) or not set(RECTANGLE) <= view.keys() <= {*RECTANGLE, *choices}:
            raise ValueError(
                f"`view` is {shown(view)}; it must be a record of {', '.join(RECTANGLE)} and optionally "
                f"{', '.join(choices)}."
            )
        side_name = RECTANGLE[0]
        side = self.side.check(f"view.{side_name}", view[side_name])
        self._check_label(SHAPE, view.get(SHAPE, ""), list(self.shapes))
        image = whole_image_size(self.shapes[view.get(SHAPE, "")], side)
        for extent, start, whole in (("height", "top", image[0]), ("width", "left", image[1])):
            Range(1, whole).check(f"view.{extent}", view[extent])
            Range(0, whole).check(f"view.{start}", view[start])
            if view[start] + view[extent] > whole * (1 + ROUNDING):
                raise ValueError(
                    f"`view.{start}` is {shown(view[start])}; with `view.{extent}` {shown(view[extent])}, the crop "
                    f"leaves the image, which has a {extent} of {shown(whole)} for `view.{side_name}` {shown(side)}."
                )
        for row in CHOICES:
            if row.name not in view:
                continue
            choice = view[row.name]
            if row.is_switch and not isinstance(choice, bool):
                raise ValueError(f"`view.{row.name}` is {shown(choice)}; it must be true or false.")
            if not row.is_switch:
                self._check_label(row.name, choice, ["", *row.shown((side, side))])
        return {name: view.get(name, default) for name, default in self.view.items()}

    @staticmethod
    def _check_label(name: str, label: Any, labels: list[str]):
        if label not in labels:
            raise ValueError(f"`view.{name}` is {shown(label)}; it must be one of {labels}.")


def shown(value: Any) -> str:
    """A short representation of a value on one line, for messages."""
    return reprlib.repr(value)
