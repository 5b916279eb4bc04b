"""Decodes images to upright RGB, regardless of their depth, palette, transparency or orientation."""

import io
from typing import IO, Any

import fsspec
import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

EXIF_ORIENTATION = 0x0112
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1
# The operation that turns an image upright, by EXIF orientation; 1 and all other values need none.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_SIDES = (5, 6, 7, 8)
JPEG_FACTORS = (1, 2, 4, 8)  # by which PIL can decode a JPEG image smaller; sides are rounded up


def read_image(stored: dict[str, Any] | bytes, min_size: tuple[int, int] | None = None) -> tuple[Image.Image, tuple]:
    """Decode an image, or the first frame if it has several.

    Args:
        stored: the encoded bytes, or a dict with `bytes` or the `path` of a file.
        min_size: smallest (height, width), pixels. A JPEG image is decoded at the smallest scale of 1, 1/2, 1/4 or
            1/8 that is not below it on either side, which is faster; None decodes at full size.

    Returns:
        image: RGB, upright, with transparent parts on white.
        size: (height, width) of the upright image, pixels.
    """
    image = Image.open(io.BytesIO(encoded_image(stored)))
    is_jpeg = isinstance(image, JpegImageFile)
    if not is_jpeg:
        image.load()  # this turns TIFF upright; in PNG the orientation may follow the pixels
    orientation = _orientation(image)
    width, height = image.size[::-1] if orientation in SWAPS_SIDES else image.size
    if is_jpeg and min_size is not None:
        factor = _jpeg_factor((height, width), min_size, is_turned=orientation in TURNS)
        image.draft(None, (image.width // factor, image.height // factor))
    image = _to_rgb(image)
    return (image.transpose(TURNS[orientation]) if orientation in TURNS else image), (height, width)


def _jpeg_factor(size: tuple[int, int], min_size: tuple[int, int], is_turned: bool) -> int:
    """The largest factor at which a JPEG image of `size` is not smaller than `min_size`, both (height, width).

    The last pixels of an image that is decoded smaller may be partly beyond it. If the image is turned, they may be
    the first and move all others, so its sides must be multiples of the factor.
    """
    room = min(side // smallest for side, smallest in zip(size, min_size, strict=True))
    fits = [factor for factor in JPEG_FACTORS if not is_turned or all(side % factor == 0 for side in size)]
    return max(factor for factor in fits if factor <= max(room, 1))


def encoded_image(stored: dict[str, Any] | bytes) -> bytes:
    """The encoded bytes of a stored image, which may be in a file of their own."""
    encoded = stored if isinstance(stored, bytes) else stored.get("bytes")
    if encoded is None:
        with _opened(stored["path"]) as file:
            encoded = file.read()
    return encoded


def read_size(stored: dict[str, Any] | bytes) -> tuple[int, int]:
    """The (height, width) of an upright image, pixels, from its header.

    The orientation of a PNG image counts if it is written before the pixels.

    Args:
        stored: as in `read_image`.
    """
    encoded = stored if isinstance(stored, bytes) else stored.get("bytes")
    with _opened(stored["path"]) if encoded is None else io.BytesIO(encoded) as file, Image.open(file) as image:
        is_late = isinstance(image, PngImageFile) and "exif" not in image.info
        orientation = None if is_late else _orientation(image)
        return image.size if orientation in SWAPS_SIDES else image.size[::-1]


def _opened(path: str) -> IO[bytes]:
    # `fsspec.open` would read brackets and `*` in a local name as a pattern
    return fsspec.open(path, "rb") if "://" in path else open(path, "rb")


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation, or None if it is missing or cannot be read."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # PIL's error for damaged metadata depends on the damage; the pixels may be intact
        return None
    return orientation if type(orientation) is int and orientation in TURNS else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Convert a grey image of more than 8 bits to 8 bits.

    Values of 12 or 16 bits keep their upper 8 bits. Modes `I` and `F` do not state their range: it is taken to be the
    smallest of [0, 1] (float only), 8, 16, 31 and 32 bits that holds all values, or the range from the smallest to
    the largest value if some are negative.

    Raises:
        ValueError: if a value is NaN or infinite.

    Source: our choice.
    """
    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(TIFF_SAMPLE_FORMAT) == (UNSIGNED,):
        values = values.view(np.uint32)  # PIL reads the highest bit as a sign
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("the image has values that are NaN or infinite")
    low, high = _value_range(image.mode, values, tags.get(TIFF_BITS, (16,))[0])
    grey = np.floor((values - low) / (high - low) * 256).clip(0, 255).astype(np.uint8)
    if tags.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:  # PIL inverts 8-bit images only
        grey = 255 - grey
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)


def _value_range(mode: str, values: np.ndarray, bits: int) -> tuple[float, float]:
    """The value of black, and the value just above white."""
    low, high = float(values.min()), float(values.max())
    if mode.startswith("I;16"):
        return 0.0, 2.0**bits
    if low < 0:
        return low, high if high > low else low + 1
    if mode == "F" and high < 2:  # resampling leaves values slightly above 1
        return 0.0, 1.0
    return 0.0, next((2.0**bits for bits in (8, 16, 31, 32) if high < 2.0**bits), high)
