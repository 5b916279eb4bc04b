"""The real images that samples are compared with, identified by a hash."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from improved_ldm.data.loader import make_pass
from improved_ldm.data.resize import RESAMPLING
from improved_ldm.data.sources import Rows, open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation.processes import own_batches
from improved_ldm.places import shareable_place


class Identified(Protocol):
    """What has a hash of its content."""

    sha256: str


@dataclass(frozen=True)
class Reference:
    """The first images of a data set, scaled and centre-cropped. The pixels are read again each time.

    Args:
        rows: The opened data set.
        transform: Transform from an image to its pixels.
        source: Source of the data set.
        split: Split of the data set.
        images: Number of images.
        sha256: Hash of the transform's settings and the pixels in order.
        captions: One caption per image, or None if the captions are not read.
        labels: One label per image, or None if the labels are not read.
    """

    rows: Rows
    transform: ImageTransform
    source: str
    split: str
    images: int
    sha256: str
    captions: list[str] | None
    labels: list[int] | None

    @property
    def description(self) -> str:
        """What is read, in one line."""
        return self.rows.description

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The batches (batch, 3, height, width) in [-1, 1] of this process, as assigned by `own_batches`."""
        own = {numbers.start for numbers in own_batches(self.images, batch_size)}
        for number, batch in enumerate(_read(self.rows, self.transform, self.images, batch_size)):
            if number * batch_size in own:
                yield pixel_values(batch["pixels"])

    def record(self) -> dict[str, Any]:
        """Everything that identifies the images, for the record of an evaluation."""
        return {
            "source": shareable_place(self.source),
            "split": self.split,
            "images": self.images,
            "sha256": self.sha256,
            "resolution": list(self.transform.sample_size),
            "transform": _settings(self.transform),
        }


def open_reference(
    source: str, split: str, size: tuple[int, int], max_images: int, batch_size: int, **columns: str | None
) -> Reference:
    """Read the images of a data set once to count and hash them, and keep their captions and labels.

    Args:
        source: Source of the data set, as for `open_rows`.
        split: Split of the data set.
        size: (height, width) in pixels that the images are scaled and centre-cropped to.
        max_images: Maximum number of images, taken in the order of the data set.
        batch_size: Number of images in memory at once.
        columns: Further arguments of `open_rows`.

    Raises:
        FileNotFoundError, ValueError: As for `open_rows`.

    Source: our choice.
    """
    return reference_of_rows(open_rows(source, split, **columns), source, split, size, max_images, batch_size)


def reference_of_rows(
    rows: Rows, source: str, split: str, size: tuple[int, int], max_images: int, batch_size: int
) -> Reference:
    """The reference of an opened data set; the other arguments are as for `open_reference`."""
    transform = ImageTransform(size)
    digest = hashlib.sha256(json.dumps(_settings(transform)).encode())
    images, captions, labels = 0, [], []
    for batch in _read(rows, transform, max_images, batch_size):
        images += len(batch["pixels"])
        captions += batch.get("caption", [])
        labels += batch["label"].tolist() if "label" in batch else []
        digest.update(batch["pixels"].numpy().tobytes())
    return Reference(rows, transform, source, split, images, digest.hexdigest(), captions or None, labels or None)


def check_reference(reference: Identified, expected: dict[str, str]):
    """Check that a reference set is the expected one.

    Args:
        reference: The reference set, or its statistics.
        expected: Expected hashes, by the argument or file that states them.

    Raises:
        ValueError: If a hash differs; the message names both.
    """
    for who, sha256 in expected.items():
        if sha256 != reference.sha256:
            raise ValueError(
                f"{who} is for the reference set {sha256}, but this set has the hash {reference.sha256}: the images, "
                "their number or the resolution differ."
            )


def _read(rows: Rows, transform: ImageTransform, max_images: int, batch_size: int) -> Iterator[dict[str, Any]]:
    loader = make_pass(rows, transform, batch_size)
    for start, batch in zip(range(0, max_images, batch_size), loader, strict=False):
        yield {name: values[: max_images - start] for name, values in batch.items()}


def _settings(transform: ImageTransform) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(transform) | {"resampling": RESAMPLING.name.lower()}))
