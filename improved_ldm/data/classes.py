"""Classes that are stored as names: in the labels of a set, or in the names of its folders."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from improved_ldm.data.files import is_split, printable, walk
from improved_ldm.data.rows import parse_integer, stored_label

FEW_CLASSES = 10  # up to this number, each image may have a class of its own


def count_names(values: Iterable[Any]) -> Counter[str] | None:
    """The names that labels hold, with their counts; None if at least half of the labels are integers.

    Args:
        values: labels as they are stored: integers, strings, or the bytes of text files; others are not counted.

    Source: our choice.
    """
    labels = Counter(label for label in map(stored_label, values) if isinstance(label, int | str) and label != "")
    names = Counter({label: count for label, count in labels.items() if isinstance(label, str)})
    integers = sum(count for label, count in labels.items() if isinstance(parse_integer(label), int))
    return names if integers * 2 < labels.total() else None


def number_classes(values: Iterable[Any], column: str) -> dict[str, int] | None:
    """The number of each class that labels name, in the order of the names; None if the labels are integers.

    Args:
        values: labels of all splits, as they are stored.
        column: column of the labels.

    Raises:
        ValueError: if most labels are different, so that they cannot be classes.
    """
    names = count_names(values)
    if names is None:
        return None
    if len(names) > FEW_CLASSES and len(names) * 2 > names.total():
        raise ValueError(
            f"`label_column` is {column!r}; it must hold integers or the names of classes; {len(names):,} of its "
            f"{names.total():,} values are different texts, such as {next(iter(names))!r:.60}."
        )
    return {name: number for number, name in enumerate(sorted(names))}


def check_num_classes(number: int | None, names: Sequence[str] | None):
    """Raise a ValueError if a number of classes is given and is not that of the names of classes."""
    if number is not None and names and number != len(names):
        raise ValueError(
            f"`num_classes` is {number}; the data names its classes, from {names[0]!r} to {names[-1]!r}, and their "
            f"number is {len(names):,}."
        )


@dataclass(frozen=True)
class ClassFolders:
    """Folders whose names are those of classes.

    Args:
        numbers: number of each class by the name of its folder.
        notes: remarks on other folders, one line each.
    """

    numbers: dict[str, int]
    notes: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        """The names of the classes in the order of their numbers."""
        return list(map(printable, self.numbers))

    def number(self, image: str) -> int | None:
        """The number of the class of an image; None if it lies in none of the folders."""
        return self.numbers.get(os.path.basename(os.path.dirname(image)))


def class_folders(images: Iterable[str], may_be_one: bool = False) -> ClassFolders | None:
    """The class folders of images: at least two, all at the same depth, and not only folders of splits.

    Classes are numbered over all splits. An empty folder next to those of the classes also gets a number, so that two
    sets with the same layout have the same numbers.

    Args:
        images: paths of the images of all splits.
        may_be_one: whether one folder is enough, as for the captions of a single subject.
    """
    folders = set(map(Path, set(map(os.path.dirname, images))))
    if len({len(folder.parts) for folder in folders}) != 1 or (len(folders) < 2 and not may_be_one):
        return None
    empty, others = _folders_without_images(folders) if len(folders) > 1 else (set(), set())
    names = sorted({folder.name for folder in folders | empty})
    if all(map(is_split, names)) or len(names) < (1 if may_be_one else 2):
        return None
    notes = [f"no images in the class folder {folder.name}, which keeps its number" for folder in sorted(empty)]
    notes += [f"{folder.name} holds other files and is not a class" for folder in sorted(others)]
    return ClassFolders({name: number for number, name in enumerate(names)}, tuple(notes))


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
