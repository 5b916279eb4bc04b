"""Tables that describe images: metadata files of `datasets`, and JSON, JSON Lines, CSV and parquet of other tools."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from improved_ldm.data.files import TABLES, suffix_of
from improved_ldm.data.side_files import ImageNames
from improved_ldm.provenance import parse_json_object

# Columns that name the image of a line: of `datasets`, kohya's scripts, SimpleTuner, and others.
PATH_COLUMNS = ("file_name", "image_path", "filename", "path", "image")
PROBED_LINES = 100  # of a table of any name, of which one must name an image
ROWS_AT_ONCE = 1024


def is_table(file: str, images: ImageNames) -> bool:
    """Whether one of the first lines of a file names an image of the set."""
    if suffix_of(file) not in TABLES:
        return False
    try:
        lines = islice(read_metadata(Path(file)), PROBED_LINES)
        return any(images.find(image_path(Path(file).parent, line, "image", place)) for place, line in lines)
    except (OSError, ValueError, pa.ArrowException):
        return False


def image_path(folder: Path, record: dict[str, Any], image_column: str, place: str) -> str:
    """The path that a line of a table names; it must be below the folder of the table.

    Args:
        folder: folder of the table.
        record: the line.
        image_column: column of the image; `image` is any of `PATH_COLUMNS`, any other x is `x_file_name`.
        place: place of the line, for errors.

    Raises:
        ValueError: if the line names no such path.
    """
    keys = (f"{image_column}_file_name", *(PATH_COLUMNS if image_column == "image" else ()))
    name = next((record[key] for key in keys if key in record), None)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: `file_name` is {name!r:.99}; it must be the path of an image.")
    inside = os.path.relpath(name, folder) if os.path.isabs(name) else os.path.normpath(name)
    if "://" in name or inside.startswith(".."):
        raise ValueError(f"{place}: `file_name` is {name!r}; it must be a path inside {folder}.")
    return os.path.join(folder, inside)


def read_metadata(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a table with their places in words; blank lines are skipped.

    Args:
        file: JSON Lines, CSV, parquet, or a JSON object with a path as the key of each image. Only a line feed ends a
            line, so captions may hold the other line separators of Unicode.

    Raises:
        ValueError: if the file is empty or a line cannot be read; it names the line.
    """
    if file.suffix.lower() == ".parquet":
        return _parquet_lines(file)
    encoded = file.read_bytes()
    try:
        text = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: it must be UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{file}, line 1: the file is empty; it must describe images.")
    return {".jsonl": _json_lines, ".csv": _csv_lines, ".json": _json_entries}[file.suffix.lower()](file, text)


def _json_lines(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json_object(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        yield f"{file}, line {number}", record


def _csv_lines(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # captions may be long
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(fields for fields in reader if fields)
        if repeated := [name for name, count in Counter(header).items() if count > 1]:
            raise ValueError(
                f"{file}, line {reader.line_num}: it must name each column once; {repeated[0]!r} is listed twice."
            )
        for fields in reader:
            if not fields:
                continue
            if len(fields) != len(header):
                raise ValueError(f"{file}, line {reader.line_num}: it has {len(fields)} of {len(header)} fields.")
            yield f"{file}, line {reader.line_num}", dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from error


def _json_entries(file: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a JSON object: from paths to objects, as kohya's scripts write them, or to captions."""
    try:
        entries = parse_json_object(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    for path, entry in entries.items():
        record = {"caption": entry} if isinstance(entry, str) else entry
        if not isinstance(record, dict):
            raise ValueError(f"{file}, entry {path!r}: it must be an object or a caption, not {entry!r:.40}.")
        yield f"{file}, entry {path!r}", {**record, "file_name": path}


def _parquet_lines(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with pq.ParquetFile(file) as parquet:
        number = 0
        for batch in parquet.iter_batches(ROWS_AT_ONCE):
            for record in batch.to_pylist():
                yield f"{file}, row {number}", record
                number += 1
