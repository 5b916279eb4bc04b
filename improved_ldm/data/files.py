"""Which local files belong to a set: all that are found, or those of a split named at the top of the folder."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from improved_ldm.places import EXTENSIONS, kind_of, resolve

EMBEDDED_SETS = ("embedded:fashion-mnist", "embedded:emoji")
# Names of the folders and files of a split, as on the Hub.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = "|".join(word for words in SPLIT_WORDS.values() for word in words)
SIDE_FILES = (".txt", ".caption", ".json")  # beside an image, with its name
TABLES = (".jsonl", ".csv", ".json", ".parquet")  # of many images
SPLIT_FILE = re.compile(rf"({_WORDS})([-_. ]?\d+([-_. ]of[-_. ]\d+)?([-_. ][0-9a-f]{{8,}})?)?", re.IGNORECASE)
ANY_SPLIT_WORD = re.compile(rf"(?<![a-z])({_WORDS})(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class LocalFiles:
    """The files of a set.

    Args:
        kind: kind of the files, a key of `EXTENSIONS`.
        files: absolute paths, in the order in which they are read.
        family: files of all splits of the folders; classes are numbered over all of them.
        beside: files next to images that may describe them.
        family_beside: the same of all splits.
        left_out: number of files that are not read, by reason.
        notes: further remarks on which files are read, one line each.
    """

    kind: str
    files: tuple[str, ...]
    family: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    family_beside: tuple[str, ...] = ()
    left_out: Counter = field(default_factory=Counter)
    notes: tuple[str, ...] = ()


def count_of(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def printable(name: str) -> str:
    """A name that can be printed, plotted and written: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def local_files(source: str | Path | list, split: str) -> LocalFiles:
    """The files of a set, or of one of its splits.

    A folder has splits only if everything at its top level is named after a split: every folder that holds data, and
    every parquet file or shard (`train/`, `test.parquet`, `train-00000-of-00003.parquet`). Folders of images by
    subject are not splits, even if one of them is called `train`. If a folder holds only one other folder, the top
    level is inside that one. A folder without splits is the split `train` as a whole. Files that are named one by one,
    in a list or by a glob, are all read, regardless of `split`. `*`, `?` and brackets in the name of an existing file
    or folder are part of the name.

    Args:
        source: a folder, a file, a glob, an embedded set, or a list of these.
        split: name of the split to read from a folder.

    Raises:
        FileNotFoundError: if the path does not exist.
        ValueError: if no file there can be read, the files are of several kinds, or the split does not exist.

    Source: our choice.
    """
    parts = [_files_at(item, split) for item in (source if isinstance(source, list) else [source])]
    if not parts:
        raise ValueError("`source` is an empty list; it must name files or folders.")
    if len(kinds := {part.kind for part in parts}) > 1:
        raise ValueError(
            f"`source` is {source!s}; its files must all be of one kind, but they are {', '.join(sorted(kinds))}."
        )
    return LocalFiles(
        kinds.pop(),
        tuple(file for part in parts for file in part.files),
        tuple(file for part in parts for file in part.family),
        tuple(file for part in parts for file in part.beside),
        tuple(file for part in parts for file in part.family_beside),
        sum((part.left_out for part in parts), Counter()),
        tuple(note for part in parts for note in part.notes),
    )


def _files_at(source: str | Path, split: str) -> LocalFiles:
    if str(source).startswith("embedded:"):
        if source not in EMBEDDED_SETS:
            raise ValueError(f"`source` is {source!r}; the embedded sets are {', '.join(EMBEDDED_SETS)}.")
        source = resolve(source)
    if not str(source):
        raise ValueError("`source` is empty; it must name a file or a folder.")
    if Path(source).is_dir():
        return _folder_files(Path(os.path.abspath(source)), split)
    if Path(source).is_file():
        return _named_files(source, [str(source)], Counter())
    matches = sorted(_glob(str(source)))
    files = [match for match in matches if Path(match).is_file()]
    if not files:
        raise FileNotFoundError(
            f"`source` is {source!s}; there is no such file or folder, and as a glob it matches nothing."
        )
    folders = len(matches) - len(files)
    return _named_files(source, files, Counter({"folders that the glob matches": folders} if folders else {}))


def _glob(pattern: str) -> list[str]:
    """Matches of a pattern; leading folders that exist are not read as patterns."""
    beginning = next(parent for parent in Path(pattern).parents if parent.exists())
    rest = Path(pattern).relative_to(beginning)
    return glob.glob(os.path.join(glob.escape(str(beginning)), str(rest)), recursive=True)


def _named_files(source: str | Path, files: list[str], left_out: Counter) -> LocalFiles:
    """Files that were named by the user, one by one or by a glob; images are read with the side files next to them."""
    kinds = {kind_of(file) or ("imagefolder" if suffix_of(file) in TABLES else None) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise ValueError(f"`source` is {source!s}; its files must all be of one kind, .parquet, .tar or images.")
    kind, files = kinds.pop(), tuple(os.path.abspath(file) for file in files)
    if kind != "imagefolder":
        return LocalFiles(kind, files, files, left_out=left_out)
    for folder in {os.path.dirname(file) for file in files if kind_of(file) is None}:  # of a table, which names images
        files += tuple(file for file in walk(folder, Counter()) if suffix_of(file) in EXTENSIONS[kind])
    beside = _side_files(files)
    return LocalFiles(kind, files, files, beside, beside, left_out)


def _side_files(images: tuple[str, ...]) -> tuple[str, ...]:
    """The side files of images that were named one by one."""
    stems = set(images) | {os.path.splitext(image)[0] for image in images}
    near = (entry.path for folder in sorted({*map(os.path.dirname, images)}) for entry in os.scandir(folder))
    return tuple(sorted(file for file in near if suffix_of(file) in SIDE_FILES and os.path.splitext(file)[0] in stems))


def _folder_files(folder: Path, split: str) -> LocalFiles:
    left_out = Counter()
    found = sorted(walk(folder, left_out))
    kinds = {file: kind_of(file) for file in found}
    kind = _kind_of_folder(kinds)
    if kind is None:
        suffixes = ", ".join(sorted({suffix_of(file) or os.path.basename(file) for file in found}))
        raise ValueError(
            f"`source` is {folder}; it must hold .parquet files, .tar shards or images "
            f"({', '.join(EXTENSIONS['imagefolder'])}); it holds {suffixes or 'no files'}."
        )
    files = [file for file in found if kinds[file] == kind]
    others = [file for file in found if kinds[file] != kind]
    beside = [file for file in others if kind == "imagefolder" and may_describe(file)]
    left_out.update(other_kind(file) for file in others if kind != "imagefolder" or not may_describe(file))
    splits = find_splits(str(folder), files, kind)
    notes = _notes_on_splits(str(folder), files, splits)
    if split not in (splits or {"train"}):
        there = f"has {', '.join(splits)}" if splits else "has no splits; all of it is 'train'"
        raise ValueError(f"`split` is {split!r}; {folder} {there}.")
    for other, others in (splits or {}).items():
        if other != split:
            left_out[f"of the split {other!r}"] += len(others)
    chosen = splits[split] if splits else files
    near = _beside_split(str(folder), files, beside, split) if splits else beside
    return LocalFiles(kind, tuple(chosen), tuple(files), tuple(near), tuple(beside), left_out, notes)


def local_splits(source: str | Path) -> tuple[str, ...]:
    """The splits of a folder or of an embedded set; none of a file, a glob or a folder without splits."""
    folder = Path(os.path.abspath(resolve(str(source))))
    if not folder.is_dir():
        return ()
    kinds = {file: kind_of(file) for file in sorted(walk(folder, Counter()))}
    kind = _kind_of_folder(kinds)
    files = [file for file in kinds if kind is not None and kinds[file] == kind]
    return tuple(find_splits(str(folder), files, kind) or ()) if files else ()


def _kind_of_folder(kinds: dict[str, str | None]) -> str | None:
    """The kind of the files that are read from a folder; parquet files without images describe images next to them."""
    present = set(kinds.values())
    if {"parquet", "imagefolder"} <= present:
        tables = (file for file, kind in kinds.items() if kind == "parquet")
        return "parquet" if any(map(_may_hold_images, tables)) else "imagefolder"
    return next((kind for kind in EXTENSIONS if kind in present), None)


def _may_hold_images(file: str) -> bool:
    """Whether a parquet file has a column of bytes, or cannot be read."""
    try:
        types = pq.read_schema(file).types
    except (OSError, UnicodeError, pa.ArrowException):
        return True
    fields = [field.type for kind in types for field in (kind if pa.types.is_struct(kind) else ())]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) for kind in [*types, *fields])


def may_describe(file: str) -> bool:
    """Whether a file may describe images, by its suffix."""
    return suffix_of(file) in (*SIDE_FILES, *TABLES)


def suffix_of(file: str | Path) -> str:
    """The suffix of a file in small letters."""
    return os.path.splitext(file)[1].lower()


def other_kind(file: str) -> str:
    """The reason why a file is not read that is of another kind than the set."""
    return f"of another kind ({suffix_of(file) or os.path.basename(file)})"


def walk(folder: str | Path, left_out: Counter, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a folder, also through links to folders; hidden and unreadable ones are counted."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above it
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        left_out["in folders that cannot be read"] += 1
        return
    for entry in entries:
        hidden = entry.name.startswith(".") or (entry.name.startswith("__") and entry.is_dir())
        if hidden and entry.is_dir():
            left_out["in hidden folders"] += sum(len(names) for _, _, names in os.walk(entry.path))
        elif hidden:
            left_out["hidden"] += 1
        elif entry.is_dir():
            yield from walk(entry.path, left_out, (*above, real))
        elif entry.is_file():
            yield entry.path
        else:
            left_out["not a regular file"] += 1


def find_splits(folder: str, files: list[str], kind: str) -> dict[str, list[str]] | None:
    """The files of each split at the top level of a folder, or None if anything there is not named after a split."""
    level = _top_level(folder, files)
    splits = {}
    for file in files:
        split = _split_at(level, file)
        if split is None or (kind == "imagefolder" and not _entry(level, file)[1]):
            return None
        splits.setdefault(split, []).append(file)
    return {split: splits[split] for split in SPLIT_WORDS if split in splits}


def _top_level(folder: str, files: list[str]) -> str:
    """The folder that holds the folders and files of splits: the first one below with more than one entry."""
    while True:
        entries = {_entry(folder, file) for file in files}
        name, is_folder = next(iter(entries))
        if len(entries) > 1 or not is_folder or _split_of(name):
            return folder
        folder = os.path.join(folder, name)


def _entry(level: str, file: str) -> tuple[str, bool]:
    """The name of the entry of a folder that holds a file below it, and whether the entry is a folder."""
    name, below, _ = file[len(level.rstrip(os.sep)) + 1 :].partition(os.sep)
    return name, bool(below)


def _split_at(level: str, file: str) -> str | None:
    """The split of a file, by the name of the entry of a folder that holds it."""
    name, is_folder = _entry(level, file)
    return _split_of(name if is_folder else Path(name).stem, is_folder)


def _beside_split(folder: str, files: list[str], beside: list[str], split: str) -> list[str]:
    """The files next to the images of a split; those above the folders of splits belong to all splits."""
    level = _top_level(folder, files)
    return [file for file in beside if not _entry(level, file)[1] or _split_at(level, file) == split]


def is_split(folder: str) -> bool:
    """Whether the name of a folder is that of a split."""
    return _split_of(folder) is not None


def _split_of(name: str, is_folder: bool = True) -> str | None:
    """The split that the name of a folder, or of a file without its suffix, stands for."""
    match = SPLIT_FILE.fullmatch(name)
    word = None if match is None or (is_folder and match[1] != name) else match[1].lower()
    return next((split for split, words in SPLIT_WORDS.items() if word in words), None)


def _notes_on_splits(folder: str, files: list[str], splits: dict | None) -> tuple[str, ...]:
    """A note on names below a folder that look like splits but are not read as splits."""
    if splits:
        return ()
    below = len(folder.rstrip(os.sep)) + 1
    names = {part for file in files for part in os.path.splitext(file[below:])[0].split(os.sep)}
    names = sorted(name for name in names if ANY_SPLIT_WORD.search(name))
    if not names:
        return ()
    shown = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return (f"names such as {shown} are not read as splits, because there are other names next to them",)
