"""Opens and checks captioned images: from the Hub, parquet, webdataset shards, image folders or the embedded set."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from improved_ldm.data.captions import check_captions
from improved_ldm.data.classes import check_num_classes, number_classes
from improved_ldm.data.files import LocalFiles, count_of, local_files, printable
from improved_ldm.data.formats import (
    image_folder_rows,
    parquet_class_names,
    parquet_metadata,
    parquet_rows,
    present_columns,
    webdataset_rows,
)
from improved_ldm.data.image_folder import open_image_folder
from improved_ldm.data.images import read_image
from improved_ldm.data.probe import check_columns
from improved_ldm.data.retries import reading_hub
from improved_ldm.data.rows import BadRowError, Row, Rows, column_names, parse_integer, stored_names
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

CAPTION_LAYOUTS = (
    "Captions of images in a folder come from a .txt, .caption or .json file beside each image with its name, from "
    "metadata.jsonl or metadata.csv, or from the names of class folders with `caption_template`."
)
Columns = dict[str, str | tuple[str, ...] | None]  # by the argument of `open_rows`


def open_rows(
    source: str | Path | list,
    split: str = "train",
    name: str | None = None,
    image_column: str = "image",
    caption_column: str | Sequence[str] | None = "text",
    label_column: str | None = None,
    num_classes: int | None = None,
    caption_weights: Sequence[float] | None = None,
    caption_template: str | None = None,
) -> Rows:
    """Open a set of images for streaming and check that it has the requested columns.

    Args:
        source: `embedded:fashion-mnist` or `embedded:emoji`; a folder with parquet files, webdataset shards (.tar) or
            images with side files, a table or class folders; a file, a glob or a list of such files; or a dataset id
            on the Hub.
        split: split of the set; see `local_files` for the splits of a folder.
        name: configuration of a Hub dataset that has several.
        image_column: column of encoded images.
        caption_column: column of captions, or several, of which one is drawn for each row in each epoch; None to read
            none. A value may be a list of captions, which are drawn uniformly. If a row has none, its caption is "".
        label_column: column of classes, integers or names; None to read none. For webdataset shards `image`, `text`
            and `label` also find the usual members of each sample (jpg, png, webp, …; txt or json; cls or json).
        num_classes: number of classes; labels must be below it. None if it is not known.
        caption_weights: positive weight of each column of captions; None weighs them equally.
        caption_template: caption of an image that has no other, with `{label}` for the words of its class's name; it
            needs `label_column`.

    Returns:
        The opened rows. Columns that are not requested are not read.

    Raises:
        FileNotFoundError: if the source does not exist, neither as a local file or folder nor on the Hub.
        ValueError: if the format is not supported, the split or a column is missing, a column holds values of another
            type, a table is damaged, there are no rows, or `num_classes` is not the number of the classes' names.
    """
    check_captions(caption_column, caption_weights, caption_template)
    if caption_template is not None and label_column is None:
        raise ValueError("`caption_template` is given without `label_column`, whose classes it names.")
    captions = tuple(caption_column) if isinstance(caption_column, list) else caption_column
    columns = {"image_column": image_column, "caption_column": captions, "label_column": label_column}
    weights, found = tuple(caption_weights) if caption_weights else None, None
    if is_hub_id(source):
        with reading_hub():
            rows, names = _open_hub(source, split, name, columns)
    elif name is not None:
        raise ValueError(f"`name` is {name!r}; only datasets on the Hub have configurations, and {source!s} is local.")
    else:
        found = local_files(source, split)
        rows, names = _open_local(found, columns, caption_template)
    rows = replace(rows, num_classes=num_classes, caption_weights=weights)
    if caption_template is not None:
        rows = replace(rows, caption_template=caption_template, template_column=label_column)
    nothing = f"`source` {source!s} has no rows in its split {split!r}."
    label = check_columns(rows, names, nothing, CAPTION_LAYOUTS if found and found.kind == "imagefolder" else "")
    return _name_classes(rows, found, label)


def _name_classes(rows: Rows, found: LocalFiles | None, label: Any) -> Rows:
    """The rows with the names of their classes, if labels are stored as names.

    Args:
        rows: the rows.
        found: the local files; None for a set on the Hub.
        label: label of one row; None if there is none.
    """
    if rows.class_names is None and isinstance(parse_integer(label), str):
        if found is None:
            raise ValueError(
                f"`label_column` is {rows.label_column!r}; it holds names such as {label!r:.60}, which are not "
                "collected from the Hub. Download the set, or store the labels as integers or as a `ClassLabel`."
            )
        numbers = number_classes(_stored_labels(rows, found), rows.label_column)
        if numbers:
            rows = replace(rows, class_numbers=numbers, class_names=list(map(printable, numbers)))
    if rows.class_names is None and rows.caption_template is not None:
        raise ValueError(f"`caption_template` needs names of classes; `label_column` {rows.label_column!r} has none.")
    check_num_classes(rows.num_classes, rows.class_names)
    return rows


def _stored_labels(rows: Rows, found: LocalFiles) -> Iterator[Any]:
    """The labels of all splits of local files, as they are stored."""
    column = rows.label_column
    if found.kind == "imagefolder":
        family = replace(found, files=found.family, beside=found.family_beside)
        entries = open_image_folder(family, rows.image_column, None, column).entries
        stored = image_folder_rows(entries, rows.image_column)
    else:
        read = {"parquet": parquet_rows, "webdataset": webdataset_rows}[found.kind]
        names = column_names(column, rows.is_webdataset)
        stored = read(list(found.family), list(range(len(found.family))), names)
    for item in stored:
        with contextlib.suppress(BadRowError):
            yield rows.value(item["row"], column)


def _open_hub(source: str, split: str, name: str | None, columns: Columns) -> tuple[Rows, list[str]]:
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
    wanted = present_columns(names, stored_names(columns.values(), is_webdataset))
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


def _open_hub_shards(source: str, split: str, files: dict, columns: Columns) -> tuple[Rows, list[str]]:
    """The rows of webdataset shards on the Hub, read like local ones: `datasets` stops if members differ."""
    if split not in files:
        raise ValueError(f"`split` is {split!r}; {source} has {', '.join(map(str, files))}.")
    rows = Rows(
        _stream(webdataset_rows, tuple(files[split]), columns=stored_names(columns.values(), is_webdataset=True)),
        **columns,
        is_webdataset=True,
        description=f"streaming {count_of(len(files[split]), 'file')} of {source} from the Hub, split {split!r}",
    )
    return rows, []


def _open_local(found: LocalFiles, columns: Columns, template: str | None) -> tuple[Rows, list[str]]:
    """The rows of local files, and the names of their columns."""
    if found.kind == "imagefolder":
        return _open_images(found, columns, template)
    return {"parquet": _open_parquet, "webdataset": _open_webdataset}[found.kind](found, columns)


def _open_parquet(found: LocalFiles, columns: Columns) -> tuple[Rows, list[str]]:
    schemas, count, unknown = {}, 0, 0
    for file in found.files:
        metadata = parquet_metadata(file)
        if metadata is None:
            unknown += 1
            continue
        schemas[file] = metadata.schema.to_arrow_schema()
        count += metadata.num_rows
    if not schemas:
        raise ValueError(f"{found.files[0]} is not a parquet file that can be read.")
    wanted = stored_names(columns.values(), is_webdataset=False)
    known = count_of(count, "row") + (f" and those of {count_of(unknown, 'damaged file')}" if unknown else "")
    rows = Rows(
        _stream(parquet_rows, found.files, columns=wanted),
        **columns,
        files=found.files,
        table=partial(ParquetTable, found.files, wanted),
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


def _open_webdataset(found: LocalFiles, columns: Columns) -> tuple[Rows, list[str]]:
    wanted = stored_names(columns.values(), is_webdataset=True)
    rows = Rows(
        _stream(webdataset_rows, found.files, columns=wanted),
        **columns,
        files=found.files,
        table=None if any(map(is_packed, found.files)) else partial(ShardTable, found.files, wanted),
        is_webdataset=True,
        description=_describe(found, "their rows are counted as they are read"),
    )
    return rows, []


def _open_images(found: LocalFiles, columns: Columns, template: str | None) -> tuple[Rows, list[str]]:
    folder = open_image_folder(found, **columns, caption_template=template)
    rows = Rows(
        _stream(image_folder_rows, None, entries=folder.entries, image_column=columns["image_column"]),
        **columns,
        files=folder.files,
        table=partial(FolderTable, folder.entries, columns["image_column"]),
        class_names=folder.class_names if columns["label_column"] == "label" else None,
        description=_describe(found, count_of(len(folder.entries), "row"), folder.left_out, folder.notes),
    )
    return rows, list(folder.columns)


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
