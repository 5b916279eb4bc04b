"""The order in which sets of known length are read: shuffled passes, mixed by weight, in batches of one group."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from improved_ldm.seeds import derive_seed


class PlannedBatch(NamedTuple):
    """The rows of a batch.

    Args:
        group: number of the group that all rows belong to.
        sources: (batch,) int, number of the source of each row.
        rows: (batch,) int, number of each row in its source.
        epochs: (batch,) int, number of passes over its source before this one.
    """

    group: int
    sources: np.ndarray
    rows: np.ndarray
    epochs: np.ndarray


def next_source(drawn: Sequence[int], weights: Sequence[float]) -> int:
    """The source of the next row: the n-th row of a source with weight w is due at (n + ½) / w.

    Args:
        drawn: number of rows drawn from each source so far; they stay proportional to the weights, up to one row.
        weights: shares of the sources, relative to each other.
    """
    if len(drawn) == 1:
        return 0
    due = [(number + 0.5) / weight for number, weight in zip(drawn, weights, strict=True)]
    return due.index(min(due))


class BatchPlan:
    """Endless batches over sets of known length. Every process computes the same plan and takes its own batches.

    Each source is passed over again and again, every time in a new random order of all its rows, and the sources are
    mixed by weight. The rows are drawn one after the other and wait, in the list of their group, for a full batch. So
    a row comes again only after all other rows of its group and source: after k passes it was read k or k − 1 times.
    A group that has fewer rows than a batch makes batches of all its rows; otherwise its rows would wait for many
    passes.

    The state is the position in the plan: the number of rows drawn from each source, and the waiting rows.

    Args:
        groups: for each source the group of each row, (rows,) int; rows of one group fit into one batch.
        batch_size: rows per batch.
        seed: seed of the order.
        weights: share of each source in the rows that are drawn, relative to the others; default: equal.
        shuffle: whether to shuffle each pass; otherwise it is in the order of the source.

    Raises:
        ValueError: if a source has no rows.

    Source: our choice.
    """

    def __init__(
        self,
        groups: Sequence[np.ndarray],
        batch_size: int,
        seed: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ):
        if empty := [number for number, rows in enumerate(groups) if not len(rows)]:
            raise ValueError(f"source {empty[0] + 1} of {len(groups)} has no rows to repeat.")
        self.groups, self.batch_size, self.seed, self.shuffle = groups, batch_size, seed, shuffle
        self.weights = [1.0] * len(groups) if weights is None else list(weights)
        counts = zip(*np.unique(np.concatenate(groups), return_counts=True), strict=True)
        self.full = {int(group): min(batch_size, int(count)) for group, count in counts}
        if len(self.full) == 1:
            self.full = dict.fromkeys(self.full, batch_size)
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._start()

    def _start(self):
        self.batches = 0  # batches before the position
        self.drawn = [0] * len(self.groups)
        self._waiting: dict[int, list[tuple[int, int, int]]] = {}

    def __iter__(self) -> Iterator[PlannedBatch]:
        """The batches from the position on; `batches` and the state count each one as it is given."""
        is_plain = len(self.full) == len(self.groups) == 1
        while True:
            batch = self._next_rows() if is_plain else self._next_full_group()
            self.batches += 1
            yield batch

    def _next_rows(self) -> PlannedBatch:
        """The next rows of a single source with a single group."""
        places = np.arange(self.drawn[0], self.drawn[0] + self.batch_size)
        self.drawn[0] += self.batch_size
        epochs, offsets = np.divmod(places, len(self.groups[0]))
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            rows[epochs == epoch] = self._order(0, epoch)[offsets[epochs == epoch]]
        return PlannedBatch(next(iter(self.full)), np.zeros_like(rows), rows, epochs)

    def _next_full_group(self) -> PlannedBatch:
        """The rows of the group that is the next to fill a batch."""
        while True:
            source = next_source(self.drawn, self.weights)
            epoch, offset = divmod(self.drawn[source], len(self.groups[source]))
            self.drawn[source] += 1
            row = int(self._order(source, epoch)[offset])
            group = int(self.groups[source][row])
            waiting = self._waiting.setdefault(group, [])
            waiting.append((source, row, epoch))
            if len(waiting) >= self.full[group]:
                return PlannedBatch(group, *np.array(self._waiting.pop(group)).T)

    def _order(self, source: int, epoch: int) -> np.ndarray:
        """The rows of a source in the order of a pass."""
        size = len(self.groups[source])
        if not self.shuffle:
            epoch = 0
        if (source, epoch) not in self._orders:
            self._orders.pop((source, epoch - 1), None)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, source, epoch))
            shuffled = torch.randperm(size, generator=generator) if self.shuffle else torch.arange(size)
            self._orders[source, epoch] = shuffled.numpy()
        return self._orders[source, epoch]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was given, as JSON values."""
        waiting = [[group, list(rows)] for group, rows in self._waiting.items()]
        return {"batches": self.batches, "drawn": list(self.drawn), "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]):
        """Continue after the batch at which `state_dict` was taken.

        If the sets have changed, waiting rows that are no longer there, or in another group, are left out.
        """
        self.batches, self.drawn = state["batches"], list(state["drawn"])
        self._waiting = {
            group: [tuple(row) for row in rows if self._is_in(group, *row[:2])] for group, rows in state["waiting"]
        }

    def _is_in(self, group: int, source: int, row: int) -> bool:
        return row < len(self.groups[source]) and self.groups[source][row] == group and group in self.full
