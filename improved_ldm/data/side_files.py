"""Files beside images, with their names: captions in `.txt` and `.caption`, more in `.json`."""

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from improved_ldm.data.captions import text_of_file
from improved_ldm.data.files import SIDE_FILES, count_of, suffix_of
from improved_ldm.provenance import parse_json_object

TEXT_COLUMNS = ("text", "caption", "prompt", "tags")  # where a caption is found if `text` is asked for, in this order


class ImageNames:
    """The images of a set by their paths, with or without the suffix.

    Args:
        images: paths of the images.
    """

    def __init__(self, images: Iterable[str]):
        self.images = frozenset(images)
        self._by_stem = {}
        for image in sorted(self.images):
            self._by_stem.setdefault(os.path.splitext(image)[0], []).append(image)

    def of_stem(self, stem: str) -> list[str]:
        """The images that a path without a suffix names: `a` names `a.png`, and so does `a.png` in `a.png.txt`."""
        return [stem] if stem in self.images else self._by_stem.get(stem, [])

    def find(self, path: str) -> str | None:
        """The image at a path, which may lack its suffix; None if there is none."""
        return next(iter(self.of_stem(path)), None) or (path if os.path.isfile(path) else None)


@dataclass
class SideFiles:
    """The side files of a set.

    Args:
        values: values by column of each image that has side files, by its path.
        files: side files that are read.
        alone: number of files with the suffix of a side file and without an image.
        remarks: number of side files by what is to say about them.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    alone: int = 0
    remarks: Counter = field(default_factory=Counter)

    def notes(self) -> list[str]:
        """The remarks, one line each."""
        return [f"{count_of(count, 'caption file')} {remark}" for remark, count in self.remarks.items()]


def is_side_file(file: str, images: ImageNames) -> bool:
    """Whether a file lies beside an image and has its name."""
    return suffix_of(file) in SIDE_FILES and bool(images.of_stem(os.path.splitext(file)[0]))


def read_side_files(images: ImageNames, beside: Iterable[str]) -> SideFiles:
    """Read the side files of images: `a.txt`, or `a.png.txt`, is that of `a.png`.

    Args:
        images: the images.
        beside: files next to images that have the suffix of a side file.

    Returns:
        The columns of each image: the fields of its JSON file, the columns `txt` and `caption` of its text files, and
        `text`, the first caption among these. Images whose side files cannot be read have none.
    """
    found = SideFiles()
    for file in sorted(beside, key=lambda file: -SIDE_FILES.index(suffix_of(file))):  # texts replace fields of JSON
        owners = images.of_stem(os.path.splitext(file)[0])
        columns = _read(file, found.remarks) if owners else None
        found.alone += not owners
        found.files += [file] if owners else []
        for image in owners if columns is not None else ():
            found.values.setdefault(image, {}).update(columns)
    for values in found.values.values():
        add_text(values, ("txt", *TEXT_COLUMNS))
    return found


def _read(file: str, remarks: Counter) -> dict[str, Any] | None:
    """The columns that a side file gives; None if it cannot be read."""
    try:
        with open(file, "rb") as stream:
            text = text_of_file(stream.read())
        if suffix_of(file) == ".json":
            return parse_json_object(text)
    except (OSError, ValueError) as error:
        remarks[f"that cannot be read ({_fault(error)})"] += 1
        return None
    if not text:
        remarks["without text"] += 1
    elif "\n" in text:
        remarks["of several lines, which are one caption"] += 1
    return {suffix_of(file)[1:]: text}


def _fault(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    return "no JSON object" if isinstance(error, ValueError) else error.strerror


def add_text(values: dict[str, Any], columns: tuple[str, ...] = TEXT_COLUMNS) -> list[str]:
    """Set `text` to the first value of these columns that is neither null nor blank, if any of them is there.

    Returns:
        The column that it is read from; empty if there is none.
    """
    present = {column: _as_caption(column, values[column]) for column in columns if column in values}
    chosen = [column for column, value in present.items() if not _is_blank(value)][:1]
    if present:
        values["text"] = present[chosen[0]] if chosen else None
    return chosen


def _as_caption(column: str, value: Any) -> Any:
    """A value as a caption, or a list of captions; a list of tags is one caption."""
    is_list = column == "tags" and isinstance(value, list) and all(isinstance(tag, str) for tag in value)
    return ", ".join(value) if is_list else value


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())
