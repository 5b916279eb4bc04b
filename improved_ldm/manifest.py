"""Checksums of the files in a folder, to detect damage before the files are used."""

import hashlib
import json
from pathlib import Path
from typing import Any

from improved_ldm.provenance import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path):
    """Record the size and checksum of every file in a folder and its subfolders in the folder's manifest."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    write_json(folder / MANIFEST, {file.relative_to(folder).as_posix(): _entry(file) for file in files})


def has_manifest(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).exists()


def find_damage(folder: Path) -> str | None:
    """Find damage in a folder whose files `write_manifest` recorded.

    Files that are not recorded are ignored.

    Returns:
        A description of the first file that differs from its record, or None.
    """
    try:
        entries = _read_manifest(folder / MANIFEST)
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    problems = (_problem(folder / name, name, *entry) for name, entry in entries.items())
    return next((problem for problem in problems if problem is not None), None)


def is_intact(folder: Path, name: str) -> bool:
    """Whether one file of a folder is equal to the one that `write_manifest` recorded."""
    try:
        return _problem(folder / name, name, *_read_manifest(folder / MANIFEST)[name]) is None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False


def _problem(file: Path, name: str, size: int, checksum: str) -> str | None:
    try:
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        return None if _sha256(file) == checksum else f"{name} differs from its checksum"
    except OSError as error:
        return f"{name} cannot be read ({error})"


def _read_manifest(file: Path) -> dict[str, tuple[int, str]]:
    entries = {name: (entry["size"], entry["sha256"]) for name, entry in json.loads(file.read_bytes()).items()}
    if not entries:
        raise ValueError("it names no file")
    return entries


def _entry(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": _sha256(file)}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
