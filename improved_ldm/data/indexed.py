"""Sets of known length in a true random order: which rows are used, in which bucket, and their batches."""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from improved_ldm.data.buckets import Buckets, fill_lines, rare_lines
from improved_ldm.data.kept_files import cached_file, write_once
from improved_ldm.data.order import BatchPlan, PlannedBatch
from improved_ldm.data.rows import BadRowError, Row, Rows
from improved_ldm.data.stored import Table
from improved_ldm.data.stream import MAX_STAND_INS, reader_among
from improved_ldm.data.tally import MIN_ROWS_TO_JUDGE, Tally
from improved_ldm.seeds import derive_seed

READERS = 8  # threads that read the headers of images
KEPT_FROM = 10_000  # rows of a set whose image sizes are kept for the next run
UNKNOWN_SIZE = (1, 1)  # of an image that cannot be read; it is counted when its turn comes


@dataclass(frozen=True)
class IndexedSource:
    """The rows of a set that are used, in the order of the set.

    Args:
        rows: the opened set.
        table: its rows, for reading them in any order.
        numbers: (rows,) int, number in the table of each row that is used.
        groups: (rows,) int, bucket of each of them; zeros without buckets.
        left_out: number of rows that are not used, by reason.
        cropped: number of rows beyond the largest aspect ratio of the buckets.
    """

    rows: Rows
    table: Table
    numbers: np.ndarray
    groups: np.ndarray
    left_out: Counter
    cropped: int = 0

    @classmethod
    def of(cls, rows: Rows, buckets: Buckets | None = None) -> "IndexedSource":
        """Find out which rows of a set are used, and their buckets; reads the headers of images if that needs sizes.

        Args:
            rows: an opened set that has a table.
            buckets: sizes of the samples; None if there is only one.

        Raises:
            CorruptImagesError: if too many of its shards cannot be read.
            ValueError: if no row is left.
        """
        table = rows.table()
        Tally().lose(table.lost, table.num_shards, rows.named)
        sizes = image_sizes(rows, table) if rows.row_filter.reads_sizes or buckets else None
        numbers, left_out = _filtered(rows, table, sizes)
        if not len(numbers):
            reasons = ", ".join(f"{count}: {reason}" for reason, count in left_out.items())
            raise ValueError(f"none of its {len(table):,} rows is used{f' ({reasons})' if reasons else ''}.")
        if buckets is None:
            return cls(rows, table, numbers, np.zeros(len(numbers), dtype=np.int64), left_out)
        used = sizes[numbers]
        return cls(rows, table, numbers, buckets.nearest(used), left_out, buckets.beyond(used))


def image_sizes(rows: Rows, table: Table) -> np.ndarray:
    """The (height, width) of all images of a set, pixels, (rows, 2) int; `UNKNOWN_SIZE` for those that are damaged.

    The sizes of a large set are kept until its files change.
    """
    if len(table) < KEPT_FROM:
        return _read_sizes(rows, table)
    kept = cached_file(rows.files, [rows.image_column, "sizes"], ".npy")
    write_once(kept, lambda unfinished: _save(unfinished, _read_sizes(rows, table)))
    return np.load(kept)


def _save(path: Path, sizes: np.ndarray):
    with path.open("wb") as file:  # given a path, NumPy would change its name
        np.save(file, sizes)


def _read_sizes(rows: Rows, table: Table) -> np.ndarray:
    def size(number: int) -> tuple[int, int]:
        with contextlib.suppress(BadRowError):
            return rows.image_size(table.stored(number).values)
        return UNKNOWN_SIZE

    with ThreadPoolExecutor(READERS) as threads:
        found = tqdm(threads.map(size, range(len(table)), chunksize=64), "image sizes", len(table), delay=2)
        return np.array(list(found), dtype=np.int32).reshape(-1, 2)


def _filtered(rows: Rows, table: Table, sizes: np.ndarray | None) -> tuple[np.ndarray, Counter]:
    """The numbers of the rows that the filter of a set keeps, and how many it leaves out, by reason."""
    if not rows.row_filter.is_needed:
        return np.arange(len(table)), Counter()
    numbers, left_out = [], Counter()
    for number in range(len(table)):
        with contextlib.suppress(BadRowError):
            size = None if sizes is None else tuple(sizes[number].tolist())
            if (reason := rows.reason_to_leave_out(table.stored(number), size)) is not None:
                left_out[reason] += 1
                continue
        numbers.append(number)
    return np.array(numbers, dtype=np.int64), left_out


def index_lines(
    sources: Iterable[tuple[str, IndexedSource]], buckets: Buckets | None, batch_size: int
) -> Iterator[str]:
    """What was found out about the rows of sets with these names, one line each."""
    counts = Counter()
    for name, source in sources:
        about = f"{name}: " if name else ""
        if source.left_out:
            reasons = ", ".join(f"{count:,} with {reason}" for reason, count in source.left_out.items())
            yield f"{about}{len(source.numbers):,} of {len(source.table):,} rows are used; left out: {reasons}"
        if buckets is not None:
            of_source = Counter(buckets.sizes[group] for group in source.groups.tolist())
            yield from (f"{about}{line}" for line in fill_lines(of_source, source.cropped, buckets))
            counts += of_source
    yield from rare_lines(counts, batch_size)


class IndexedStream:
    """The batches of one rank and DataLoader worker, from sets of known length, in the order of a `BatchPlan`.

    The ranks take the batches of the plan in turn, and so do the workers of a rank; the order does not depend on their
    number. The seed of a row is a function of (`seed`, epoch, the row's number in the set). The next usable row of its
    bucket stands in for one that cannot be used; such rows are logged, and counted by reason in the state.

    Args:
        sources: the sets.
        batch_size: rows per batch; batches of rare buckets have fewer.
        seed: seed of the order and of the rows' own seeds.
        weights: shares of the sources in the rows, relative to each other.
        shuffle: whether to shuffle the rows.
        rank, world_size: rank of this process, and number of processes.
        min_sizes: smallest (height, width), pixels, that the transform of each group needs; see `read_image`.

    Raises:
        ValueError: on iteration, if the loaded state belongs to another layout.
        CorruptImagesError: on iteration, if too many of the rows cannot be used, as in `RowStream`.
    """

    def __init__(
        self,
        sources: Sequence[IndexedSource],
        batch_size: int,
        seed: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        min_sizes: Sequence[tuple[int, int]] | None = None,
    ):
        self.sources, self.seed, self.min_sizes = sources, seed, min_sizes
        self.rank, self.world_size = rank, world_size
        groups = [source.groups for source in sources]
        self.new_plan = partial(BatchPlan, groups, batch_size, seed, weights, shuffle)
        self._order = {"seed": seed, "batch_size": batch_size, "shuffle": shuffle, "sources": len(groups)}
        self._start_over()
        self._loaded = False

    def _start_over(self):
        self.plan = self.new_plan()
        self.epochs = [0] * len(self.sources)
        self.tallies = [self._tally(source, last_pass=None) for source in range(len(self.sources))]

    def _tally(self, source: int, last_pass: dict[str, int] | None) -> Tally:
        """The tally of a new pass; the first reader counts what no reader sees."""
        if reader_among(self.rank, self.world_size)[0]:
            return Tally(last_pass=last_pass)
        indexed = self.sources[source]
        return Tally(lost=dict(indexed.table.lost), left_out=dict(indexed.left_out), last_pass=last_pass)

    def __iter__(self) -> Iterator[list[Row]]:
        if not self._loaded:
            self._start_over()
        self._loaded = False
        reader, readers = reader_among(self.rank, self.world_size)
        for batch in self.plan:
            if (self.plan.batches - 1) % readers == reader and (rows := self._rows(batch)):
                yield rows

    def _rows(self, batch: PlannedBatch) -> list[Row]:
        planned = zip(*(part.tolist() for part in batch[1:]), strict=True)
        rows = (self._row(batch.group, *place) for place in planned)
        return [row for row in rows if row is not None]

    def _row(self, group: int, source: int, number: int, epoch: int) -> Row | None:
        """A row or, if it cannot be used, the next one of its group that can; None if there is none."""
        tally = self._tally_of(source, epoch)
        tally.seen += 1
        try:
            row = self._read(group, source, number, epoch)
        except BadRowError as error:
            tally.skip(error, self._place(source, number), self.sources[source].rows.named)
            row = self._stand_in(group, source, number, epoch)
        else:
            tally.without_caption += row.caption == ""
        if tally.seen >= MIN_ROWS_TO_JUDGE:
            tally.judge()
        return row

    def _tally_of(self, source: int, epoch: int) -> Tally:
        """The tally of a source's pass; the pass before is judged when a new one begins."""
        if epoch > self.epochs[source]:
            before = self.tallies[source]
            before.judge_pass(is_whole=reader_among(self.rank, self.world_size)[1] == 1)
            self.epochs[source], self.tallies[source] = epoch, self._tally(source, before.counts())
        return self.tallies[source]

    def _read(self, group: int, source: int, number: int, epoch: int) -> Row:
        indexed = self.sources[source]
        stored = indexed.table.stored(int(indexed.numbers[number]))
        seed = derive_seed(self.seed, epoch, *stored.number, *((source,) if source else ()))
        min_size = None if self.min_sizes is None else self.min_sizes[group]
        return replace(indexed.rows.decoded(stored, seed, min_size), source=source, group=group)

    def _place(self, source: int, number: int) -> str | None:
        indexed = self.sources[source]
        with contextlib.suppress(BadRowError):
            return indexed.table.stored(int(indexed.numbers[number])).place
        return None

    def _stand_in(self, group: int, source: int, number: int, epoch: int) -> Row | None:
        members = np.flatnonzero(self.sources[source].groups == group)
        following = np.roll(members, -int(np.searchsorted(members, number)) - 1)[:-1]
        for other in following[:MAX_STAND_INS].tolist():
            with contextlib.suppress(BadRowError):
                return self._read(group, source, other, epoch)
        return None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, and what was skipped."""
        skipped = sum((Counter(tally.skipped_rows()) for tally in self.tallies), Counter())
        return {
            "layout": self._layout(),
            "skipped_rows": dict(skipped),
            "plan": self.plan.state_dict(),
            "epochs": list(self.epochs),
            "tallies": list(map(asdict, self.tallies)),
        }

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken.

        Raises:
            ValueError: if the state belongs to another order, or to another number of ranks or workers.
        """
        if state.get("layout") != self._layout():
            raise ValueError(f"the state was written with {state.get('layout')}; this stream has {self._layout()}.")
        self._start_over()
        self.plan.load_state_dict(state["plan"])
        self.epochs, self.tallies = list(state["epochs"]), [Tally(**tally) for tally in state["tallies"]]
        self._loaded = True

    def _layout(self) -> dict[str, Any]:
        """Everything that the order of the rows depends on."""
        reader, readers = reader_among(self.rank, self.world_size)
        return {**self._order, "reader": reader, "readers": readers}
