"""Files that are computed once from the files of a set, and kept in the cache of `datasets` until these change."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock

from improved_ldm.data.fingerprint import file_stamp
from improved_ldm.output import writing
from improved_ldm.provenance import write_whole


def cached_file(files: Sequence[str], what: Sequence[str], suffix: str) -> Path:
    """The path of something that is computed from files; another path when the files change.

    Args:
        files: paths of the files.
        what: what is computed.
        suffix: suffix of the result, with its dot.
    """
    stamps = [(file, file_stamp(Path(file)) if os.path.exists(file) else None) for file in files]
    text = json.dumps([stamps, list(what)])
    name = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "improved_ldm" / f"{name}{suffix}"


def write_once(file: Path, write: Callable[[Path], Any]):
    """Write a file unless it exists; other processes that need it wait.

    Args:
        file: file to write; it appears when it is complete.
        write: function that writes the content to a given path.

    Raises:
        OutputError: if it cannot be written.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                write_whole(file, write)
