"""Crops, flips and the control record of what was really done to an image."""

import math
import struct
from dataclasses import dataclass
from random import Random
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from improved_ldm.conditioning.control import Control

# Antialiased when it reduces, as PIL's filters are, and the filter that FID is commonly computed with (clean-fid).
# It rings less than Lanczos on drawings and line art.
RESAMPLING = Image.Resampling.BICUBIC

CropPolicy = Literal["resize_then_crop", "crop_then_resize", "crop_at_target_scale"]
CropPosition = Literal["random", "centre"]


def render(image: Image.Image, control: Control) -> Image.Image:
    """Make the sample that a control record describes.

    An image that is larger than `original_size` is reduced to it, then cropped, scaled and mirrored. An image that is
    smaller, because it was decoded at a reduced size, is cropped at the same place without being enlarged first.

    Args:
        image: the source image.
        control: the record.

    Returns:
        An image of `control.target_size`.

    Source: our choice. A crop of the target's size at whole pixels is copied, never resampled.
    """
    height, width = control.original_size
    if image.height > height or image.width > width:
        image = image.resize((round(width), round(height)), RESAMPLING)
    image = _crop_and_scale(image, control)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if control.flip else image


def _crop_and_scale(image: Image.Image, control: Control) -> Image.Image:
    """Crop to the smallest box of whole pixels first, so that no filter reads a pixel outside it."""
    top, bottom = _span(control, axis=0, pixels=image.height)
    left, right = _span(control, axis=1, pixels=image.width)
    x, y = math.floor(left), math.floor(top)
    outer = (x, y, math.ceil(right), math.ceil(bottom))
    if outer != (0, 0, *image.size):
        image = image.crop(outer)
    size = (control.target_size[1], control.target_size[0])
    box = (left - x, top - y, right - x, bottom - y)
    return image if image.size == size and box == (0, 0, *size) else image.resize(size, RESAMPLING, box)


def _span(control: Control, axis: int, pixels: int) -> tuple[float, float]:
    """Where the crop starts and ends along an axis of an image that is `pixels` long."""
    scale = pixels / control.original_size[axis]
    start = control.crops_coords_top_left[axis] * scale
    return start, min(start + control.crop_size[axis] * scale, pixels)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """An RGB image as a (3, height, width) float32 tensor in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    return torch.from_numpy(pixels / np.float32(127.5) - np.float32(1))


@dataclass(frozen=True)
class ImageTransform:
    """Draws which part of an image becomes a sample, and makes that sample. The defaults leave nothing to chance.

    Args:
        resolution: target (height, width), pixels; one number for a square.
        crop_policy: `resize_then_crop` keeps the whole of the image's one side, after scaling it to the target;
            `crop_then_resize` takes a box of whole pixels that may be smaller, then scales it to the target;
            `crop_at_target_scale` scales the image as for a sample of `target_scale` pixels and keeps a part of that.
        crop_position: `random` anywhere in the image, or `centre`.
        crop_probability: probability that `crop_then_resize` takes less than the largest crop of the target's aspect
            ratio.
        min_crop: smallest extent that it then takes, as a fraction of that largest crop, in (0, 1]. The extent is
            uniform in [`min_crop`, 1].
        flip_probability: probability of mirroring the image left to right.
        reduce_probability: probability of reducing the image first, so that a model learns what the original size
            does to a sample.
        min_original_size: smallest shorter side that a reduced image may have, pixels. The shorter side is
            log-uniform between it and the image's own.
        target_scale: pixels a side of the samples of a later stage, at whose scale `crop_at_target_scale` crops.

    Raises:
        ValueError: if a value is out of its range.

    Source: crop policies and the record from Berrada et al., 2024; log-uniform reduction is our
    choice, so that every octave of size is met equally often.
    """

    resolution: int | tuple[int, int]
    crop_policy: CropPolicy = "resize_then_crop"
    crop_position: CropPosition = "centre"
    crop_probability: float = 1.0
    min_crop: float = 1.0
    flip_probability: float = 0.0
    reduce_probability: float = 0.0
    min_original_size: int | None = None
    target_scale: int | None = None

    def __post_init__(self):
        if len(self.target_size) != 2 or not all(isinstance(side, int) and side > 0 for side in self.target_size):
            raise ValueError(f"`resolution` is {self.resolution!r}; it must be one or two positive integers.")
        if self.crop_policy not in get_args(CropPolicy):
            raise ValueError(
                f"`crop_policy` is {self.crop_policy!r}; it must be one of {', '.join(get_args(CropPolicy))}."
            )
        if self.crop_position not in ("random", "centre"):
            raise ValueError(f"`crop_position` is {self.crop_position!r}; it must be 'random' or 'centre'.")
        if not 0 < self.min_crop <= 1:
            raise ValueError(f"`min_crop` is {self.min_crop!r}; it must be in (0, 1].")
        if self.min_crop < 1 and self.crop_policy != "crop_then_resize":
            raise ValueError(f"`min_crop` is {self.min_crop!r}; '{self.crop_policy}' needs 1, its crop has one size.")
        if (self.target_scale is not None) != (self.crop_policy == "crop_at_target_scale"):
            raise ValueError(
                f"`target_scale` is {self.target_scale!r}; 'crop_at_target_scale' needs it, and only that."
            )
        if self.target_scale is not None and self.target_scale < max(self.target_size):
            raise ValueError(f"`target_scale` is {self.target_scale}; it must be ≥ `resolution` {self.resolution}.")
        for name in ("crop_probability", "flip_probability", "reduce_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; it must be in [0, 1].")
        if self.reduce_probability and (self.min_original_size is None or self.min_original_size < 1):
            raise ValueError(
                f"`min_original_size` is {self.min_original_size!r}; with `reduce_probability` "
                f"{self.reduce_probability} it must be a positive number of pixels."
            )

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) of the samples, pixels."""
        return (self.resolution, self.resolution) if isinstance(self.resolution, int) else tuple(self.resolution)

    @property
    def _scaled_to(self) -> tuple[int, int]:
        """(height, width) that an image is scaled to cover, pixels."""
        return self.target_size if self.target_scale is None else (self.target_scale, self.target_scale)

    @property
    def decode_size(self) -> tuple[int, int]:
        """(height, width) below which an image must not be decoded, or the smallest crop would be enlarged."""
        return tuple(math.ceil(side / self.min_crop) for side in self._scaled_to)

    def draw(self, image_size: tuple[int, int], rng: Random) -> Control:
        """Draw what to do to an image.

        Args:
            image_size: (height, width) of the image, pixels.
            rng: source of the chance.

        Returns:
            The record, its values rounded to float32, so that it survives a control tensor unchanged.
        """
        original_size = self._draw_original_size(image_size, rng)
        draw_crop = self._crop_then_resize if self.crop_policy == "crop_then_resize" else self._resize_then_crop
        corner, extent = draw_crop(original_size, rng)
        flip = rng.random() < self.flip_probability
        return Control(original_size, _float32(corner), _float32(extent), self.target_size, flip)

    def __call__(
        self, image: Image.Image, rng: Random, image_size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor, Control]:
        """Make a sample of an image.

        Args:
            image: the image, RGB.
            rng: source of the chance.
            image_size: (height, width) that the image really has, pixels, where it was decoded smaller.

        Returns:
            pixels: (3, height, width) float32 in [-1, 1].
            control: the record; `render` makes the same pixels from it.
        """
        control = self.draw(image_size or (image.height, image.width), rng)
        return to_pixels(render(image, control)), control

    def _draw_original_size(self, image_size: tuple[int, int], rng: Random) -> tuple[int, int]:
        shorter = min(image_size)
        if rng.random() >= self.reduce_probability or shorter <= self.min_original_size:
            return tuple(image_size)
        drawn = math.exp(rng.uniform(math.log(self.min_original_size), math.log(shorter)))
        scale = round(drawn) / shorter
        return tuple(max(1, round(side * scale)) for side in image_size)

    def _resize_then_crop(self, size: tuple[int, int], rng: Random) -> tuple[tuple, tuple]:
        """The corner lies on a pixel of the scaled image, as if it had been scaled first and cropped then."""
        scale = min(side / target for side, target in zip(size, self._scaled_to, strict=True))
        slack = [math.floor(side / scale - target + 1e-9) for side, target in zip(size, self.target_size, strict=True)]
        corner = tuple(self._place(free, rng) * scale for free in slack)
        return corner, tuple(target * scale for target in self.target_size)

    def _crop_then_resize(self, size: tuple[int, int], rng: Random) -> tuple[tuple, tuple]:
        scale = min(side / target for side, target in zip(size, self.target_size, strict=True))
        if rng.random() < self.crop_probability:
            scale *= rng.uniform(self.min_crop, 1)
        extent = tuple(max(1, round(target * scale)) for target in self.target_size)
        return tuple(self._place(side - length, rng) for side, length in zip(size, extent, strict=True)), extent

    def _place(self, free: int, rng: Random) -> int:
        return free // 2 if self.crop_position == "centre" else rng.randint(0, free)


def _float32(pair: tuple[float, float]) -> tuple[float, float]:
    return struct.unpack("2f", struct.pack("2f", *pair))
