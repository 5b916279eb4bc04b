"""Fingerprint of a data set, to find changes: names, sizes and times of its files, or its commit on the Hub."""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from improved_ldm.data.files import count_of

HUB_SECONDS = 10  # timeout for asking the Hub for a commit


def place_files(place: str) -> list[Path]:
    """The files of a local place, in order: all files below a folder, a single file, or the matches of a pattern.

    The name of an existing file or folder is not read as a pattern. A place that is not local has no files.
    """
    path = Path(place)
    if path.is_dir():
        found = path.rglob("*")
    else:
        found = [path] if path.exists() else map(Path, glob.glob(place, recursive=True))
    return [file for file in sorted(found) if file.is_file()]


def file_stamp(file: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def data_fingerprint(source: str, files: Sequence[str] = ()) -> dict[str, Any]:
    """The fingerprint of a set as it is now.

    Args:
        source: the set, as the user names it.
        files: local files that are read; empty for a set on the Hub.

    Returns:
        `files`, [size, time] by name, or `revision`, the commit on the Hub if it is available. An embedded set has
        neither, because its files are part of the package.
    """
    if source.startswith("embedded:"):
        return {}
    if not files:
        return {"revision": _hub_revision(source)}
    base = _common_folder(files)
    stamps = {file: file_stamp(Path(file)) for file in files if os.path.isfile(file)}  # some may be missing
    return {"files": {Path(os.path.relpath(file, base)).as_posix(): list(stamp) for file, stamp in stamps.items()}}


def data_changes(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """How a set differs from its earlier fingerprint, with counts; None if no difference is known."""
    old, new = before.get("files"), now.get("files")
    if old is not None and new is not None:
        return _file_changes(old, new)
    old, new = before.get("revision"), now.get("revision")
    if old and new and old != new:
        return f"its commit on the Hub was {old[:12]} and is {new[:12]}"
    return None


def _file_changes(old: dict[str, list[int]], new: dict[str, list[int]]) -> str | None:
    kinds = {
        "added": new.keys() - old.keys(),
        "removed": old.keys() - new.keys(),
        "changed": {name for name in old.keys() & new.keys() if old[name] != new[name]},
    }
    counts = [_count(names, kind) for kind, names in kinds.items() if names]
    return ", ".join(counts) or None


def _count(names: Iterable[str], kind: str) -> str:
    first, *others = sorted(names)
    return f"{count_of(len(others) + 1, 'file')} {kind} ({first}{', …' if others else ''})"


def _common_folder(files: Sequence[str]) -> str:
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


def _hub_revision(source: str) -> str | None:
    """The commit of a dataset's main branch, or None if the Hub is not available."""
    try:
        return HfApi().dataset_info(source, timeout=HUB_SECONDS).sha
    except Exception:  # the type of the error depends on the client's HTTP library
        return None
