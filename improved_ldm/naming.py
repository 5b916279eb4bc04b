"""Errors in the user's terms: keys of the configuration instead of function arguments."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from improved_ldm.exits import is_out_of_memory, one_line

# Arguments of `open_rows` → keys of a training run.
DATA_KEYS = {
    "source": "data.source",
    **{name: f"data.{name}" for name in ("split", "name", "image_column", "label_column", "num_classes")},
    **{name: f"data.{name}" for name in ("caption_column", "caption_weights", "caption_template")},
}


@contextmanager
def naming_keys(**keys: str) -> Iterator[None]:
    """Replace the names of arguments in errors, `like this`, with the keys that they come from.

    Args:
        keys: Keys of the configuration by the names of arguments.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        message = re.sub(r"`(\w+)`", lambda match: f"`{keys.get(match[1], match[1])}`", str(error))
        if message == str(error):
            raise
        raise _same_kind(error)(message) from error


@contextmanager
def naming_part(part: str) -> Iterator[None]:
    """Begin errors with the part of a run that they are about; nothing is added if it is empty."""
    try:
        yield
    except (OSError, ValueError) as error:
        if not part:
            raise
        raise _same_kind(error)(f"{part}: {error}") from error


def _same_kind(error: OSError | ValueError) -> type[OSError | ValueError]:
    return next(kind for kind in (FileNotFoundError, OSError, ValueError) if isinstance(error, kind))


@contextmanager
def loading(key: str, source: str) -> Iterator[None]:
    """Turn any error while a source is loaded into one that names the source and its key.

    Args:
        key: Key of the configuration.
        source: Value of the key, a folder or a Hub id.

    Raises:
        ValueError: In place of any other error, because errors of foreign files have no common type.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error) or f"`{key}`" in str(error):
            raise
        raise ValueError(f"`{key}` is {source!r}, which does not load: {one_line(str(error))}") from error
