"""Folders of images, with captions in tables or side files, and classes in these or in the names of folders."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from improved_ldm.data.captions import captions_of
from improved_ldm.data.classes import ClassFolders, class_folders
from improved_ldm.data.files import SIDE_FILES, TABLES, LocalFiles, count_of, other_kind, suffix_of
from improved_ldm.data.metadata import image_path, is_table, read_metadata
from improved_ldm.data.rows import names_of
from improved_ldm.data.side_files import ImageNames, SideFiles, add_text, is_side_file, read_side_files

# The path of an image, its other values, and the place of its description.
Entry = tuple[str, dict[str, Any], str]
REPEATS = re.compile(r"[1-9]\d*_.+")  # a folder of kohya's scripts


@dataclass(frozen=True)
class ImageFolder:
    """The rows of a folder of images.

    Args:
        entries: one per row.
        files: files that are read, including tables and side files.
        columns: names of the columns.
        class_names: names of the classes in the order of their labels; None if folders are not classes.
        left_out: number of images and other files that are not read, by reason.
        notes: further remarks, one line each.
    """

    entries: tuple[Entry, ...]
    files: tuple[str, ...]
    columns: tuple[str, ...]
    class_names: list[str] | None
    left_out: Counter
    notes: tuple[str, ...]


def open_image_folder(
    found: LocalFiles,
    image_column: str,
    caption_column: str | tuple[str, ...] | None,
    label_column: str | None,
    caption_template: str | None = None,
) -> ImageFolder:
    """Read what describes the images of a folder.

    A value of an image is that of its line in a table; if that has none, that of its side files. Labels are the names
    of folders if nothing else gives labels. Images that nothing describes are left out if others are described.

    Args:
        found: images and tables of the folder, and the files next to them.
        image_column: column of the image; see `image_path`.
        caption_column: columns of captions; each value must be a string, a list of strings, or null.
        label_column: column of the labels; `label` may be the names of folders.
        caption_template: template of captions, for which the folder of every image is enough.

    Raises:
        ValueError: if a table is damaged, which names the line, or several tables describe the images.
    """
    wanted = names_of(caption_column)
    images = [file for file in found.files if suffix_of(file) not in TABLES]
    family = ImageNames(file for file in found.family if suffix_of(file) not in TABLES)
    tables, others, notes = _find_tables(found, family)
    lines = _read_tables(tables, family, family.images.difference(images), image_column, wanted)
    suffixes = SIDE_FILES if wanted else (".json",) if label_column else ()
    side = read_side_files(ImageNames(images), [file for file in others if suffix_of(file) in suffixes])
    left_out = Counter(other_kind(file) for file in others if suffix_of(file) not in suffixes)
    entries = [(path, _joined(record, side.values.get(path, {})), place) for path, record, place in lines.entries]
    entries += [(path, side.values.get(path, {}), path) for path in images if path not in lines.seen]
    described = [entry for entry in entries if entry[0] in lines.seen or any(name in entry[1] for name in wanted)]
    if described and caption_template is None:
        left_out += _undescribed(images, len(entries) - len(described), tables, side)
        entries = described
    if side.alone:
        left_out[f"caption file{'s' * (side.alone != 1)} without an image"] = side.alone
    classes = _classes(family, entries, caption_template is not None)
    if classes:
        entries = [(path, {**values, "label": classes.number(path)}, place) for path, values, place in entries]
        notes += classes.notes if label_column == "label" else ()
    columns = tuple(dict.fromkeys([image_column, *chain.from_iterable(values for _, values, _ in entries)]))
    notes += [*lines.notes(), *side.notes(), *_notes_on_both(lines, side, wanted), *_notes_on_repeats(images, wanted)]
    return ImageFolder(
        tuple((path, {**dict.fromkeys(columns[1:]), **values}, place) for path, values, place in entries),
        (*tables, *side.files, *dict.fromkeys(path for path, _, _ in entries)),
        columns,
        classes.names if classes else None,
        left_out,
        tuple(notes),
    )


def _find_tables(found: LocalFiles, images: ImageNames) -> tuple[list[str], list[str], list[str]]:
    """The tables of a folder, the other files next to its images, and remarks.

    Metadata files and tables that the user names come first; without them, one table of any other name is read.
    """
    tables = [file for file in found.files if suffix_of(file) in TABLES]
    if len({suffix_of(file) for file in tables}) > 1:
        raise ValueError(f"{tables[0]} and {tables[-1]} must be of one format, .jsonl or .csv.")
    more = [file for file in found.beside if not is_side_file(file, images) and is_table(file, images)]
    others = sorted(set(found.beside) - set(more))
    if tables:
        return tables, others, [f"{os.path.basename(file)} is not read next to {tables[0]}" for file in more]
    for folder, count in Counter(map(os.path.dirname, more)).items():
        if count > 1:
            named = ", ".join(file for file in more if os.path.dirname(file) == folder)
            raise ValueError(
                f"`source` holds {count} tables of the same images, {named}; it must name the one to read."
            )
    return more, others, []


@dataclass
class _Lines:
    """The lines of tables: their entries with the images that have one, and numbers of lines to remark on."""

    entries: list[Entry] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    remarks: Counter = field(default_factory=Counter)
    columns: Counter = field(default_factory=Counter)  # that `text` is read from

    def notes(self) -> list[str]:
        """The remarks, one line each."""
        notes = [f"{count_of(count, 'line')} of {remark}" for remark, count in self.remarks.items()]
        return notes + [f"captions are read from the column {name}" for name in self.columns if name != "text"]


def _read_tables(
    tables: list[str], images: ImageNames, others: Collection[str], image_column: str, wanted: tuple[str, ...]
) -> _Lines:
    """The entries of the lines of tables, with the values that they give.

    Raises:
        ValueError: if a line is damaged, names no image, or has a caption that is none, or the tables have no lines.
    """
    lines = _Lines()
    for file in map(Path, tables):
        for place, record in read_metadata(file):
            named = image_path(file.parent, record, image_column, place)
            path = images.find(named)
            if path in others:
                lines.remarks[f"{file.name} for an image of another split"] += 1
                continue
            if path is None:
                lines.remarks[f"{file.name} for an image that does not exist"] += 1
            if path in lines.seen:
                lines.remarks[f"{file.name} for an image that has an earlier line"] += 1
            values = {column: value for column, value in record.items() if not _names_image(column, image_column)}
            if "text" in wanted:
                lines.columns.update(add_text(values))
            _check_captions(values, wanted, place)
            lines.seen.add(path or named)
            lines.entries.append((path or named, values, place))
    if tables and not lines.entries:
        raise ValueError(f"{tables[0]} describes no images; it must have one line per image.")
    return lines


def _names_image(column: str, image_column: str) -> bool:
    return column.endswith("file_name") or column == image_column


def _check_captions(values: dict[str, Any], wanted: tuple[str, ...], place: str):
    for column in wanted:
        try:
            captions_of(values.get(column))
        except TypeError as error:
            raise ValueError(
                f"{place}: {column!r} is {values[column]!r:.99}; a caption must be a string or a list of strings."
            ) from error
        except UnicodeError:  # found and counted when the row is used
            continue


def _joined(record: dict[str, Any], side: dict[str, Any]) -> dict[str, Any]:
    """The values of a line, and those of side files where the line has none."""
    return {**record, **side, **{column: value for column, value in record.items() if value is not None}}


def _undescribed(images: list[str], count: int, tables: list[str], side: SideFiles) -> Counter:
    """The number of images that are left out because nothing describes them."""
    missing = [f"a line in {os.path.basename(tables[0])}"] if tables else []
    missing += ["a caption file"] if side.values or not tables else []
    return Counter({f"of {len(images)} images without {' or '.join(missing)}": count} if count else {})


def _classes(images: ImageNames, entries: list[Entry], may_be_one: bool) -> ClassFolders | None:
    """The class folders of the images, if no image has another label."""
    if any(values.get("label") is not None for _, values, _ in entries):
        return None
    return class_folders(images.images, may_be_one)


def _notes_on_both(lines: _Lines, side: SideFiles, wanted: tuple[str, ...]) -> Iterator[str]:
    """A note on images that have captions in a table and in side files."""
    both = {
        path
        for path, values, _ in lines.entries
        for column in wanted
        if values.get(column) and side.values.get(path, {}).get(column)
    }
    if both:
        yield f"{count_of(len(both), 'image')} with a caption in a table and a caption file; the table is read"


def _notes_on_repeats(images: list[str], wanted: tuple[str, ...]) -> Iterator[str]:
    """A note on folders whose names begin with the number of repeats of kohya's scripts."""
    folders = sorted({os.path.basename(folder) for folder in set(map(os.path.dirname, images))})
    numbered = [folder for folder in folders if REPEATS.fullmatch(folder)]
    if wanted and numbered:
        yield f"the number in names of folders such as {numbered[0]} is not read as repeats; each image is read once"
