"""A sample of an opened set that is spread over all of it, without reading the rest where the format allows that."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from improved_ldm.data.files import count_of
from improved_ldm.data.formats import PARQUET_BATCH, batch_rows, parquet_metadata, present_columns
from improved_ldm.data.rows import Rows, stored_names
from improved_ldm.data.shards import rows_of_shards
from improved_ldm.places import kind_of

MAX_PLACES = 32  # of consecutive rows in a sample of parquet files or shards; a row group is read for each of them


def count_rows(rows: Rows) -> int | None:
    """The number of stored rows of a local set; None if only reading all of it would tell."""
    if rows.is_remote or rows.is_webdataset:
        return None
    return sum(_file_lengths(rows.files)) if _is_parquet(rows) else len(rows.table())


def spread_rows(rows: Rows, count: int, max_places: int = MAX_PLACES) -> Rows:
    """Reduce an opened set to a sample from all over it.

    Args:
        rows: the opened set.
        count: number of rows to keep. Images of a folder are taken at equal distances. Of parquet files the sample has
            up to `max_places` places at equal distances, with consecutive rows at each. Of webdataset shards and sets
            on the Hub, whose length is not known, it has the first rows of up to `max_places` of their files.
        max_places: largest number of places or files.

    Returns:
        The sample, in the order of the set; its description says how it was taken. A set that is not larger than
        `count` is returned as it is.

    Source: our choice.
    """
    total = count_rows(rows)
    if total is None:
        return _first_rows_of_shards(rows, count, max_places)
    if total <= count:
        return rows
    if _is_parquet(rows):
        chosen = _places(total, count, max_places)
        dataset = _parquet_dataset(rows, chosen)
    else:
        chosen = np.linspace(0, total - 1, count).round().astype(int)
        wanted = set(chosen.tolist())
        dataset = rows.dataset.filter(lambda _, number: number in wanted, with_indices=True)
    return replace(rows, dataset=dataset, description=f"{rows.description}; {len(chosen):,} rows spread over all")


def spread_if_possible(rows: Rows, count: int) -> Rows:
    """Rows from all over a set, whose classes may be sorted; one on the Hub or with a filter stays as it is.

    Its first rows are used instead: a filter could leave few of the spread ones.
    """
    return rows if rows.is_remote or rows.row_filter.is_needed else spread_rows(rows, count)


def _is_parquet(rows: Rows) -> bool:
    """Whether parquet files hold the rows; a folder of images may have one too, as its table."""
    return all(kind_of(file) == "parquet" for file in rows.files)


def _places(total: int, count: int, max_places: int) -> np.ndarray:
    """The numbers of `count` of `total` rows: consecutive ones at places at equal distances."""
    places = min(max_places, count)
    lengths = np.full(places, count // places)
    lengths[: count % places] += 1
    gaps = np.diff(np.linspace(0, total - count, places).round().astype(int), prepend=0)
    starts = np.cumsum(gaps + np.concatenate([[0], lengths[:-1]]))
    return np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])


def _file_lengths(files: tuple[str, ...]) -> list[int]:
    """The number of rows of each parquet file; 0 if it cannot be read."""
    return [metadata.num_rows if metadata else 0 for metadata in map(parquet_metadata, files)]


def _parquet_dataset(rows: Rows, chosen: np.ndarray) -> datasets.IterableDataset:
    """The chosen rows of parquet files; a file that cannot be read stays in the set, so that its loss is reported."""
    lengths = _file_lengths(rows.files)
    starts = np.cumsum([0, *lengths[:-1]])
    numbers = {
        file: chosen[(chosen >= start) & (chosen < start + length)] - start
        for file, start, length in zip(rows.files, starts, lengths, strict=True)
    }
    kept = [(file, place) for place, file in enumerate(rows.files) if len(numbers[file]) or not lengths[place]]
    columns = (rows.image_column, rows.caption_column, rows.label_column, rows.template_column)
    wanted = stored_names(columns, is_webdataset=False)
    files, places = map(list, zip(*kept, strict=True))
    shards = {"files": files, "numbers": places}
    return datasets.IterableDataset.from_generator(
        _chosen_parquet_rows, gen_kwargs={**shards, "columns": wanted, "chosen": numbers}
    )


def _chosen_parquet_rows(
    files: list[str], numbers: list[int], columns: tuple[str, ...], chosen: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    yield from rows_of_shards(files, numbers, partial(_rows_of_file, columns=columns, chosen=chosen))


def _rows_of_file(file: str, columns: tuple[str, ...], chosen: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """The chosen rows of a file; only the row groups that hold them are read."""
    with pq.ParquetFile(file) as parquet:
        names, first = present_columns(parquet.schema_arrow.names, columns), 0
        for group in range(parquet.num_row_groups):
            after = first + parquet.metadata.row_group(group).num_rows
            if ((chosen[file] >= first) & (chosen[file] < after)).any():
                for batch in parquet.iter_batches(PARQUET_BATCH, row_groups=[group], columns=names):
                    held = chosen[file][(chosen[file] >= first) & (chosen[file] < first + len(batch))]
                    rows = batch_rows(batch.take(pa.array(held - first)))
                    for number, row in zip(held, rows, strict=True):
                        yield {"row": row, "place": f"{file}, row {number}"}
                    first += len(batch)
            first = after


def _first_rows_of_shards(rows: Rows, count: int, max_places: int) -> Rows:
    shards = rows.dataset.num_shards
    chosen = np.linspace(0, shards - 1, min(shards, count, max_places)).round().astype(int)
    each = -(-count // len(chosen))
    parts = [rows.dataset.shard(shards, number).take(each) for number in chosen.tolist()]
    note = f"the first {count_of(each, 'row')} of {len(chosen):,} of {count_of(shards, 'file')}"
    # `datasets.concatenate_datasets` would give all rows the columns of the first ones
    dataset = datasets.IterableDataset.from_generator(_in_turn, gen_kwargs={"parts": parts})
    return replace(rows, dataset=dataset, description=f"{rows.description}; sample: {note}")


def _in_turn(parts: list[datasets.IterableDataset]) -> Iterator[dict[str, Any]]:
    for part in parts:
        yield from part
