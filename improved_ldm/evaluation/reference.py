"""The real images that samples are compared with, identified by a hash."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import Rows, open_rows
from improved_ldm.data.transforms import RESAMPLING, ImageTransform
from improved_ldm.evaluation.networks import to_bytes
from improved_ldm.evaluation.processes import own_batches


@dataclass(frozen=True)
class Reference:
    """The first images of a set, whole and centre-cropped; the pixels are read again whenever they are needed.

    Args:
        rows: the opened set.
        transform: from an image to its pixels.
        source: where the set was opened.
        split: part of it.
        images: their number.
        sha256: of the transform's settings and of the pixels in order.
        captions: one an image, or None if the set is read without them.
        labels: one an image, or None if the set is read without them.
    """

    rows: Rows
    transform: ImageTransform
    source: str
    split: str
    images: int
    sha256: str
    captions: list[str] | None
    labels: list[int] | None

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """This process's share of the images, (batch, 3, height, width) in [-1, 1], as `own_batches` deals them."""
        own = {numbers.start for numbers in own_batches(self.images, batch_size)}
        for number, batch in enumerate(_read(self.rows, self.transform, self.images, batch_size)):
            if number * batch_size in own:
                yield batch["pixels"]

    def record(self) -> dict[str, Any]:
        """What identifies the images, for a record of a number."""
        return {
            "source": self.source,
            "split": self.split,
            "images": self.images,
            "sha256": self.sha256,
            "resolution": list(self.transform.target_size),
            "transform": _settings(self.transform),
        }


def open_reference(
    source: str, split: str, size: tuple[int, int], max_images: int, batch_size: int, **columns: str | None
) -> Reference:
    """Read the images of a set once: count them, hash them, keep their captions and labels.

    Args:
        source: anything that `open_rows` takes.
        split: part of the set.
        size: (height, width), pixels, that the whole images are scaled to, their centre cropped.
        max_images: take so many at most, in the order of the set.
        batch_size: images that are in memory at once.
        columns: further arguments of `open_rows`.

    Raises:
        FileNotFoundError, ValueError: as `open_rows` does.

    Source: our choice.
    """
    rows, transform = open_rows(source, split, **columns), ImageTransform(size)
    digest = hashlib.sha256(json.dumps(_settings(transform)).encode())
    images, captions, labels = 0, [], []
    for batch in _read(rows, transform, max_images, batch_size):
        images += len(batch["pixels"])
        captions += batch.get("caption", [])
        labels += batch["label"].tolist() if "label" in batch else []
        digest.update(to_bytes(batch["pixels"]).numpy().tobytes())
    return Reference(rows, transform, source, split, images, digest.hexdigest(), captions or None, labels or None)


def check_reference(reference: Reference, expected: dict[str, str]):
    """Refuse another reference set than the one that is expected.

    Args:
        reference: what is there.
        expected: hashes, by who expects them.

    Raises:
        ValueError: naming both hashes.
    """
    for who, sha256 in expected.items():
        if sha256 != reference.sha256:
            raise ValueError(
                f"{who} is for the reference set {sha256}; this one has the hash {reference.sha256}: other images, "
                "another number of them, or another resolution."
            )


def _read(rows: Rows, transform: ImageTransform, max_images: int, batch_size: int) -> Iterator[dict[str, Any]]:
    loader = make_loader(rows, transform, batch_size, shuffle_window=0, repeat=False)
    for start, batch in zip(range(0, max_images, batch_size), loader, strict=False):
        yield {name: values[: max_images - start] for name, values in batch.items()}


def _settings(transform: ImageTransform) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(transform) | {"resampling": RESAMPLING.name.lower()}))
