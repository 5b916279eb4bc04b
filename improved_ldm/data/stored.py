"""Rows as they are stored, with their images not decoded: one after the other, or from a table in any order."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import datasets

from improved_ldm.data.retries import read_patiently


class StoredRow(NamedTuple):
    """A row of a set as it is stored, with its image not decoded.

    Args:
        values: values by column.
        place: location in words; None if it is not known.
        number: number of its file in the set and of the row in the file; None if they are not known.
    """

    values: dict[str, Any]
    place: str | None
    number: tuple[int, int] | None


class Table(ABC):
    """A set of known length.

    Args:
        num_shards: number of files that hold the rows.
        lost: reasons of the shards, or the parts of them, that cannot be read, by their places.
    """

    num_shards: int = 1
    lost: dict[str, str]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def stored(self, number: int) -> StoredRow:
        """The stored row of a number.

        Raises:
            BadRowError: if its file has changed or cannot be read.
        """


def stored_windows(dataset: datasets.IterableDataset, size: int, is_remote: bool) -> Iterator[list[StoredRow]]:
    """The stored rows of a dataset, `size` at a time."""
    batches = dataset.iter(batch_size=size)
    for batch in read_patiently(batches) if is_remote else batches:
        if batch.keys() == {"row", "place", "number"}:  # from `data.formats`
            numbers = map(tuple, batch["number"])
            yield list(map(StoredRow, batch["row"], batch["place"], numbers))
        else:
            rows = (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
            yield [StoredRow(row, row.get("__key__"), None) for row in rows]
