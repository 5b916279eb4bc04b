"""Images that a set holds more than once."""

import io

import numpy as np
import pytest
from PIL import Image

from improved_ldm.data.duplicates import Duplicates


def picture(seed: int, side: int = 96) -> Image.Image:
    areas = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(areas).resize((side, side), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def found(*images: Image.Image, format: str = "PNG") -> Duplicates:
    duplicates = Duplicates()
    for number, image in enumerate(images):
        duplicates.add(encoded(image, format), image, f"row {number}")
    return duplicates


def test_equal_bytes_are_copies():
    duplicates = found(picture(0), picture(1), picture(0), picture(0))
    assert (duplicates.copies, duplicates.first_copy) == (2, ("row 2", "row 0"))
    assert duplicates.near() == (0, None)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((70, 70), Image.Resampling.BICUBIC),
        lambda image: Image.open(io.BytesIO(encoded(image, "JPEG"))).convert("RGB"),
        lambda image: Image.eval(image, lambda level: min(level + 1, 255)),
    ],
    ids=["scaled", "encoded again", "brighter by one level"],
)
def test_copies_that_look_alike_are_near(change):
    assert found(picture(0), picture(1), change(picture(0))).near() == (1, ("row 2", "row 0"))


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda image: Image.merge("RGB", image.split()[::-1]),
        lambda image: image.crop((8, 0, 96, 88)),
    ],
    ids=["mirrored", "other colours", "cropped"],
)
def test_other_views_are_not_near(change):
    assert found(picture(0), change(picture(0))).near() == (0, None)


def test_no_image_has_no_duplicates():
    assert found().near() == (0, None)
