"""Opens and checks captioned images: from the Hub, parquet, webdataset shards, image folders or the embedded set."""

from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from improved_ldm.data.files import LocalFiles, count_of, local_files, printable
from improved_ldm.data.formats import (
    image_folder_rows,
    parquet_class_names,
    parquet_rows,
    present_columns,
    webdataset_rows,
)
from improved_ldm.data.image_folder import open_image_folder
from improved_ldm.data.images import read_image
from improved_ldm.data.retries import reading_hub
from improved_ldm.data.rows import ABSENT, BadRowError, Row, Rows, column_names, stored_windows
from improved_ldm.data.shards import LOST
from improved_ldm.data.stream import RowStream
from improved_ldm.data.tables import FolderTable, ParquetTable, ShardTable, is_packed
from improved_ldm.data.tally import CorruptImagesError
from improved_ldm.places import is_hub_id

__all__ = [
    "CorruptImagesError",
    "Row",
    "RowStream",
    "Rows",
    "open_rows",
    "read_image",
]

PROBED_ROWS = 100  # first rows, of which at least one must hold a column


def open_rows(
    source: str | Path | list,
    split: str = "train",
    name: str | None = None,
    image_column: str = "image",
    caption_column: str | None = "text",
    label_column: str | None = None,
    num_classes: int | None = None,
) -> Rows:
    """Open a set of images for streaming and check that it has the requested columns.

    Args:
        source: `embedded:fashion-mnist`; a folder with parquet files, webdataset shards (.tar) or images with a
            metadata file; a file, a glob or a list of such files; or a dataset id on the Hub.
        split: split of the set; see `local_files` for the splits of a folder.
        name: configuration of a Hub dataset that has several.
        image_column: column of encoded images.
        caption_column: column of captions; None to read none. If a row holds null, its caption is "".
        label_column: column of integer classes; None to read none. For webdataset shards `image`, `text` and `label`
            also find the usual members of each sample (jpg, png, webp; txt or json; cls or json).
        num_classes: number of classes; labels must be below it. None if it is not known.

    Returns:
        The opened rows. Columns that are not requested are not read.

    Raises:
        FileNotFoundError: if the source does not exist, neither as a local file or folder nor on the Hub.
        ValueError: if the format is not supported, the split or a column is missing, a column holds values of another
            type, a metadata file is damaged, or there are no rows.
    """
    columns = {"image_column": image_column, "caption_column": caption_column, "label_column": label_column}
    if is_hub_id(source):
        with reading_hub():
            rows, names = _open_hub(source, split, name, columns)
    elif name is not None:
        raise ValueError(f"`name` is {name!r}; only datasets on the Hub have configurations, and {source!s} is local.")
    else:
        rows, names = _open_local(local_files(source, split), columns)
    rows = replace(rows, num_classes=num_classes)
    _check_columns(rows, names, f"`source` {source!s} has no rows in its split {split!r}.")
    return rows


def _open_hub(source: str, split: str, name: str | None, columns: dict[str, str | None]) -> tuple[Rows, list[str]]:
    """The rows of a dataset on the Hub, and the names of its columns."""
    try:
        builder = datasets.load_dataset_builder(source, name)
        if builder.name == "webdataset":
            return _open_hub_shards(source, split, builder.config.data_files, columns)
        dataset = builder.as_streaming_dataset(split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"`source` is {source!r}; there is no such folder, and the Hub reports: {error}"
        ) from error
    features = dataset.features or {}
    if features:
        dataset = dataset.decode(False)
    names = list(features) or list(next(iter(dataset), {}))
    label = features.get(columns["label_column"])
    is_webdataset = "__key__" in names
    wanted = present_columns(names, _wanted(columns, is_webdataset))
    if wanted and builder.name == "parquet":  # columns that are not read may change their type between files
        dataset = datasets.load_dataset_builder(source, name, columns=wanted).as_streaming_dataset(split).decode(False)
    rows = Rows(
        dataset.select_columns(wanted) if wanted else dataset,
        **columns,
        class_names=label.names if isinstance(label, datasets.ClassLabel) else None,
        is_webdataset=is_webdataset,
        description=f"streaming {source} from the Hub, split {split!r}",
    )
    return rows, names


def _open_hub_shards(source: str, split: str, files: dict, columns: dict[str, str | None]) -> tuple[Rows, list[str]]:
    """The rows of webdataset shards on the Hub, read like local ones: `datasets` stops if members differ."""
    if split not in files:
        raise ValueError(f"`split` is {split!r}; {source} has {', '.join(map(str, files))}.")
    rows = Rows(
        _stream(webdataset_rows, tuple(files[split]), columns=_wanted(columns, is_webdataset=True)),
        **columns,
        is_webdataset=True,
        description=f"streaming {count_of(len(files[split]), 'file')} of {source} from the Hub, split {split!r}",
    )
    return rows, []


def _open_local(found: LocalFiles, columns: dict[str, str | None]) -> tuple[Rows, list[str]]:
    """The rows of local files, and the names of their columns."""
    opened = {"parquet": _open_parquet, "webdataset": _open_webdataset, "imagefolder": _open_images}[found.kind]
    return opened(found, columns)


def _open_parquet(found: LocalFiles, columns: dict[str, str | None]) -> tuple[Rows, list[str]]:
    schemas, count, unknown = {}, 0, 0
    for file in found.files:
        try:
            metadata = pq.read_metadata(file)
            schemas[file] = metadata.schema.to_arrow_schema()
        except (OSError, UnicodeError, pa.ArrowException):  # reported and counted when it is read
            unknown += 1
        else:
            count += metadata.num_rows
    if not schemas:
        raise ValueError(f"{found.files[0]} is not a parquet file that can be read.")
    known = count_of(count, "row") + (f" and those of {count_of(unknown, 'damaged file')}" if unknown else "")
    rows = Rows(
        _stream(parquet_rows, found.files, columns=_wanted(columns)),
        **columns,
        files=found.files,
        table=partial(ParquetTable, found.files, _wanted(columns)),
        class_names=_agreed_class_names(schemas, columns["label_column"]),
        description=_describe(found, known),
    )
    return rows, list(next(iter(schemas.values())).names)


def _agreed_class_names(schemas: dict[str, pa.Schema], column: str | None) -> list[str] | None:
    """The class names of the first file that has any; all others must agree, because a label is an index of a name."""
    named = {file: names for file, schema in schemas.items() if (names := parquet_class_names(schema, column))}
    first = next(iter(named), None)
    for file, names in named.items():
        if names != named[first]:
            raise ValueError(f"`label_column` is {column!r}; {first} and {file} name its classes differently.")
    return named.get(first)


def _open_webdataset(found: LocalFiles, columns: dict[str, str | None]) -> tuple[Rows, list[str]]:
    wanted = _wanted(columns, is_webdataset=True)
    rows = Rows(
        _stream(webdataset_rows, found.files, columns=wanted),
        **columns,
        files=found.files,
        table=None if any(map(is_packed, found.files)) else partial(ShardTable, found.files, wanted),
        is_webdataset=True,
        description=_describe(found, "their rows are counted as they are read"),
    )
    return rows, []


def _open_images(found: LocalFiles, columns: dict[str, str | None]) -> tuple[Rows, list[str]]:
    folder = open_image_folder(found, **columns)
    rows = Rows(
        _stream(image_folder_rows, None, entries=folder.entries, image_column=columns["image_column"]),
        **columns,
        files=folder.files,
        table=partial(FolderTable, folder.entries, columns["image_column"]),
        class_names=folder.class_names if columns["label_column"] == "label" else None,
        description=_describe(found, count_of(len(folder.entries), "row"), folder.left_out, folder.notes),
    )
    return rows, list(folder.columns)


def _wanted(columns: dict[str, str | None], is_webdataset: bool = False) -> tuple[str, ...]:
    """All names that the columns may have."""
    return tuple(name for column in columns.values() if column for name in column_names(column, is_webdataset))


def _stream(rows, files: tuple[str, ...] | None, **arguments: Any) -> datasets.IterableDataset:
    """The stored rows as a dataset, with one shard per file."""
    shards = {} if files is None else {"files": list(files), "numbers": list(range(len(files)))}
    return datasets.IterableDataset.from_generator(rows, gen_kwargs={**shards, **arguments})


def _describe(found: LocalFiles, rows: str, left_out: Counter | None = None, notes: tuple[str, ...] = ()) -> str:
    """What is read and what is left out."""
    text = f"reading {count_of(len(found.files), 'file')}, {rows}"
    reasons = [f"{count} {reason}" for reason, count in (found.left_out + (left_out or Counter())).items()]
    if reasons:
        text += f"; left out: {', '.join(reasons)}"
    return printable("; ".join([text, *found.notes, *notes]))


def _check_columns(rows: Rows, names: list[str], nothing: str):
    """Raise a ValueError if there are no rows, or none of the first rows holds a requested column."""
    text = str | bytes | None if rows.is_webdataset else str | None
    expected = {
        "image_column": (bytes | dict, "encoded images"),
        "caption_column": (text, "strings"),
        "label_column": (int | bytes if rows.is_webdataset else int, "integers"),
    }
    missing = {argument for argument in expected if getattr(rows, argument) is not None}
    values = {}
    first, lost = None, {}
    windows = stored_windows(rows.dataset, 1, rows.is_remote)
    for stored, place, _ in islice(chain.from_iterable(windows), PROBED_ROWS):
        if LOST in stored:
            lost[place] = stored[LOST]
            continue
        first = first or stored
        for argument in list(missing):
            value = _value_or_absent(rows, stored, getattr(rows, argument))
            if isinstance(value, expected[argument][0]) and not isinstance(value, bool):  # a bool is an int in Python
                missing.remove(argument)
            elif value is not ABSENT and value is not None:
                values.setdefault(argument, value)
        if not missing:
            return
    if first is None:
        raise ValueError(" ".join([nothing, *(f"{place}: {reason}." for place, reason in lost.items())]))
    for argument in sorted(missing, key=list(expected).index):
        asked = f"`{argument}` is {getattr(rows, argument)!r}"
        if argument in values:
            raise ValueError(f"{asked}; it must hold {expected[argument][1]}, not {type(values[argument]).__name__}.")
        columns = names or [column for column in first if column != "__key__"]
        holds = "it is empty in the first rows" if getattr(rows, argument) in columns else "it is not among them"
        raise ValueError(f"{asked}; the set has the columns {', '.join(columns)}; {holds}.")


def _value_or_absent(rows: Rows, stored: dict[str, Any], column: str) -> Any:
    try:
        return rows.value(stored, column)
    except BadRowError:
        return ABSENT
