"""The rows of a set from its beginning to its end, split among ranks and workers, in an order that can be resumed."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from random import Random
from typing import Any

import datasets
import torch

from improved_ldm.data.rows import BadRowError, Row, Rows
from improved_ldm.data.shards import LOST
from improved_ldm.data.stored import StoredRow, stored_windows
from improved_ldm.data.tally import MIN_ROWS_TO_JUDGE, Tally
from improved_ldm.seeds import derive_seed

MAX_STAND_INS = 32  # rows that are tried in place of one that cannot be used
SHARDS_AT_ONCE = 8  # shards that a reader reads side by side
IN_ORDER_WINDOW = 64  # rows read at once when nothing is shuffled
SHARDS_PER_READER = 4  # with this many or more, a reader reads whole shards, although some get one more


@dataclass
class _Position:
    """The position of a reader: after `offset` rows of the window that starts at `source`."""

    epoch: int = 0
    window: int = 0
    offset: int = 0
    start: int = 0  # place of the window's first row in the order, counted over all passes
    source: list[dict] | None = None  # states of the lanes at the start of the window; None at the start of a pass
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "_Position":
        """The position of a state. Earlier versions wrote the tally among the other values, and before that a single
        count of skipped rows, `corrupt`."""
        state = dict(state)
        corrupt = state.pop("corrupt", 0)
        earlier = {key.name: state.pop(key.name) for key in fields(Tally) if key.name in state}
        if corrupt:
            earlier["skipped"] = {"image cannot be decoded": corrupt}
        return cls(**{**state, "tally": Tally(**{**earlier, **state.pop("tally", {})})})


def reader_among(rank: int, world_size: int) -> tuple[int, int]:
    """The index of this worker among all workers of all ranks, which take batches in turn, and their number."""
    worker = torch.utils.data.get_worker_info()
    index, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
    return index * world_size + rank, world_size * count


class RowStream(torch.utils.data.IterableDataset):
    """Streams the rows of one rank, split among its DataLoader workers, in an order that can be resumed exactly.

    The order of the set does not depend on the number of ranks and workers: it goes window by window, and the rows of
    each window are shuffled. It is cut into batches; the ranks take the batches in turn, and so do the workers of a
    rank. The seed of a row is a function of (`seed`, epoch, the row's number in the set). Every reader goes through
    the stored rows of the whole set and decodes only its own. If a set has many files per reader, each reader reads
    whole files instead; then the order depends on the number of readers, but the seeds of rows do not.

    The state is the position in the stream. One window of encoded images is held in memory. Rows that cannot be used
    are skipped, logged, and counted by reason in the state. In a stream that repeats, the next usable row stands in
    for each of them, so that all others keep their places for any number of readers.

    Args:
        rows: the opened set.
        seed: seed of the order and of the rows' own seeds.
        shuffle_window: number of rows that are shuffled together; 0 or 1 keeps the order of the set.
        repeat: whether to repeat the set endlessly, so that ranks with unequal shares never wait for each other, or
            to pass over it once.
        rank, world_size: rank of this process, and number of processes.
        min_size: smallest (height, width), pixels, that the transforms need; see `read_image`.
        batch_size: number of consecutive rows that go to the same rank and worker.

    Raises:
        ValueError: if an argument is out of range; on iteration, if there are no rows to repeat, or the loaded state
            belongs to another layout.
        CorruptImagesError: on iteration, if more than `MAX_CORRUPT` of the rows cannot be used, checked from
            `MIN_ROWS_TO_JUDGE` rows on and at the end of every pass; or if more than that fraction of the shards, and
            more than one, or all shards, cannot be read to the end.

    Source: our choice, because the shuffle buffer of `datasets` is lost when a run resumes.
    """

    def __init__(
        self,
        rows: Rows,
        seed: int = 0,
        shuffle_window: int = 1024,
        repeat: bool = True,
        rank: int = 0,
        world_size: int = 1,
        min_size: tuple[int, int] | None = None,
        batch_size: int = 1,
    ):
        if shuffle_window < 0:
            raise ValueError(f"`shuffle_window` is {shuffle_window}; it must be ≥ 0.")
        if not 0 <= rank < world_size:
            raise ValueError(f"`rank` is {rank}; with `world_size` {world_size} it must be in [0, {world_size - 1}].")
        self.rows, self.seed, self.shuffle_window, self.repeat = rows, seed, shuffle_window, repeat
        self.rank, self.world_size, self.min_size, self.batch_size = rank, world_size, min_size, batch_size
        self._position = _Position()
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """The position after the last row that was read, and what was skipped."""
        skipped = self._position.tally.skipped_rows()
        return {"layout": self._layout(), "skipped_rows": skipped, **asdict(self._position)}

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        layout = state["layout"]
        if layout != self._layout():
            raise ValueError(f"the state was written with {layout}; this stream has {self._layout()}.")
        position = {key: value for key, value in state.items() if key not in ("layout", "skipped_rows")}
        self._position = _Position.from_state(position)
        self._loaded = True

    def __iter__(self) -> Iterator[Row]:
        if not self._loaded:
            self._position = _Position()
        self._loaded = False
        return self._passes()

    def _layout(self) -> dict[str, int]:
        """Everything that the order of the rows depends on."""
        reader, readers = self._reader()
        order = {"seed": self.seed, "shuffle_window": self.shuffle_window, "batch_size": self.batch_size}
        return {**order, "reader": reader, "readers": readers}

    def _reader(self) -> tuple[int, int]:
        return reader_among(self.rank, self.world_size)

    def _passes(self) -> Iterator[Row]:
        yield from self._one_pass()
        while self.repeat:
            before = self._position
            tally = Tally(last_pass=before.tally.counts())
            self._position = _Position(epoch=before.epoch + 1, start=before.start, tally=tally)
            yield from self._one_pass()

    def _one_pass(self) -> Iterator[Row]:
        position, is_empty = self._position, self._position.window == 0
        for window in self._windows():
            is_empty = is_empty and not window
            if self.shuffle_window > 1:
                Random(self._seed_of_window()).shuffle(window)
            for offset in self._own_offsets(len(window)):
                position.offset, position.tally.seen = offset + 1, position.tally.seen + 1
                row = self._read(window[offset], self._seed_of_row(window[offset], position.start + offset))
                if position.tally.seen >= MIN_ROWS_TO_JUDGE:
                    position.tally.judge()
                if row is None and self.repeat:
                    row = self._stand_in(window, offset)
                if row is not None:
                    yield row
        self._end_pass(is_empty)

    def _stand_in(self, window: list[StoredRow], offset: int) -> Row | None:
        """The next usable row of the window, for one that cannot be used: no reader's later rows change places."""
        following = [*window[offset + 1 :], *window[:offset]]
        for stored in following[:MAX_STAND_INS]:
            if LOST not in stored.values:
                with contextlib.suppress(BadRowError):
                    seed = self._seed_of_row(stored, self._position.start + offset)
                    return self.rows.decoded(stored, seed, self.min_size)
        return None

    def _own_offsets(self, size: int) -> list[int]:
        """The offsets of this reader's rows in the window, from the position on."""
        position, deals_shards, (reader, readers) = self._position, self._deals_shards(), self._reader()
        return [
            offset
            for offset in range(position.offset, size)
            if deals_shards or (position.start + offset) // self.batch_size % readers == reader
        ]

    def _windows(self) -> Iterator[list[StoredRow]]:
        """The remaining windows of the pass; moves the position from one to the next."""
        position, lanes = self._position, self._lanes()
        size = self.shuffle_window if self.shuffle_window > 1 else IN_ORDER_WINDOW
        parts = [stored_windows(lane, -(-size // len(lanes)), self.rows.is_remote) for lane in lanes]
        while stored := [row for part in parts for row in next(part, ())]:
            reasons = [None if LOST in row.values else self.rows.reason_to_leave_out(row) for row in stored]
            window = [row for row, reason in zip(stored, reasons, strict=True) if reason is None]
            yield window
            if self._reader()[0] == 0:  # for all readers
                position.tally.leave_out(reason for reason in reasons if reason is not None)
            position.source, position.offset = [lane.state_dict() for lane in lanes], 0
            position.window, position.start = position.window + 1, position.start + len(window)

    def _lanes(self) -> list[datasets.IterableDataset]:
        """The reader's shards, in parts that are read side by side, because shards are often sorted, as by class."""
        dataset, (reader, readers) = self.rows.dataset, self._reader() if self._deals_shards() else (0, 1)
        count = min(SHARDS_AT_ONCE, max(1, dataset.num_shards // readers)) if self.shuffle_window > 1 else 1
        lanes = [
            dataset.shard(readers * count, reader + readers * lane, contiguous=False)
            if dataset.num_shards > 1
            else dataset
            for lane in range(count)
        ]
        for number, lane in enumerate(lanes):
            if self.shuffle_window > 1:
                lane.set_epoch(derive_seed(self.seed, self._position.epoch))  # shuffles shards
            if self._position.source is not None:
                lane.load_state_dict(self._position.source[number])
        return lanes

    def _deals_shards(self) -> bool:
        """Whether each reader reads whole shards instead of its part of every shard."""
        return self.rows.dataset.num_shards >= SHARDS_PER_READER * self._reader()[1]

    def _reader_key(self) -> tuple[int, ...]:
        """Numbers that make this reader's places unique if each reader counts its own."""
        return self._reader() if self._deals_shards() else ()

    def _seed_of_window(self) -> int:
        return derive_seed(self.seed, self._position.epoch, self._position.window, *self._reader_key())

    def _seed_of_row(self, stored: StoredRow, place: int) -> int:
        """The seed of a row in this epoch, a function of its number in the set or, if unknown, its place."""
        number = (-1, place, *self._reader_key()) if stored.number is None else stored.number
        return derive_seed(self.seed, self._position.epoch, *number)

    def _read(self, row: StoredRow, seed: int) -> Row | None:
        """The row, or None if it cannot be used."""
        tally, named = self._position.tally, self.rows.named
        if LOST in row.values:
            tally.seen -= 1  # a lost shard is not a row
            tally.lose({row.place: row.values[LOST]}, self._own_shards(), named)
            return None
        try:
            decoded = self.rows.decoded(row, seed, self.min_size)
        except BadRowError as error:
            tally.skip(error, row.place, named)
            return None
        tally.without_caption += decoded.caption == ""
        return decoded

    def _own_shards(self) -> int:
        """Number of shards that this reader reads."""
        shards = self.rows.dataset.num_shards
        return -(-shards // self._reader()[1]) if self._deals_shards() else shards

    def _end_pass(self, is_empty: bool):
        if is_empty and self.repeat:
            raise ValueError("the set has no rows to repeat.")
        self._position.tally.judge_pass(is_whole=self._reader()[1] == 1)
