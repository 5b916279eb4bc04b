"""Folders of images: captioned by metadata files, or with one folder per class."""

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from improved_ldm.data.files import LocalFiles, count_of, printable, walk
from improved_ldm.data.rows import parse_integer
from improved_ldm.places import METADATA
from improved_ldm.provenance import parse_json_object

# The path of an image, its other values, and the place of its description.
Entry = tuple[str, dict[str, Any], str]


@dataclass(frozen=True)
class ImageFolder:
    """The rows of a folder of images.

    Args:
        entries: one per row.
        files: files that are read, including metadata files.
        columns: names of the columns.
        class_names: names of the classes in the order of their labels; None if folders are not classes.
        left_out: number of images that are not read, by reason.
        notes: further remarks, one line each.
    """

    entries: tuple[Entry, ...]
    files: tuple[str, ...]
    columns: tuple[str, ...]
    class_names: list[str] | None
    left_out: Counter
    notes: tuple[str, ...]


def open_image_folder(
    found: LocalFiles, image_column: str, caption_column: str | None, label_column: str | None
) -> ImageFolder:
    """Read the metadata, or else the classes, of the images in a folder.

    Args:
        found: images and metadata files of the folder.
        image_column: column of the image; `image` is `file_name` in the metadata, any other x is `x_file_name`.
        caption_column: column of the captions; it must hold strings in all lines of metadata that have it.
        label_column: column of the labels; in a CSV file it is read as integers.

    Raises:
        ValueError: if a metadata file is damaged; it names the line.
    """
    metadata = [Path(file) for file in found.files if Path(file).name in METADATA]
    images = [file for file in found.files if Path(file).name not in METADATA]
    if metadata:
        return _captioned(metadata, images, image_column, caption_column, label_column)
    return _classes(images, found.family)


def _captioned(
    metadata: list[Path], images: list[str], image_column: str, caption_column: str | None, label_column: str | None
) -> ImageFolder:
    if len({file.suffix for file in metadata}) > 1:
        raise ValueError(f"{metadata[0]} and {metadata[-1]} must be of one format, .jsonl or .csv.")
    entries, columns, repeated, absent = [], {image_column: None}, 0, 0
    seen = set()
    for file in metadata:
        for line, record in read_metadata(file):
            place = f"{file}, line {line}"
            path = _image_path(file.parent, record, image_column, place)
            caption = record.get(caption_column)
            if caption is not None and not isinstance(caption, str):
                raise ValueError(f"{place}: {caption_column!r} is {caption!r:.99}; a caption must be a string.")
            if file.suffix == ".csv" and label_column in record:
                record[label_column] = parse_integer(record[label_column])
            columns |= dict.fromkeys(record)
            repeated, absent = repeated + (path in seen), absent + (not os.path.isfile(path))
            seen.add(path)
            entries.append((path, record, place))
    if not entries:
        raise ValueError(f"{metadata[0]} describes no images; it must have one line per image.")
    columns = tuple(column for column in columns if not column.endswith("file_name"))
    entries = tuple((path, {**dict.fromkeys(columns), **record}, place) for path, record, place in entries)
    without = len(set(images) - seen)
    names = metadata[0].name
    left_out = Counter({f"of {len(images)} images without a line in {names}": without} if without else {})
    notes = [f"{count_of(repeated, 'line')} of {names} for an image that has an earlier line"] if repeated else []
    notes += [f"{count_of(absent, 'line')} of {names} for an image that does not exist"] if absent else []
    files = tuple(map(str, metadata)) + tuple(dict.fromkeys(path for path, _, _ in entries))
    return ImageFolder(entries, files, columns, None, left_out, tuple(notes))


def _image_path(folder: Path, record: dict[str, Any], image_column: str, place: str) -> str:
    """The image that a line of metadata names; it must be below the folder of the metadata."""
    key = f"{image_column}_file_name"
    if image_column == "image" and "file_name" in record:
        key = "file_name"
    name = record.get(key)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{place}: `file_name` is {name!r:.99}; it must be the path of an image.")
    if os.path.isabs(name) or "://" in name or os.path.normpath(name).startswith(".."):
        raise ValueError(f"{place}: `file_name` is {name!r}; it must be a path inside {folder}.")
    return os.path.join(folder, os.path.normpath(name))


def read_metadata(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of a metadata file with their numbers, from 1; blank lines are skipped.

    Args:
        file: `metadata.jsonl` or `metadata.csv`. Only a line feed ends a line, so captions may hold the other line
            separators of Unicode.

    Raises:
        ValueError: if the file is empty or a line cannot be read; it names the line.
    """
    encoded = file.read_bytes()
    try:
        text = encoded.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = encoded.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}, line {line}: it must be UTF-8: {error}") from error
    if not text.strip():
        raise ValueError(f"{file}, line 1: the file is empty; it must describe images.")
    return _json_lines(file, text) if file.suffix == ".jsonl" else _csv_lines(file, text)


def _json_lines(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json_object(line)
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        yield number, record


def _csv_lines(file: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
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
            yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}") from error


def _classes(images: list[str], family: tuple[str, ...]) -> ImageFolder:
    """Images with their folders as classes, if there are at least two folders, all at the same depth.

    Classes are numbered over all splits. An empty folder next to those of the classes also gets a number, so that two
    sets with the same layout have the same numbers.
    """
    folders = {Path(file).parent for file in family if Path(file).name not in METADATA}
    empty, others = _folders_without_images(folders)
    names = sorted({folder.name for folder in folders | empty})
    notes = [f"no images in the class folder {folder.name}, which keeps its number" for folder in sorted(empty)]
    notes += [f"{folder.name} holds other files and is not a class" for folder in sorted(others)]
    if len(names) < 2 or len({len(folder.parts) for folder in folders}) > 1:
        entries = tuple((file, {}, file) for file in images)
        return ImageFolder(entries, tuple(images), ("image",), None, Counter(), ())
    numbers = {name: number for number, name in enumerate(names)}
    entries = tuple((file, {"label": numbers[Path(file).parent.name]}, file) for file in images)
    return ImageFolder(
        entries, tuple(images), ("image", "label"), list(map(printable, names)), Counter(), tuple(notes)
    )


def _folders_without_images(folders: set[Path]) -> tuple[set[Path], set[Path]]:
    """Of the folders next to those with images: the empty ones, and those that hold other files."""
    siblings = {
        Path(entry.path)
        for parent in {folder.parent for folder in folders}
        for entry in os.scandir(parent)
        if entry.is_dir() and not entry.name.startswith((".", "__"))
    } - folders
    empty = {folder for folder in siblings if next(walk(folder, Counter()), None) is None}
    return empty, siblings - empty
