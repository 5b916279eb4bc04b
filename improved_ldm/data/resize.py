"""Scales images with an antialiased bicubic filter."""

import math

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

# Antialiased when reducing, like all filters of PIL, and the usual filter for FID (clean-fid). It rings less than
# Lanczos on drawings and line art.
RESAMPLING = Image.Resampling.BICUBIC

Box = tuple[float, float, float, float]


def resized(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> np.ndarray:
    """Scale an image, or a part of it, like `Image.resize` but two to four times as fast where torch can do it.

    Args:
        image: the image, RGB.
        size: (height, width) of the result, pixels.
        box: (left, top, right, bottom) of the part, pixels; default: the whole image.

    Returns:
        (height, width, 3) uint8, the same on every CPU. They differ from PIL's in about one value in 200, by 1 or 2.
    """
    (height, width), box = size, box or (0, 0, *image.size)
    if image.size == (width, height) and box == (0, 0, width, height):
        return np.asarray(image)
    if not _torch_can(image, size, box):
        return np.asarray(image.resize((width, height), RESAMPLING, box))
    # one float above the quotient, since torch rounds the sides of its result down
    factors = [math.nextafter(height / box[3], math.inf), math.nextafter(width / box[2], math.inf)]
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scaled = F.interpolate(values, scale_factor=factors, mode="bicubic", antialias=True, recompute_scale_factor=False)
    return scaled[0].permute(1, 2, 0)[:height, :width].numpy()


def _torch_can(image: Image.Image, size: tuple[int, int], box: Box) -> bool:
    """Whether torch scales a part of an image right.

    It begins at the first pixel, does nothing along an axis whose length stays, although the box may be shorter, makes
    results of one column wrong on CPUs without AVX2, and makes the whole image, so a tiny box would make a huge one.
    """
    (height, width), (left, top, right, bottom) = size, box
    return (
        left == top == 0
        and min(right, bottom) >= 1
        and math.ceil(right) == image.width != width > 1
        and math.ceil(bottom) == image.height != height
    )
