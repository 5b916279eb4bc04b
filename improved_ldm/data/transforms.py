"""Crops, flips, and the control record of what was done to an image."""

import math
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageStat
from torchvision.transforms.functional import to_pil_image

from improved_ldm.conditioning.control import Control
from improved_ldm.conditioning.values import (
    MAX_SIDE,
    is_sequence,
    read_choice,
    read_integer,
    read_number,
    read_size,
    refuse,
)
from improved_ldm.data.images import JPEG_FACTORS
from improved_ldm.data.resize import resized
from improved_ldm.resolution import Resolution, side_of, sides_of

TRANSFORM_VERSION = 2  # of the crops and pixels that a transform makes from an image and a random number generator

CropPolicy = Literal["resize_then_crop", "crop_then_resize", "crop_at_target_scale"]
CropPosition = Literal["random", "centre"]
UNKNOWN_SHARE = 0.1  # probability that a measured value is unknown, so that a model learns to sample without it
MIN_CROP = 1e-6  # smallest crop, as a fraction of an image; less can only be a mistake


def render(image: Image.Image, control: Control) -> torch.Tensor:
    """Make the sample that a control record describes.

    An image that is larger than `original_size` is reduced to it, then cropped, scaled and mirrored. An image that is
    smaller, because it was decoded at a reduced size, is cropped at the same place without being enlarged first.

    Args:
        image: the image, RGB.
        control: the control record.

    Returns:
        (3, height, width) uint8, of `control.target_size`.

    Source: our choice. A crop at whole pixels that has the target's size is copied, not resampled.
    """
    height, width = control.original_size
    if image.height > height or image.width > width:
        image = Image.fromarray(resized(image, (round(height), round(width))))
    sample = _crop_and_scale(image, control)
    return to_pixels(sample[:, ::-1] if control.flip else sample)


def _crop_and_scale(image: Image.Image, control: Control) -> np.ndarray:
    """Crop to the smallest box of whole pixels first, so that the filter reads no pixel outside it."""
    (top, bottom), (left, right) = _spans(control, (image.height, image.width))
    x, y = math.floor(left), math.floor(top)
    outer = (x, y, math.ceil(right), math.ceil(bottom))
    if outer != (0, 0, *image.size):
        image = image.crop(outer)
    return resized(image, control.target_size, (left - x, top - y, right - x, bottom - y))


def _spans(control: Control, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Where the crop starts and ends along each axis of an image of `size`, (height, width) in pixels."""
    scales = _scales(control.original_size, size)
    starts = [start * scale for start, scale in zip(control.crops_coords_top_left, scales, strict=True)]
    extents = [extent * scale for extent, scale in zip(control.crop_size, scales, strict=True)]
    return [(a, min(a + extent, side)) for a, extent, side in zip(starts, extents, size, strict=True)]


def _scales(original: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """Pixels of an image of `size` per pixel of its original, along each axis.

    An image that was decoded smaller may end with pixels that are partly beyond its original.
    """
    for factor in JPEG_FACTORS:
        if size == tuple(math.ceil(side / factor) for side in original):
            return 1 / factor, 1 / factor
    return size[0] / original[0], size[1] / original[1]


def colour_statistics(image: Image.Image) -> tuple[float, ...]:
    """Mean and standard deviation of an RGB image's luminance (Rec. 601) and of its saturation (of HSV), in [0, 1]."""
    bands = [ImageStat.Stat(image.convert("L")), ImageStat.Stat(image.convert("HSV").getchannel("S"))]
    return _float32([value / 255 for band in bands for value in (*band.mean, *band.stddev)])


# Measurements of a sample, by the name of the control variable.
MEASURES: dict[str, Callable[[Image.Image], Any]] = {"colour": colour_statistics}


def to_pixels(image: Image.Image | np.ndarray) -> torch.Tensor:
    """An RGB image, or its values (height, width, 3), as a (3, height, width) uint8 tensor."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as float32 in [-1, 1], on their device.

    Both steps are rounded alike on every device: a division by a number could become a product on a GPU.
    """
    return pixels.float() / torch.full((), 127.5, device=pixels.device) - 1


@dataclass(frozen=True)
class ImageTransform:
    """Chooses at random which part of an image becomes a sample, and makes it. The defaults are not random.

    Args:
        resolution: target (height, width), pixels; one number for a square.
        crop_policy: `resize_then_crop` scales the image to cover the target, then crops it along one side;
            `crop_then_resize` takes a box of whole pixels, which may be smaller, then scales it to the target;
            `crop_at_target_scale` scales the image as for a sample of `target_scale` pixels, then crops the target.
        crop_position: `random` anywhere in the image, or `centre`.
        crop_probability: probability that `crop_then_resize` takes less than the largest crop of the target's aspect
            ratio.
        min_crop: smallest extent of such a crop, as a fraction of the largest crop, in [1e-6, 1]. The extent is
            uniform in [`min_crop`, 1].
        flip_probability: probability of mirroring the image left to right.
        reduce_probability: probability of reducing the image first, so that a model learns the effect of the original
            size on a sample.
        min_original_size: smallest shorter side of a reduced image, pixels. The shorter side is log-uniform between
            this and the shorter side of the image.
        target_scale: resolution of the samples of a later stage, pixels; `crop_at_target_scale` crops at the scale of
            a sample with as many pixels and the shape of this one.
        measured: names of the `MEASURES` that are written to the record; the others stay unknown.

    Raises:
        ValueError: if a value is out of its range.

    Source: crop policies and the record from Berrada et al., 2024; log-uniform reduction is our
    choice, so that every octave of size is equally frequent.
    """

    resolution: Resolution
    crop_policy: CropPolicy = "resize_then_crop"
    crop_position: CropPosition = "centre"
    crop_probability: float = 1.0
    min_crop: float = 1.0
    flip_probability: float = 0.0
    reduce_probability: float = 0.0
    min_original_size: int | None = None
    target_scale: Resolution | None = None
    measured: Collection[str] = ()

    def __post_init__(self):
        for name, value in self._read().items():
            object.__setattr__(self, name, value)  # the class is frozen
        if self.min_crop < 1 and self.crop_policy != "crop_then_resize":
            raise ValueError(f"`min_crop` is {self.min_crop!r}; '{self.crop_policy}' needs 1; its crop has one size.")
        if (self.target_scale is not None) != (self.crop_policy == "crop_at_target_scale"):
            raise ValueError(
                f"`target_scale` is {self.target_scale!r}; 'crop_at_target_scale' needs it, the others do not take it."
            )
        if self.target_scale is not None and side_of(self.target_scale) < side_of(self.sample_size):
            raise ValueError(f"`target_scale` is {self.target_scale}; it must be ≥ `resolution` {self.resolution}.")
        if self.reduce_probability and self.min_original_size is None:
            raise ValueError(
                f"`min_original_size` is None; with `reduce_probability` {self.reduce_probability} it must be a "
                "positive number of pixels."
            )

    def centred(self) -> "ImageTransform":
        """The transform without its random choices: the largest crop in the centre, neither mirrored nor reduced."""
        plain = {"crop_probability": 1.0, "min_crop": 1.0, "flip_probability": 0.0, "reduce_probability": 0.0}
        return replace(self, crop_position="centre", **plain)

    def _read(self) -> dict[str, Any]:
        """The fields as checked values."""
        return {
            "resolution": _read_resolution("resolution", self.resolution),
            "crop_policy": read_choice("crop_policy", self.crop_policy, get_args(CropPolicy)),
            "crop_position": read_choice("crop_position", self.crop_position, get_args(CropPosition)),
            "min_crop": read_number("min_crop", self.min_crop, MIN_CROP, 1),
            **{
                name: read_number(name, getattr(self, name), 0, 1)
                for name in ("crop_probability", "flip_probability", "reduce_probability")
            },
            **{
                name: read(name, value)
                for name, read in (("min_original_size", _read_side), ("target_scale", _read_resolution))
                if (value := getattr(self, name)) is not None
            },
        }

    @property
    def sample_size(self) -> tuple[int, int]:
        """(height, width) of the samples, pixels."""
        return sides_of(self.resolution)

    @property
    def _scaled_to(self) -> tuple[float, float]:
        """(height, width) that an image is scaled to cover, pixels."""
        if self.target_scale is None:
            return self.sample_size
        return tuple(side * side_of(self.target_scale) / side_of(self.sample_size) for side in self.sample_size)

    @property
    def decode_size(self) -> tuple[int, int]:
        """Smallest (height, width) to decode an image at, so that the smallest crop is not enlarged."""
        return tuple(math.ceil(side / self.min_crop) for side in self._scaled_to)

    def sample_control(self, image_size: tuple[int, int], rng: Random) -> Control:
        """Choose at random what to do to an image.

        Args:
            image_size: (height, width) of the image, pixels.
            rng: random number generator.

        Returns:
            The record, with values rounded to float32, so that a control tensor holds it exactly.
        """
        original_size = self._sample_original_size(read_size("image_size", image_size), rng)
        sample_crop = self._crop_then_resize if self.crop_policy == "crop_then_resize" else self._resize_then_crop
        corner, extent = sample_crop(original_size, rng)
        flip = rng.random() < self.flip_probability
        return Control(original_size, _float32(corner), _float32(extent), self.sample_size, flip)

    def __call__(
        self, image: Image.Image, rng: Random, image_size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, Control]:
        """Make a sample of an image.

        Args:
            image: the image, RGB.
            rng: random number generator.
            image_size: (height, width) of the original image, pixels, if it was decoded at a reduced size.

        Returns:
            pixels: (3, height, width) uint8; `pixel_values` makes them numbers in [-1, 1].
            control: the record; `render` makes the same pixels from it.
        """
        control = self.sample_control(image_size or (image.height, image.width), rng)
        pixels = render(image, control)
        if self.measured:
            control = replace(control, **self._measure(pixels, rng))
        return pixels, control

    def _measure(self, pixels: torch.Tensor, rng: Random) -> dict[str, Any]:
        sample = to_pil_image(pixels)
        return {
            name: None if rng.random() < UNKNOWN_SHARE else MEASURES[name](sample) for name in sorted(self.measured)
        }

    def _sample_original_size(self, image_size: tuple[int, int], rng: Random) -> tuple[int, int]:
        shorter = min(image_size)
        if rng.random() >= self.reduce_probability or shorter <= self.min_original_size:
            return image_size
        drawn = math.exp(rng.uniform(math.log(self.min_original_size), math.log(shorter)))
        scale = round(drawn) / shorter
        return tuple(max(1, round(side * scale)) for side in image_size)

    def _resize_then_crop(self, size: tuple[int, int], rng: Random) -> tuple[tuple, tuple]:
        scale = min(side / target for side, target in zip(size, self._scaled_to, strict=True))
        extent = tuple(target * scale for target in self.sample_size)
        return self._corner(size, extent, scale, rng), extent

    def _crop_then_resize(self, size: tuple[int, int], rng: Random) -> tuple[tuple, tuple]:
        scale = min(side / target for side, target in zip(size, self.sample_size, strict=True))
        if rng.random() < self.crop_probability:
            scale *= rng.uniform(self.min_crop, 1)
        extent = tuple(max(1, round(target * scale)) for target in self.sample_size)
        return self._corner(size, extent, scale, rng), extent

    def _corner(
        self, size: tuple[int, int], extent: tuple[float, float], scale: float, rng: Random
    ) -> tuple[int, ...]:
        """The corner of a crop, at a multiple of the largest power of two that is at most `scale`.

        It is thus at a whole pixel, even of an image that was decoded smaller, as far as `decode_size` allows. Two
        neighbouring places are at most a pixel of the sample apart, or a pixel of the image if it is enlarged.
        """
        step = 2 ** max(0, math.floor(math.log2(scale)))
        free = [math.floor((side - length) / step + 1e-9) for side, length in zip(size, extent, strict=True)]
        return tuple(step * self._place(places, rng) for places in free)

    def _place(self, free: int, rng: Random) -> int:
        return free // 2 if self.crop_position == "centre" else rng.randint(0, free)


def _read_side(name: str, side: Any) -> int:
    return read_integer(name, side, 1, MAX_SIDE)


def _read_resolution(name: str, resolution: Any) -> Resolution:
    """One or two sides, pixels, checked."""
    if not is_sequence(resolution):
        return _read_side(name, resolution)
    if len(resolution) != 2:
        refuse(name, resolution, "one or two positive integers")
    return tuple(_read_side(name, side) for side in resolution)


def _float32(numbers: Sequence[float]) -> tuple[float, ...]:
    return struct.unpack(f"{len(numbers)}f", struct.pack(f"{len(numbers)}f", *numbers))
