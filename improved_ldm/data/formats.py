"""The stored rows of local parquet files, webdataset shards and image folders, one after the other.

Each is `{"row": {column: value}, "place": location in words, "number": [number of its file, number in the file]}`.
Rows are passed on as they are stored; errors in a row are found when it is used, so a bad row does not affect others.
"""

import re
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.utils.file_utils import xopen

from improved_ldm.data.files import printable
from improved_ldm.data.shards import LOST, NO_END_MARK, after_last_sample, rows_of_shards

PARQUET_BATCH = 256  # rows read from a parquet file at once
FAULT = "__fault__"  # the column that holds what is wrong with a row as a whole
MEMBER = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # the key of a sample, and the kind of the member


def parquet_metadata(file: str) -> pq.FileMetaData | None:
    """The metadata of a parquet file; None if it cannot be read, which is reported and counted when its rows are."""
    try:
        metadata = pq.read_metadata(file)
        metadata.schema.to_arrow_schema()  # which Arrow cannot make of every file
    except (OSError, UnicodeError, pa.ArrowException):
        return None
    return metadata


def parquet_rows(files: list[str], numbers: list[int], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of parquet files.

    Args:
        files: paths of the files.
        numbers: numbers of the files in the set.
        columns: columns to read if a file has them; for `a.b` the whole column a is read. All others are skipped.
    """
    yield from rows_of_shards(files, numbers, partial(_parquet_file_rows, columns=columns))


def _parquet_file_rows(file: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    rows = (row for batch in parquet_batches(file, columns) for row in batch_rows(batch))
    for number, row in enumerate(rows):
        yield {"row": row, "place": f"{file}, row {number}"}


def parquet_batches(file: str, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The rows of a parquet file in batches of at most `PARQUET_BATCH`, with those columns that the file has."""
    with pq.ParquetFile(file) as parquet:
        names = present_columns(parquet.schema_arrow.names, columns)
        yield from parquet.iter_batches(PARQUET_BATCH, columns=names)


def present_columns(names: Iterable[str], columns: tuple[str, ...]) -> list[str]:
    """The names among `names` that hold `columns`; `a.b` is a column of that name or a field of column a."""
    names = set(names)
    found = (column if column in names else column.partition(".")[0] for column in columns)
    return sorted(set(found) & names)


def batch_rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows of a batch; strings that are not UTF-8 are given as bytes."""
    if not batch.num_columns:
        return ({} for _ in range(batch.num_rows))
    names, columns = batch.schema.names, [_values(column) for column in batch.columns]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(column: pa.Array) -> list[Any]:
    """The values of a column; strings that are not UTF-8 are given as bytes."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(value) for value in column]


def _value(value: pa.Scalar) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else None


def parquet_class_names(schema: pa.Schema, column: str | None) -> list[str] | None:
    """The class names that `datasets` stores with a column of labels, or None."""
    try:
        feature = datasets.Features.from_arrow_schema(schema).get(column)
    except (ValueError, TypeError, KeyError):  # written by another version of `datasets`, or of unknown types
        return None
    return feature.names if isinstance(feature, datasets.ClassLabel) else None


def webdataset_rows(files: list[str], numbers: list[int], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The samples of webdataset shards: consecutive members whose names are equal up to the first dot.

    Args:
        files: paths of the shards, or their URLs on the Hub.
        numbers: numbers of the shards in the set.
        columns: members to read, by the part of the name after that dot; `a.b` is inside member a. Other members are
            listed without their bytes.
    """
    yield from rows_of_shards(files, numbers, partial(_shard_rows, wanted=_member_names(columns)))


def _shard_rows(file: str, wanted: set[str]) -> Iterator[dict[str, Any]]:
    is_remote = "://" in file
    with (
        # with a block size of 0 the file is read through one connection
        xopen(file, "rb", block_size=0) if is_remote else open(file, "rb") as stream,
        _Shard.open(fileobj=stream, mode="r|*") as tar,
    ):
        yield from (row for row, _ in _samples(tar, file, wanted))
        if not tar.has_end_mark:
            yield {"row": {LOST: NO_END_MARK}, "place": after_last_sample(file)}


def _samples(tar: "_Shard", file: str, wanted: set[str]) -> Iterator[tuple[dict[str, Any], int]]:
    """The samples of a shard, and where each begins in the file, bytes."""
    for key, members in groupby(_members(tar), key=lambda member: member[0]):
        row, start = {"__key__": key}, None
        for _, name, member in members:
            start = member.offset if start is None else start
            if name in row and name in wanted:
                row[FAULT] = f"sample has two members .{name}"
            row[name] = tar.extractfile(member).read() if name in wanted else None
        yield {"row": row, "place": printable(f"{file}, sample {key}")}, start


def sample_offsets(file: str) -> Iterator[int | None]:
    """Where each sample of a local shard that is not packed begins, bytes; None at the end if it has no end mark."""
    with open(file, "rb") as stream, _Shard.open(fileobj=stream, mode="r:") as tar:
        yield from (start for _, start in _samples(tar, file, wanted=set()))
        if not tar.has_end_mark:
            yield None


def sample_at(file: str, offset: int, columns: tuple[str, ...]) -> dict[str, Any]:
    """The sample of a shard that begins at an offset of `sample_offsets`."""
    with open(file, "rb") as stream:
        stream.seek(offset)
        with _Shard.open(fileobj=stream, mode="r:") as tar:
            return next(_samples(tar, file, _member_names(columns)))[0]


def _member_names(columns: tuple[str, ...]) -> set[str]:
    """The members that hold these columns; `a.b` is inside member a."""
    return {name for column in columns for name in (column, column.partition(".")[0])}


class _Member(tarfile.TarInfo):
    """A member of a shard; a damaged header is an error, not the end of the file as in `tarfile`."""

    @classmethod
    def fromtarfile(cls, tar: "_Shard") -> "_Member":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            tar.has_end_mark = True
            while rest := tar.fileobj.read(tarfile.RECORDSIZE):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError("it continues after its end mark") from None
            raise
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:
            raise tarfile.ReadError(str(error)) from error


class _Shard(tarfile.TarFile):
    """A tar file that knows, after it is read, whether it had an end mark."""

    tarinfo = _Member
    has_end_mark = False


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    for member in tar:
        hidden = PurePosixPath(member.name).name.startswith((".", "__"))
        if member.isfile() and not hidden and (match := MEMBER.fullmatch(member.name)):
            yield match[1], match[2].lower(), member


def image_folder_rows(entries: tuple[tuple[str, dict[str, Any], str], ...], image_column: str):
    """The rows of an image folder.

    Args:
        entries: path of the image, other values and place of the description, one tuple per row.
        image_column: name of the image's column in the rows.
    """
    for number, (path, values, place) in enumerate(entries):
        yield {"row": image_folder_row(path, values, image_column), "place": place, "number": [0, number]}


def image_folder_row(path: str, values: dict[str, Any], image_column: str) -> dict[str, Any]:
    """The values of a row of an image folder, whose image is read when the row is decoded."""
    return {**values, image_column: {"path": path, "bytes": None}}
