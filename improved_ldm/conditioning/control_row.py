"""A row in the table of control variables; the table itself is in `conditioning.control`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from improved_ldm.conditioning.values import Size, is_one_value, is_one_vector, read_flag

ControlLevel = Literal["high", "low"]


@dataclass(frozen=True)
class Variable:
    """A row of the table.

    Args:
        name: Name of the pipeline's argument and of the record's field.
        columns: Names of the variable's columns in a control tensor, in order.
        part: Entry of a denoiser's `control_parts` that enables the variable.
        level: `high` is read at every timestep, `low` with the weight γ_c(t).
        quantities: Function from the columns of a control, by name, to the scalars that a denoiser reads.
        scaled: Function from one of them to the number to embed, scaled so that sinusoids resolve steps of 1.
        read: Function from the argument's name and a caller's value to a checked value.
        default: Value if the caller gives none: a value, None for unknown, or a function of the given values by name
            (None if not given), of the sample's (height, width), and of the original image's shorter side in pixels.
        help: Meaning of the value, in one line.
        shown: Function from the (height, width) of an original image, in pixels, to the views in figures: label →
            arguments.
    """

    name: str
    columns: tuple[str, ...]
    part: str
    level: ControlLevel
    quantities: Callable[[Any], Sequence[torch.Tensor]]
    scaled: Callable[[torch.Tensor], torch.Tensor]
    read: Callable[[str, Any], Any]
    default: Any
    help: str
    shown: Callable[[Size], dict[str, dict[str, Any]]] = lambda image_size: {}

    def features(self, columns: Any) -> list[torch.Tensor]:
        """The numbers to embed, (batch,) each, from the columns of a control by name."""
        return [self.scaled(quantity) for quantity in self.quantities(columns)]

    def is_one(self, value: Any) -> bool:
        """Whether an argument is one value for all samples, and not a sequence of values."""
        return is_one_value(value) if len(self.columns) == 1 else is_one_vector(value)

    @property
    def is_switch(self) -> bool:
        """Whether the variable is a boolean."""
        return self.read is read_flag

    def views(self, image_size: Size) -> dict[str, dict[str, Any]]:
        """The views in figures for an original image of (height, width) pixels: full label → arguments."""
        return {f"{self.name}\n{label}".strip(): arguments for label, arguments in self.shown(image_size).items()}

    def numbers(self, value: Any) -> tuple[float, ...]:
        """A value as numbers in the order of the columns; NaN if it is unknown."""
        if value is None:
            return (math.nan,) * len(self.columns)
        return tuple(map(float, value)) if len(self.columns) > 1 else (float(value),)
