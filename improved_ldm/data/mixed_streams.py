"""Streams of rows, mixed by weight and joined into batches."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from improved_ldm.data.buckets import Buckets
from improved_ldm.data.order import next_source
from improved_ldm.data.rows import Row
from improved_ldm.data.stream import RowStream


class MixedRows:
    """The rows of several endless streams, mixed by weight; resumable like the streams.

    Args:
        streams: the streams of one rank.
        weights: shares of the streams in the rows, relative to each other.
    """

    def __init__(self, streams: Sequence[RowStream], weights: Sequence[float]):
        self.streams, self.weights = streams, weights
        self.drawn = [0] * len(streams)
        self._loaded = False

    def __iter__(self) -> Iterator[Row]:
        if not self._loaded:
            self.drawn = [0] * len(self.streams)
        self._loaded = False
        rows = list(map(iter, self.streams))
        while True:
            source = next_source(self.drawn, self.weights)
            self.drawn[source] += 1
            yield replace(next(rows[source]), source=source)

    def state_dict(self) -> dict[str, Any]:
        """The states of the streams, and the number of rows drawn from each."""
        return {"drawn": list(self.drawn), "streams": [stream.state_dict() for stream in self.streams]}

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.drawn = list(state["drawn"])
        for stream, of_stream in zip(self.streams, state["streams"], strict=True):
            stream.load_state_dict(of_stream)
        self._loaded = True


class BatchedRows:
    """Batches of the rows of a stream, in order; the state is that of the stream.

    Args:
        rows: the stream.
        batch_size: rows per batch; the last batch of each bucket may have fewer.
        buckets: rows of the same bucket form a batch; for a single pass, because rows that wait for their batch are
            not part of the state.
    """

    def __init__(self, rows: RowStream | MixedRows, batch_size: int, buckets: Buckets | None = None):
        self.rows, self.batch_size, self.buckets = rows, batch_size, buckets

    def __iter__(self) -> Iterator[list[Row]]:
        waiting: dict[int, list[Row]] = {}
        for row in self.rows:
            if self.buckets is not None:
                row = replace(row, group=int(self.buckets.nearest([row.size])[0]))
            batch = waiting.setdefault(row.group, [])
            batch.append(row)
            if len(batch) == self.batch_size:
                yield waiting.pop(row.group)
        yield from waiting.values()

    def state_dict(self) -> dict[str, Any]:
        """The state of the stream."""
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.rows.load_state_dict(state)
