"""Errors for writes that fail because the disk is full or the folder is read-only."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class OutputError(OSError):
    """Something cannot be written; earlier files are complete."""


@contextlib.contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn the various errors that libraries raise when they cannot write into one error.

    Args:
        place: File or folder that is written.

    Raises:
        OutputError: If writing fails; the message names the file, the reason, the free space and the remedy.
    """
    try:
        yield
    except OutputError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises a RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise OutputError(
            f"{place} cannot be written: {reason}; {_free(place)}. Make room or the folder writable; the same command "
            "then resumes from the newest checkpoint."
        ) from error


def _free(place: Path) -> str:
    folder = next(parent for parent in (place.absolute(), *place.absolute().parents) if parent.exists())
    return f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free"
