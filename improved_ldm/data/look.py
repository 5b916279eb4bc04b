"""A look at a set before training: every row is read as in training, and what is seen is counted."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from improved_ldm.conditioning.control import Control
from improved_ldm.data.buckets import Buckets
from improved_ldm.data.cuts import enlargement, share_cut_away
from improved_ldm.data.duplicates import Duplicates
from improved_ldm.data.images import encoded_image
from improved_ldm.data.loader import bucket_transforms
from improved_ldm.data.rows import BadRowError, Rows
from improved_ldm.data.shards import LOST
from improved_ldm.data.stored import StoredRow, stored_windows
from improved_ldm.data.token_counts import TokenCounts
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.seeds import derive_seed

WINDOW = 64  # rows that are in memory at once
CAPTIONS_AT_ONCE = 256
MUCH_CUT = 0.25  # share of an image outside the crop from which on it is counted


@dataclass(frozen=True)
class Seen:
    """A row, and the sample that a model sees of it.

    Args:
        image: the image, RGB, possibly decoded at a reduced size.
        caption: the caption; None if captions are not read.
        label: the class; None if classes are not read.
        pixels: (3, height, width) uint8 sample.
        control: its control record.
    """

    image: Image.Image
    caption: str | None
    label: int | None
    pixels: torch.Tensor
    control: Control


@dataclass
class Samples:
    """The samples of one size: their number, and how many are enlarged or cut."""

    rows: int = 0
    enlarged: int = 0
    much_cut: int = 0  # samples of which more than `MUCH_CUT` is cut away
    cut_away: float = 0.0  # sum over the samples of the share of the image outside the crop

    def add(self, control: Control):
        """Count a sample."""
        cut_away = share_cut_away(control)
        self.rows += 1
        self.enlarged += enlargement(control) > 1
        self.much_cut += cut_away > MUCH_CUT
        self.cut_away += cut_away


class Look:
    """Reads the rows of a set once, transformed as in the first pass of training, and counts what it sees.

    `skipped` and `lost` count rows and shards that cannot be used, by reason, and `first_place` has the place of the
    first of them; `left_out` counts rows that the filter of the set leaves out. `sizes` counts images by (height,
    width), `samples` by the size of the sample, `labels` rows by their class; `tokens` counts the tokens of captions.

    Args:
        rows: the opened set.
        transform: the transform of the training images.
        buckets: sizes of the samples; None for the size of the transform.
        seed: seed of the run.
        tokenizer: tokenizer of the captions; None does not count their tokens.
    """

    def __init__(
        self,
        rows: Rows,
        transform: ImageTransform,
        buckets: Buckets | None = None,
        seed: int = 0,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.rows, self.transforms, self.buckets = rows, bucket_transforms(transform, buckets), buckets
        self.seed, self.tokens = seed, tokenizer and TokenCounts(tokenizer)
        self.skipped, self.lost, self.left_out, self.first_place = Counter(), Counter(), Counter(), {}
        self.sizes, self.samples = Counter(), {one.sample_size: Samples() for one in self.transforms}
        self.labels, self.empty_captions = Counter(), 0
        self.duplicates = Duplicates()
        self._captions, self._waiting = set(), []  # hashes of all captions, and those that are not yet counted

    @property
    def usable(self) -> int:
        """The number of rows that can be used."""
        return self.sizes.total()

    @property
    def distinct_captions(self) -> int:
        """The number of different captions."""
        return len(self._captions)

    def __iter__(self) -> Iterator[Seen | None]:
        """All rows; None in place of one that is not used."""
        number = 0
        for window in stored_windows(self.rows.dataset, WINDOW, self.rows.is_remote):
            for stored in window:
                if LOST in stored.values:
                    self._count(self.lost, stored.values[LOST], stored.place)
                    continue
                place, seed = stored.place or f"row {number}", (self.seed, 0, *(stored.number or (-1, number)))
                yield self._see(stored, place, derive_seed(*seed))
                number += 1
        self._count_tokens()

    def _see(self, stored: StoredRow, place: str, seed: int) -> Seen | None:
        if reason := self.rows.reason_to_leave_out(stored):
            self.left_out[reason] += 1
            return None
        try:
            transform = self._transform_of(stored)
            row = self.rows.decoded(stored, seed, transform.decode_size)
        except BadRowError as error:
            self._count(self.skipped, error.reason, place)
            return None
        pixels, control = transform(row.image, Random(row.seed), row.size)
        self.sizes[row.size] += 1
        self.samples[transform.sample_size].add(control)
        self.labels.update([] if row.label is None else [row.label])
        self._read_caption(row.caption)
        self.duplicates.add(encoded_image(self.rows.stored_image(stored.values)), row.image, place)
        return Seen(row.image, row.caption, row.label, pixels, control)

    def _transform_of(self, stored: StoredRow) -> ImageTransform:
        if self.buckets is None:
            return self.transforms[0]
        return self.transforms[self.buckets.nearest([self.rows.image_size(stored.values)])[0]]

    def _count(self, counts: Counter, reason: str, place: str):
        counts[reason] += 1
        self.first_place.setdefault(reason, place)

    def _read_caption(self, caption: str | None):
        if caption is None:
            return
        self.empty_captions += not caption.strip()
        self._captions.add(hash(caption))
        self._waiting.append(caption)
        if len(self._waiting) == CAPTIONS_AT_ONCE:
            self._count_tokens()

    def _count_tokens(self):
        if self.tokens is not None:
            self.tokens.add(self._waiting)
        self._waiting = []
