"""Opened sets, their rows and bad rows; how the columns of a row are found and checked."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from improved_ldm.data.filters import ALL_ROWS, RowFilter
from improved_ldm.data.formats import FAULT
from improved_ldm.data.images import read_image, read_size
from improved_ldm.data.retries import RemoteReadError
from improved_ldm.data.stored import StoredRow, Table, stored_windows

# Members of webdataset shards that hold what a parquet file calls image, text and label.
WEBDATASET_COLUMNS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "text": ("txt", "json.text", "json.caption"),
    "label": ("cls", "json.label"),
}
CAPTIONS_AT_ONCE = 256
MAX_CLASSES = 2**63  # limit of an int64 tensor of labels
INTEGER = re.compile(r"\s*[-+]?[0-9]{1,30}\s*")  # a label in a text file
ABSENT = object()  # the value of a column that a row does not have


class BadRowError(ValueError):
    """A row that cannot be used.

    Args:
        reason: kind of problem, by which such rows are counted.
        detail: details of this row.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Rows:
    """An opened set of images whose columns are known to exist.

    Args:
        dataset: the streamed rows, with images not decoded.
        image_column, caption_column, label_column: names of the columns; `a.b` is field b of column a, None is not
            read.
        num_classes: number of classes; labels must be below it. None if it is not known.
        files: absolute paths of the local files that are read; empty for a dataset on the Hub.
        class_names: names of the classes in the order of their labels; None if the set does not have them.
        is_webdataset: whether `image`, `text` and `label` also find the usual members of a sample.
        description: what is read and what is left out, in a sentence or two.
        table: function that opens the rows as a table, which is read in any order; None for a stream.
        row_filter: which rows are used.
        caption_prefix: text that every caption begins with.
        own_classes: for each label in the files, its number in `class_names`; None if these are the same.
        named: number of skipped rows at the last log message, by reason; messages get rarer as the number grows.
    """

    dataset: datasets.IterableDataset
    image_column: str
    caption_column: str | None
    label_column: str | None
    num_classes: int | None = None
    files: tuple[str, ...] = ()
    class_names: list[str] | None = None
    is_webdataset: bool = False
    description: str = ""
    table: Callable[[], Table] | None = field(default=None, compare=False, repr=False)
    row_filter: RowFilter = ALL_ROWS
    caption_prefix: str = ""
    own_classes: tuple[int, ...] | None = None
    named: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    @property
    def is_remote(self) -> bool:
        """Whether the rows come from the Hub."""
        return not self.files

    def captions(self) -> Iterator[str]:
        """The captions in the order of the set, without decoding images; bad ones are skipped."""
        for window in stored_windows(self.dataset, CAPTIONS_AT_ONCE, self.is_remote):
            for stored, *_ in window:
                with contextlib.suppress(BadRowError):
                    yield self.caption(stored)

    def reason_to_leave_out(self, row: StoredRow, size: tuple[int, int] | None = None) -> str | None:
        """Why the filter of the set leaves out a row; None if it keeps it, or if the row is bad.

        Args:
            row: the stored row.
            size: (height, width) of its image, pixels, if it is known.
        """
        with contextlib.suppress(BadRowError):  # counted as such when it is read
            caption = None if self.caption_column is None else lambda: self.caption(row.values)
            return self.row_filter.reason(caption, lambda: size or self.image_size(row.values))
        return None

    def decoded(self, row: StoredRow, seed: int, min_size: tuple[int, int] | None = None) -> "Row":
        """The row with its image decoded.

        Args:
            row: the stored row.
            seed: seed of the row in its epoch.
            min_size: as in `read_image`.

        Raises:
            BadRowError: if it cannot be used.
        """
        stored = row.values
        self.check(stored)
        caption = None if self.caption_column is None else self.caption(stored)
        label = None if self.label_column is None else self.label(stored)
        image, size = self.image(stored, min_size)
        return Row(image, size, caption, label, seed)

    def check(self, stored: dict[str, Any]):
        """Raise a BadRowError if something is wrong with a stored row as a whole."""
        if FAULT in stored:
            raise BadRowError(stored[FAULT])

    def value(self, stored: dict[str, Any], column: str) -> Any:
        """The value of a column of a stored row, or `ABSENT`.

        Raises:
            BadRowError: if it is inside JSON that cannot be parsed.
        """
        values = (look_up(stored, name) for name in column_names(column, self.is_webdataset))
        return next((value for value in values if value is not ABSENT), ABSENT)

    def stored_image(self, stored: dict[str, Any]) -> dict[str, Any] | bytes:
        """The encoded image of a stored row.

        Raises:
            BadRowError: if there is none.
        """
        value = self.value(stored, self.image_column)
        if value is ABSENT or value is None:
            raise BadRowError("image is missing")
        if not isinstance(value, bytes | dict):
            raise BadRowError("image is not encoded", f"it is of type {type(value).__name__}")
        if isinstance(value, dict) and value.get("bytes") is None and not value.get("path"):
            raise BadRowError("image is missing")
        return value

    def image(
        self, stored: dict[str, Any], min_size: tuple[int, int] | None = None
    ) -> tuple[Image.Image, tuple[int, int]]:
        """The image of a stored row and its (height, width), as `read_image` gives them.

        Raises:
            BadRowError: if it cannot be read.
        """
        return self._reading_image(stored, lambda encoded: read_image(encoded, min_size))

    def image_size(self, stored: dict[str, Any]) -> tuple[int, int]:
        """The (height, width) of the upright image of a stored row, pixels, from its header.

        Raises:
            BadRowError: if it cannot be read.
        """
        return self._reading_image(stored, read_size)

    def _reading_image(self, stored: dict[str, Any], read: Callable[[dict[str, Any] | bytes], Any]) -> Any:
        encoded = self.stored_image(stored)
        try:
            return read(encoded)
        except RemoteReadError:  # not the fault of the row
            raise
        except FileNotFoundError as error:
            raise BadRowError("image file is not there", str(error)) from error
        except Image.DecompressionBombError as error:
            raise BadRowError("image is too large", str(error)) from error
        except Exception as error:  # PIL's error for damaged bytes depends on the format
            detail = "unknown format" if isinstance(error, UnidentifiedImageError) else repr(error)
            raise BadRowError("image cannot be decoded", detail) from error

    def caption(self, stored: dict[str, Any]) -> str:
        """The caption of a stored row; "" if the set has null.

        Raises:
            BadRowError: if it is missing, not a string, or not UTF-8.
        """
        value = self.value(stored, self.caption_column)
        if value is ABSENT:
            raise BadRowError("caption is missing")
        if value is None:
            return ""
        try:
            text = value.decode() if isinstance(value, bytes) else value
            if not isinstance(text, str):
                raise BadRowError("caption is not a string", f"it is of type {type(text).__name__}")
            text.encode()  # JSON can hold halves of surrogate pairs, which tokenizers refuse
        except UnicodeError as error:
            raise BadRowError("caption is not UTF-8", str(error)) from error
        return self.caption_prefix + text if text else text

    def label(self, stored: dict[str, Any]) -> int:
        """The label of a stored row.

        Raises:
            BadRowError: if it is missing, not an integer, or out of range.
        """
        value = self.value(stored, self.label_column)
        if value is ABSENT or value is None:
            raise BadRowError("label is missing")
        label = parse_integer(value.decode(errors="replace")) if isinstance(value, bytes) else value
        if type(label) is not int:
            raise BadRowError("label is not an integer", f"it is {label!r:.40}")
        classes = len(self.own_classes or ()) or self.num_classes or len(self.class_names or ()) or MAX_CLASSES
        if not 0 <= label < classes:
            raise BadRowError("label is negative" if label < 0 else f"label is not below {classes}", f"it is {label}")
        return label if self.own_classes is None else self.own_classes[label]


@dataclass(frozen=True)
class Row:
    """One image and what is known about it.

    Args:
        image: RGB, possibly decoded at a reduced size.
        size: (height, width) of the upright image, pixels.
        caption: caption, "" if the set has none for this image; None if captions are not read.
        label: class index; None if labels are not read.
        seed: seed of the random transforms and the posterior sample of this row in this epoch.
        source: number of the set that it is from, in a mixture.
        group: number of the bucket of its size; 0 without buckets.
    """

    image: Image.Image
    size: tuple[int, int]
    caption: str | None
    label: int | None
    seed: int
    source: int = 0
    group: int = 0


def parse_integer(text: str) -> int | str:
    """The integer that a text holds; the text itself if it is not an integer, or has more than 30 digits."""
    return int(text) if INTEGER.fullmatch(text) else text


def column_names(column: str, is_webdataset: bool) -> tuple[str, ...]:
    """The names that a column may have in a row, in the order in which they are tried."""
    return (column, *(WEBDATASET_COLUMNS.get(column, ()) if is_webdataset else ()))


def look_up(stored: Mapping[str, Any], column: str) -> Any:
    """The value of a column, or of field b of column a if it is written `a.b`; `ABSENT` if there is none.

    Raises:
        BadRowError: if it is inside JSON that cannot be parsed.
    """
    if column in stored:
        return stored[column]
    outer, _, inner = column.partition(".")
    inside = stored.get(outer)
    if inner and isinstance(inside, bytes):
        inside = _parse_json(inside)
    return look_up(inside, inner) if inner and isinstance(inside, dict) else ABSENT


def _parse_json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError("JSON cannot be parsed", str(error)) from error
