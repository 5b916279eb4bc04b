"""Finds images that a set holds more than once: the same bytes, or thumbnails that hardly differ."""

import hashlib

import numpy as np
from PIL import Image

SIDE = 16  # of the compared thumbnails, pixels
MAX_DIFFERENCE = 0.03  # of thumbnails, as a fraction of their contrast; scaled copies are below, other pictures above
LEAST_CONTRAST = 1.0  # of an image of one colour, in levels of 256
MAX_COMPARED = 20_000  # images whose thumbnails are compared in pairs, which takes seconds
PART = 1024  # images that are compared with all earlier ones at once


class Duplicates:
    """Collects images one by one and counts those that repeat an earlier one.

    `copies` is the number of images whose bytes are those of an earlier image, and `first_copy` names the first of
    them and the earlier one, or is None.
    """

    def __init__(self):
        self.copies, self.first_copy = 0, None
        self._places: dict[bytes, str] = {}
        self._thumbnails: list[np.ndarray] = []
        self._compared: list[str] = []  # places of the images of the thumbnails

    def add(self, encoded: bytes, image: Image.Image, place: str):
        """Add an image.

        Args:
            encoded: the bytes of its file.
            image: the decoded image.
            place: location in words.
        """
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        earlier = self._places.setdefault(digest, place)
        if earlier is not place:
            self.copies += 1
            self.first_copy = self.first_copy or (place, earlier)
        elif len(self._compared) < MAX_COMPARED:
            small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3)
            self._thumbnails.append(np.asarray(small, dtype=np.uint8).ravel())
            self._compared.append(place)

    @property
    def compared(self) -> int:
        """The number of images whose thumbnails are compared: those without an exact copy, up to `MAX_COMPARED`."""
        return len(self._compared)

    def near(self) -> tuple[int, tuple[str, str] | None]:
        """The number of images whose thumbnail is almost that of an earlier one, and the places of the first pair.

        Two thumbnails are almost equal if the root mean square of their difference is below `MAX_DIFFERENCE` of the
        smaller of their two contrasts (standard deviations). Source: our choice.
        """
        if not self._compared:
            return 0, None
        pixels = np.stack(self._thumbnails).astype(np.float32)  # (images, side · side · 3)
        contrast = np.maximum(pixels.std(1), LEAST_CONTRAST)
        squares, count, first = (pixels**2).mean(1), 0, None
        for start in range(0, len(pixels), PART):
            part = slice(start, start + PART)
            before = slice(0, min(start + PART, len(pixels)))
            products = pixels[part] @ pixels[before].T / pixels.shape[1]
            differences = np.sqrt(np.maximum(squares[part, None] + squares[before] - 2 * products, 0))
            allowed = MAX_DIFFERENCE * np.minimum(contrast[part, None], contrast[before])
            is_near = np.tril(differences < allowed, start - 1)  # with earlier images only
            count += int(is_near.any(1).sum())
            if first is None and is_near.any():
                one, earlier = np.argwhere(is_near)[0]
                first = (self._compared[start + one], self._compared[earlier])
        return count, first
