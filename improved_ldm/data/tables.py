"""Sets of known length whose rows can be read in any order: image folders, parquet files and webdataset shards.

A table knows where its rows are; images are read when they are needed. The rows of a parquet file cannot be read one
by one, so a small set is held in memory, and a large one is copied once to files that are mapped into memory.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from improved_ldm.data.formats import (
    batch_rows,
    image_folder_row,
    parquet_batches,
    parquet_metadata,
    present_columns,
    sample_at,
    sample_offsets,
)
from improved_ldm.data.kept_files import cached_file, write_once
from improved_ldm.data.rows import BadRowError
from improved_ldm.data.shards import NO_END_MARK, LostShardError, after_last_sample, items_of_shard
from improved_ldm.data.stored import StoredRow, Table

IN_MEMORY = 2**30  # bytes of a parquet set that are held in memory; a larger one is copied to mapped files
# First bytes of files that are packed with gzip, bzip2, xz or zstandard; these can only be read from their beginning.
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class FolderTable(Table):
    """The rows of an image folder; the arguments are those of `image_folder_rows`."""

    def __init__(self, entries: tuple[tuple[str, dict[str, Any], str], ...], image_column: str):
        self.entries, self.image_column, self.lost = entries, image_column, {}

    def __len__(self) -> int:
        return len(self.entries)

    def stored(self, number: int) -> StoredRow:
        path, values, place = self.entries[number]
        return StoredRow(image_folder_row(path, values, self.image_column), place, (0, number))


class ShardTable(Table):
    """The samples of webdataset shards that are not packed; the arguments are those of `webdataset_rows`."""

    def __init__(self, files: tuple[str, ...], columns: tuple[str, ...]):
        self.files, self.columns, self.num_shards, self.lost = files, columns, len(files), {}
        offsets = [self._offsets(file) for file in files]
        self.ends = np.cumsum([len(part) for part in offsets])
        self.offsets = np.concatenate(offsets)

    def _offsets(self, file: str) -> np.ndarray:
        found = []
        try:
            found.extend(items_of_shard(file, sample_offsets))
        except LostShardError as error:
            self.lost[error.place_after(len(found))] = str(error)
        if found and found[-1] is None:
            self.lost[after_last_sample(file)] = NO_END_MARK
            found.pop()
        return np.array(found, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def stored(self, number: int) -> StoredRow:
        shard, in_shard = _locate(self.ends, number)
        file = self.files[shard]
        sample = _read_row(file, lambda: sample_at(file, int(self.offsets[number]), self.columns))
        return StoredRow(sample["row"], sample["place"], (shard, in_shard))


class ParquetTable(Table):
    """The rows of parquet files; the arguments are those of `parquet_rows`."""

    def __init__(self, files: tuple[str, ...], columns: tuple[str, ...]):
        self.files, self.columns, self.num_shards, self.lost = files, columns, len(files), {}
        is_large = sum(_column_bytes(file, columns) for file in files) > IN_MEMORY
        self.batches, sizes = [], []
        for file in files:
            batches = self._mapped(file) if is_large else list(self._batches_of(file))
            self.batches.append((batches, np.cumsum([len(batch) for batch in batches])))
            sizes.append(sum(map(len, batches)))
        self.ends = np.cumsum(sizes)

    def __reduce__(self):
        return ParquetTable, (self.files, self.columns)  # a process that is started anew reads the files itself

    def __len__(self) -> int:
        return int(self.ends[-1])

    def stored(self, number: int) -> StoredRow:
        shard, in_shard = _locate(self.ends, number)
        batches, ends = self.batches[shard]
        batch, in_batch = _locate(ends, in_shard)
        row = next(batch_rows(batches[batch].slice(in_batch, 1)))
        return StoredRow(row, f"{self.files[shard]}, row {in_shard}", (shard, in_shard))

    def _batches_of(self, file: str) -> Iterator[pa.RecordBatch]:
        """The rows of a file; the part that cannot be read is recorded."""
        rows = 0
        try:
            for batch in items_of_shard(file, partial(parquet_batches, columns=self.columns)):
                rows += len(batch)
                yield batch
        except LostShardError as error:
            self.lost[error.place_after(rows)] = str(error)

    def _mapped(self, file: str) -> list[pa.RecordBatch]:
        """The rows of a file, mapped from a copy of it that is written at the first use."""
        copy = cached_file([file], self.columns, ".arrow")
        write_once(copy, lambda unfinished: self._write_copy(file, copy, unfinished))
        lost = copy.with_suffix(".json")
        if lost.exists():
            self.lost |= json.loads(lost.read_text(encoding="utf-8"))
        reader = pa.ipc.open_file(pa.memory_map(str(copy)))
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]

    def _write_copy(self, file: str, copy: Path, unfinished: Path):
        needed, free = _column_bytes(file, self.columns), shutil.disk_usage(copy.parent).free
        if needed > free:
            raise OSError(f"{file} needs {needed / 2**30:.1f} GiB there to be read in any order")
        known, writer = set(self.lost), None
        for batch in self._batches_of(file):
            writer = writer or pa.ipc.new_file(str(unfinished), batch.schema)
            writer.write_batch(batch)
        writer = writer or pa.ipc.new_file(str(unfinished), pa.schema([]))
        writer.close()
        if lost := {place: reason for place, reason in self.lost.items() if place not in known}:
            copy.with_suffix(".json").write_text(json.dumps(lost), encoding="utf-8")


def _column_bytes(file: str, columns: tuple[str, ...]) -> int:
    """Bytes of the columns of a parquet file in memory; 0 if it cannot be read."""
    metadata = parquet_metadata(file)
    if metadata is None:
        return 0
    names = set(present_columns(metadata.schema.to_arrow_schema().names, columns))
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.partition(".")[0] in names)


def is_packed(file: str) -> bool:
    """Whether a file is packed, so that it can only be read from its beginning; False if it cannot be opened."""
    try:
        with open(file, "rb") as stream:
            return stream.read(8).startswith(PACKED)
    except OSError:
        return False


def _locate(ends: np.ndarray, number: int) -> tuple[int, int]:
    """The part that an item is in, and its number there, from the cumulated sizes of the parts."""
    part = int(np.searchsorted(ends, number, side="right"))
    return part, number - (int(ends[part - 1]) if part else 0)


def _read_row(file: str, read) -> dict[str, Any]:
    """A row of a file, read again after a temporary failure."""
    try:
        return next(items_of_shard(file, lambda _: iter([read()])))
    except LostShardError as error:
        raise BadRowError("row cannot be read", str(error)) from error
