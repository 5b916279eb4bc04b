"""Shards that fail during a run: read again if the failure may be temporary, else skipped, logged and counted."""

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, TypeVar

from improved_ldm.data.retries import RemoteReadError

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

LOST = "__lost__"  # the column of a row that stands for the rest of a shard; it holds the reason
NO_END_MARK = "shard has no end mark and may be cut short"  # a reason that is counted but does not end a run
PAUSES = (1, 2, 4)  # seconds before a shard is opened again
COMES_BACK = (  # errors that may be temporary, such as those of a network mount
    errno.ENOENT,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
)


class LostShardError(Exception):
    """The rest of a shard cannot be read.

    Args:
        file: path of the shard.
        reason: what is wrong with it.
    """

    def __init__(self, file: str, reason: str):
        super().__init__(reason)
        self.file = file

    def place_after(self, rows: int) -> str:
        """The part of the shard that is lost, in words, if `rows` rows were read."""
        return f"{self.file}, all after row {rows}" if rows else self.file


def after_last_sample(file: str) -> str:
    """The part of a shard, in words, that is lost if the shard has no end mark."""
    return f"{file}, all after its last sample"


def rows_of_shards(
    files: list[str], numbers: list[int], read: Callable[[str], Iterator[dict[str, Any]]]
) -> Iterator[dict[str, Any]]:
    """The stored rows of shards, one after the other, with the numbers of their shard and of the row in the shard.

    A shard with a temporary failure is opened again, and reading resumes after the last row that was read. If the rest
    of a shard cannot be read, one row with the column `LOST` replaces it.

    Args:
        files: paths of the shards.
        numbers: numbers of the shards in the set.
        read: function that yields the rows of a shard, in the same order at every call.

    Raises:
        RemoteReadError: if a shard is on the Hub and the Hub fails.
    """
    for file, shard in zip(files, numbers, strict=True):
        number = -1
        try:
            for number, row in enumerate(items_of_shard(file, read)):
                yield {**row, "number": [shard, number]}
        except LostShardError as error:
            place, reason = error.place_after(number + 1), str(error)
            yield {"row": {LOST: reason}, "place": place, "number": [shard, number + 1]}


def items_of_shard(file: str, read: Callable[[str], Iterator[Item]]) -> Iterator[Item]:
    """The items of a shard; after a temporary failure they continue with the next one.

    Args:
        file: path of the shard.
        read: function that yields the items of a shard, in the same order at every call.

    Raises:
        LostShardError: if the rest of the shard cannot be read.
        RemoteReadError: if the shard is on the Hub and the Hub fails.
    """
    given = 0
    for pause in (*PAUSES, None):
        try:
            for item in islice(read(file), given, None):
                given += 1
                yield item
            return
        except RemoteReadError:
            raise
        except Exception as error:  # the error for a damaged file depends on its format
            if pause is None or getattr(error, "errno", None) not in COMES_BACK:
                raise LostShardError(file, _reason(file, error)) from error
            logger.warning("%s fails (%s); it is opened again in %d s", file, error.strerror, pause)
            time.sleep(pause)


def _reason(file: str, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "shard is not there"
    if isinstance(error, OSError) and error.errno is not None:
        return f"shard cannot be read: {os.strerror(error.errno)}"
    if os.path.exists(file) and os.path.getsize(file) == 0:
        return "shard is empty"
    return "shard is damaged or cut short"
