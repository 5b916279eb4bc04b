"""What a reader of a set has skipped and given.

Bad rows are counted by reason, logged as they double, and end the run if they are too many. Given samples are counted
by their source.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from improved_ldm.data.rows import BadRowError
from improved_ldm.data.shards import NO_END_MARK

logger = logging.getLogger(__name__)

MAX_CORRUPT = 0.05  # fraction of bad rows that a run may skip
MIN_ROWS_TO_JUDGE = 100  # rows of a pass after which that fraction is checked


class CorruptImagesError(RuntimeError):
    """Too many rows of a set cannot be used."""


@dataclass
class Tally:
    """The rows of a reader's current pass, and what it skipped.

    Args:
        seen: rows of this pass.
        skipped: number of bad rows among them, by reason.
        lost: reason of each shard that failed in this pass, by its place.
        without_caption: rows of this pass whose caption is empty.
        left_out: number of rows that the filter of the set leaves out, by reason; they are not bad.
        last_pass: what the previous pass skipped; None in the first pass.
    """

    seen: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    without_caption: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    last_pass: dict[str, int] | None = None

    def counts(self) -> dict[str, int]:
        """Number of rows and shards that were skipped in this pass, by reason."""
        return dict(self.skipped | self.left_out | Counter(self.lost.values()))

    def skipped_rows(self) -> dict[str, int]:
        """What the last complete pass skipped, or the first pass so far."""
        return self.counts() if self.last_pass is None else dict(self.last_pass)

    def skip(self, error: BadRowError, place: str | None, named: dict[str, int]):
        """Count a bad row; log it if it is the first of its kind, the second, the fourth and so on.

        Args:
            error: what is wrong with it.
            place: location of the row in words.
            named: counts at the last log message, by reason, which readers of the same set share.
        """
        reason = error.reason
        self.skipped[reason] = count = self.skipped.get(reason, 0) + 1
        if count.bit_count() == 1 and count > named.get(reason, 0):  # a damaged set does not flood the log
            named[reason] = count
            place = place or f"row {self.seen} of this pass"
            logger.warning("skipped %s: %s%s", place, error, f"; {count} rows so far" if count > 1 else "")

    def lose(self, lost: Mapping[str, str], num_shards: int, named: dict[str, int]):
        """Count shards that cannot be read to the end.

        Args:
            lost: reasons by place.
            num_shards: number of the shards that this reader reads.
            named: as in `skip`.

        Raises:
            CorruptImagesError: if these are more than `MAX_CORRUPT` of the shards, and more than one, or all shards.
        """
        self.lost |= lost
        bad = {place: reason for place, reason in self.lost.items() if reason != NO_END_MARK}
        if bad and (len(bad) > max(1, MAX_CORRUPT * num_shards) or len(bad) == num_shards):
            listed = "; ".join(f"{place} ({reason})" for place, reason in bad.items())
            raise CorruptImagesError(f"{len(bad)} of {num_shards} shards cannot be read: {listed}.")
        for place, reason in lost.items():
            if place not in named:
                named[place] = 1
                logger.warning("skipped %s: %s; %d of %d shards so far", place, reason, len(self.lost), num_shards)

    def leave_out(self, reasons: Iterable[str]):
        """Count rows that the filter of the set leaves out."""
        self.left_out = dict(Counter(self.left_out) + Counter(reasons))

    def judge(self):
        """Raise a CorruptImagesError if more than `MAX_CORRUPT` of the rows were skipped."""
        if sum(self.skipped.values()) > MAX_CORRUPT * self.seen:
            raise CorruptImagesError(f"{self._in_words()}; at most {MAX_CORRUPT:.0%} are allowed.")

    def judge_pass(self, is_whole: bool):
        """Judge a pass at its end, and log what it skipped.

        Args:
            is_whole: whether this reader read all rows; one bad row means little in a small share.

        Raises:
            CorruptImagesError: as in `judge`.
        """
        if self.skipped and self.skipped != self.last_pass:
            logger.warning("%s in this pass; they are skipped", self._in_words())
        if self.without_caption and self.last_pass is None:
            logger.warning("%d of %d rows have an empty caption", self.without_caption, self.seen)
        if sum(self.skipped.values()) > 1 or is_whole:
            self.judge()

    def _in_words(self) -> str:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in self.skipped.items())
        return f"{sum(self.skipped.values())} of {self.seen} rows cannot be used ({reasons})"


def skipped_rows(state: Any) -> dict[str, int]:
    """Number of skipped rows of a set, by reason, from the state of one or several loaders.

    Args:
        state: state of a stream or of anything that holds states of streams, such as a loader with workers. Each
            reader counts its last complete pass, or its first pass so far.
    """
    if isinstance(state, list | tuple):
        return dict(sum((Counter(skipped_rows(item)) for item in state), Counter()))
    if not isinstance(state, dict):
        return {}
    if "skipped_rows" in state:
        return dict(state["skipped_rows"])
    return skipped_rows(list(state.values()))


def given_state(given: Mapping[int, int]) -> dict[str, dict[str, int]]:
    """Part of a loader's state: the number of samples that it has given, by the number of their source."""
    return {"given": {str(source): count for source, count in given.items()}}


def given_by_source(state: Any) -> Counter[int]:
    """Number of samples that loaders have given, by the number of their source, from their states."""
    if isinstance(state, list | tuple):
        return sum(map(given_by_source, state), Counter())
    if not isinstance(state, dict):
        return Counter()
    if "given" in state:
        return Counter({int(source): count for source, count in state["given"].items()})
    return given_by_source(list(state.values()))
