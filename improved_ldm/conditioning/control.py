"""The table of the control variables, and the record of their values: which view of an image a sample shows.

The image transforms write the record, the latent cache stores it, the trainer feeds it, the pipeline builds it and the
denoisers embed it. All of them, and the figures, the model card and the demo, take the variables from the fields of
`Control`. To add a variable, add a field there and measure its value in `data.transforms`.
"""

import hashlib
import json
import math
from collections import namedtuple
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal

import torch

from improved_ldm.conditioning.control_row import Variable
from improved_ldm.conditioning.values import Size, read_flag, read_size, read_vector, refuse

FRACTION_SCALE = 64.0  # for values in [0, 1]: the fastest sinusoid resolves steps of 1/64 and is smooth below that
OCTAVE_SCALE = 16.0  # for logarithms to base 2: the fastest sinusoid resolves 1/16 of an octave, 4%
RATIO_TOLERANCE = 0.02  # of aspect ratios, because sizes in multiples of a patch cannot always match them exactly

SHOWN_SIZES = (0.3, 0.65, 1)  # in figures, as fractions of the original side
SHOWN_EXTENT = 0.65  # side of a crop in figures, as a fraction of the image
SHOWN_CORNERS = {  # of these crops: (top, left), fractions of the image
    "top left": (0, 0),
    "top right": (0, 0.35),
    "bottom left": (0.35, 0),
    "bottom right": (0.35, 0.35),
}


def in_octaves(value: torch.Tensor) -> torch.Tensor:
    """A size or a ratio, scaled to be embedded."""
    return OCTAVE_SCALE * torch.log2(value)


def in_fractions(value: torch.Tensor) -> torch.Tensor:
    """A value in [0, 1], scaled to be embedded."""
    return FRACTION_SCALE * value


def crop_arguments(
    top: float, left: float, height: float, width: float, size: Size = (1, 1)
) -> dict[str, tuple[float, float]]:
    """The control arguments for a rectangle given in fractions of an image of `size` (height, width) pixels."""
    return {
        "crops_coords_top_left": (top * size[0], left * size[1]),
        "crop_size": (height * size[0], width * size[1]),
    }


RECTANGLE = ("original_size", "top", "left", "height", "width")  # as single numbers; the first is the shorter side
ASPECT_RATIO = "target_size"  # the variable whose quantity is the aspect ratio of a sample


def whole_image_size(drawn: Size, side: float) -> Size:
    """(height, width) of the image with the shorter side `side` and the aspect ratio of a sample (height, width)."""
    return tuple(side * length / min(drawn) for length in drawn)


def rectangle_arguments(drawn: Size, side: float, *rectangle: float) -> dict[str, tuple[float, float]]:
    """The control arguments for a `RECTANGLE`, in pixels, of an image with the aspect ratio of a sample."""
    return {"original_size": whole_image_size(drawn, side), **crop_arguments(*rectangle)}


def _default_original_size(asked: dict[str, Any], drawn: Size, side: float) -> Size:
    """A size with the aspect ratio of the sample that is at least as large as the crop."""
    size = whole_image_size(drawn, side)
    return size if asked["crop_size"] is None else tuple(map(max, size, asked["crop_size"]))


def _default_crop_size(asked: dict[str, Any], drawn: Size, side: float) -> Size:
    """The part of the image to the right of the corner and below it."""
    size, corner = asked["original_size"], asked["crops_coords_top_left"]
    rest = (size[0] - corner[0], size[1] - corner[1])
    if min(rest) <= 0:
        refuse("crops_coords_top_left", corner, f"inside the image, whose `original_size` is {size}")
    return rest


def _shown_sizes(image_size: Size) -> dict[str, dict[str, Any]]:
    sizes = [tuple(max(1, round(side * share)) for side in image_size) for share in SHOWN_SIZES]
    return {"{} x {}".format(*size): {"original_size": size} for size in sizes}


def _shown_crops(image_size: Size) -> dict[str, dict[str, Any]]:
    extent = (SHOWN_EXTENT, SHOWN_EXTENT)
    return {
        f"{SHOWN_EXTENT:.0%}, {label}": crop_arguments(*corner, *extent, image_size)
        for label, corner in SHOWN_CORNERS.items()
    }


@dataclass(frozen=True)
class Control:
    """How a training sample was made from an image, or which view of an image a generated sample should show.

    The image, scaled to `original_size`, is cropped to `crop_size` at `crops_coords_top_left`, then the crop is scaled
    to `target_size`, and mirrored if `flip` is set. The fields are the table of the control variables; `Variable`
    documents the metadata of each field.

    Raises:
        ValueError: If a value is not valid, or the crop leaves the image.

    Source: names from SDXL micro-conditioning; `crop_size` and `flip` from Berrada et al., 2024. The common frame of
    the first three values is our choice.
    """

    original_size: Size = field(
        metadata=dict(
            columns=("original_height", "original_width"),
            part="size",
            level="low",
            quantities=lambda c: [c.original_height, c.original_width],
            scaled=in_octaves,
            read=read_size,
            default=_default_original_size,
            help="(height, width) in pixels of the image that the sample is a view of; small asks for little detail",
            shown=_shown_sizes,
        )
    )
    crops_coords_top_left: Size = field(
        metadata=dict(
            columns=("crop_top", "crop_left"),
            part="crop",
            level="high",  # fractions, so that a different `original_size` does not change φ_h
            quantities=lambda c: [c.crop_top / c.original_height, c.crop_left / c.original_width],
            scaled=in_fractions,
            read=partial(read_size, minimum_is_zero=True),
            default=lambda asked, drawn, side: (0, 0),
            help="(top, left) corner of the part of that image that is shown, in its pixels",
        )
    )
    crop_size: Size = field(
        metadata=dict(
            columns=("crop_height", "crop_width"),
            part="crop",
            level="high",
            quantities=lambda c: [c.crop_height / c.original_height, c.crop_width / c.original_width],
            scaled=in_fractions,
            read=read_size,
            default=_default_crop_size,
            help="(height, width) of that part, in pixels of the image",
            shown=_shown_crops,
        )
    )
    target_size: Size = field(
        metadata=dict(
            columns=("target_height", "target_width"),
            part="size",
            level="high",
            quantities=lambda c: [c.target_width / c.target_height],
            scaled=in_octaves,
            read=read_size,
            default=lambda asked, drawn, side: drawn,
            help="(height, width) that the view is scaled to",
        )
    )
    flip: bool = field(
        default=False,
        metadata=dict(
            columns=("flip",),
            part="flip",
            level="high",
            quantities=lambda c: [c.flip],
            scaled=in_fractions,
            read=read_flag,
            help="the mirrored image",
            shown=lambda image_size: {"": {"flip": True}},
        ),
    )
    colour: tuple[float, ...] | None = field(
        default=None,
        metadata=dict(
            columns=("luminance_mean", "luminance_spread", "saturation_mean", "saturation_spread"),
            part="colour",
            level="low",
            quantities=lambda c: [c.luminance_mean, c.luminance_spread, c.saturation_mean, c.saturation_spread],
            scaled=in_fractions,
            read=partial(read_vector, length=4, minimum=0, maximum=1),
            help="mean and standard deviation of the luminance, then of the saturation, all in [0, 1]",
            shown=lambda image_size: {
                "dark": {"colour": (0.25, 0.2, 0.3, 0.2)},
                "bright": {"colour": (0.75, 0.2, 0.3, 0.2)},
                "pale": {"colour": (0.5, 0.2, 0.1, 0.1)},
                "vivid": {"colour": (0.5, 0.2, 0.7, 0.2)},
            },
        ),
    )

    def __post_init__(self):
        for row in VARIABLES:
            value = getattr(self, row.name)
            if value is not None or row.default is not None:
                object.__setattr__(self, row.name, row.read(row.name, value))  # the class is frozen
        for axis, side in enumerate(("height", "width")):
            start, extent, whole = (
                self.crops_coords_top_left[axis],
                self.crop_size[axis],
                self.original_size[axis],
            )
            if start + extent > whole * (1 + 1e-6):  # float32 rounding of a stored record
                raise ValueError(
                    f"`crops_coords_top_left` {start} plus `crop_size` {extent} leaves the image: "
                    f"`original_size` has {side} {whole}."
                )

    @classmethod
    def of_whole_image(cls, original_size: Size, target_size: Size, flip: bool = False):
        """The record of an image that is scaled to `target_size` without a crop."""
        return cls(original_size, (0, 0), original_size, target_size, flip)

    @classmethod
    def asked(cls, given: dict[str, Any], drawn: Size, side: float) -> "Control":
        """The record for the values that a caller gives.

        Args:
            given: Values by name; missing values and None take the default.
            drawn: (height, width) of the sample, in pixels.
            side: Default of the original image's shorter side, in pixels.

        Raises:
            ValueError: If values are not valid, alone or in combination.
        """
        values = {row.name: given.get(row.name) for row in VARIABLES}
        values |= {row.name: row.read(row.name, values[row.name]) for row in VARIABLES if values[row.name] is not None}
        for row in VARIABLES:
            if values[row.name] is None:
                values[row.name] = row.default(values, drawn, side) if callable(row.default) else row.default
        return cls(**values)

    def to_row(self) -> list[float]:
        """The record as numbers in the order of `COLUMNS`."""
        return [number for row in VARIABLES for number in row.numbers(getattr(self, row.name))]


VARIABLES = tuple(
    Variable(**{"name": entry.name, "default": entry.default, **entry.metadata}) for entry in fields(Control)
)

# A record as a row of float32 numbers. NaN marks unknown values; a row of NaN is the null control. A tensor has all
# columns, also those that a denoiser does not read; the columns of a new variable come last.
COLUMNS = tuple(column for row in VARIABLES for column in row.columns)
NUM_CONTROL = len(COLUMNS)
NUM_REQUIRED = sum(len(row.columns) for row in VARIABLES if row.default is not None)  # the optional ones are last
CONTROL_LAYOUT = hashlib.sha256(json.dumps(COLUMNS).encode()).hexdigest()[:8]  # identifies a stored tensor's columns

CONTROL_PARTS = tuple(dict.fromkeys(row.part for row in VARIABLES))
ControlPart = Literal[CONTROL_PARTS]
DEFAULT_PARTS: tuple[ControlPart, ...] = ("size", "crop", "flip")  # as in the paper; other parts are opt-in
CONTROL_INPUTS = frozenset(row.name for row in VARIABLES)  # the control arguments of a pipeline
INPUTS_OF_PARTS: dict[ControlPart, frozenset[str]] = {
    kind: frozenset(row.name for row in VARIABLES if row.part == kind) for kind in CONTROL_PARTS
}

Columns = namedtuple("Columns", COLUMNS)


def variables_read(inputs: Collection[str]) -> tuple[Variable, ...]:
    """The rows of the table with these names, such as the `control_inputs` of a denoiser."""
    return tuple(row for row in VARIABLES if row.name in inputs)


def check_parts(parts: Collection[str]):
    """Raise a ValueError if a part of the control does not exist."""
    unknown = set(parts) - set(CONTROL_PARTS)
    if unknown:
        raise ValueError(f"`control_parts` has {sorted(unknown)}; it may have {', '.join(CONTROL_PARTS)}.")


def control_tensor(controls: list[Control]) -> torch.Tensor:
    """Stack records into the (batch, `NUM_CONTROL`) float32 tensor that a denoiser takes."""
    return torch.tensor([control.to_row() for control in controls], dtype=torch.float32)


def control_columns(control: torch.Tensor) -> Columns:
    """The columns of a (batch, `NUM_CONTROL`) control by name, each (batch,) float32.

    The last columns, those of the optional variables, may be left out; they are unknown then.

    Raises:
        ValueError: For another number of columns.
    """
    missing = NUM_CONTROL - control.shape[-1]
    if missing not in (0, NUM_CONTROL - NUM_REQUIRED):
        raise ValueError(
            f"`control` has {control.shape[-1]} columns; it must have {NUM_CONTROL}: {', '.join(COLUMNS)}, or "
            f"the first {NUM_REQUIRED} of them."
        )
    if missing:
        control = torch.nn.functional.pad(control, (0, missing), value=torch.nan)
    return Columns(*control.float().unbind(-1))


def required_columns(control: torch.Tensor) -> torch.Tensor:
    """The columns of a (batch, `NUM_CONTROL`) control that every record knows: those before the optional ones."""
    return control[:, :NUM_REQUIRED]


def null_control(batch_size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The control of `batch_size` samples without any known value: (batch, `NUM_CONTROL`) of NaN."""
    return torch.full((batch_size, NUM_CONTROL), torch.nan, device=device)


def is_null(control: torch.Tensor) -> torch.Tensor:
    """Which rows of a (batch, `NUM_CONTROL`) control are null: (batch,) bool."""
    return control.isnan().all(-1)


def ratio_warning(controls: list[Control], height: int, width: int) -> str | None:
    """The warning if records have another aspect ratio than the samples, else None."""
    targets = [control.target_size for control in controls]
    others = [size for size in targets if abs(math.log(size[1] / size[0] * height / width)) > RATIO_TOLERANCE]
    if not others:
        return None
    return (
        f"`target_size` is {others[0]} for {len(others)} of {len(controls)} samples, which have another aspect ratio: "
        f"`height` {height} and `width` {width}. The model is conditioned on an aspect ratio that it does not sample."
    )
