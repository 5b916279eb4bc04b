"""Aspect-ratio buckets: sizes of samples with about the same area, from which each image gets the nearest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from improved_ldm.conditioning.values import MAX_SIDE, read_integer, read_number
from improved_ldm.data.files import count_of


@dataclass(frozen=True)
class Buckets:
    """The sizes of the samples of a run.

    Args:
        resolution: side of the square whose area all buckets have, as nearly as the step allows, pixels.
        step: the sides are multiples of it, pixels.
        max_aspect: largest ratio of the longer to the shorter side.

    Raises:
        ValueError: if an argument is out of range, or no other size than the square is left.

    Source: buckets by aspect ratio are common in fine-tuning; sizes and rounding are our choice.
    """

    resolution: int
    step: int
    max_aspect: float = 2.0

    def __post_init__(self):
        read_integer("resolution", self.resolution, 1, MAX_SIDE)
        read_integer("bucket_step", self.step, 1, MAX_SIDE)
        read_number("max_aspect", self.max_aspect, 1, MAX_SIDE)
        if self.resolution % self.step:
            raise ValueError(f"`bucket_step` is {self.step}; it must divide `resolution`, which is {self.resolution}.")
        if len(self.sizes) == 1:
            raise ValueError(
                f"`bucket_step` is {self.step} and `max_aspect` is {self.max_aspect:g}; at `resolution` "
                f"{self.resolution} they leave no other size than the square. Choose a smaller step or a larger "
                "aspect ratio."
            )

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of each bucket, pixels, from the tallest to the widest."""
        square, found = self.resolution, set()
        for shorter in range(self.step, square + 1, self.step):
            longer = max(1, round(square**2 / shorter / self.step)) * self.step
            if longer <= self.max_aspect * shorter:
                found |= {(longer, shorter), (shorter, longer)}
        return tuple(sorted(found, key=lambda size: size[1] / size[0]))

    def nearest(self, sizes: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
        """The number of the bucket nearest in log ratio, (n,) int, to each of the (n, 2) image (height, width)."""
        own = np.log([width / height for height, width in self.sizes])
        sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
        ratios = np.log(sizes[:, 1] / sizes[:, 0])
        return np.searchsorted((own[1:] + own[:-1]) / 2, ratios, side="right")

    def beyond(self, sizes: Sequence[tuple[int, int]] | np.ndarray) -> int:
        """The number of images (n, 2) that are longer than the largest aspect ratio."""
        sizes = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
        return int((sizes.max(1) > self.max_aspect * sizes.min(1) * (1 + 1e-9)).sum())


def default_step(resolution: int) -> int:
    """The step of the buckets at a resolution: the largest divisor of it that is at most a sixteenth, pixels."""
    return next(step for step in range(max(1, resolution // 16), 0, -1) if resolution % step == 0)


def fill_lines(counts: Mapping[tuple[int, int], int], cropped: int, buckets: Buckets) -> Iterator[str]:
    """How many images each bucket has, and how many are beyond the largest aspect ratio, one line each."""
    fill = ", ".join(f"{height}x{width}: {counts.get((height, width), 0):,}" for height, width in buckets.sizes)
    yield f"images per bucket (height x width): {fill}"
    if cropped:
        limit = f"`transform.max_aspect` {buckets.max_aspect:g}"
        yield f"{count_of(cropped, 'image')} beyond {limit}, cropped to the nearest bucket"


def rare_lines(counts: Mapping[tuple[int, int], int], batch_size: int) -> Iterator[str]:
    """How many buckets have fewer images, over all sets, than a batch; no line if there are none."""
    if rare := sum(0 < count < batch_size for count in counts.values()):
        few = f"fewer images than a batch of {batch_size}"
        yield f"{count_of(rare, 'bucket')} with {few}; batches of these are smaller"
