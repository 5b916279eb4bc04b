"""Opened sets, their rows and bad rows; how the columns of a row are found and checked."""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import datasets
from PIL import Image, UnidentifiedImageError

from improved_ldm.data.captions import caption_of_class, captions_of, draw_caption
from improved_ldm.data.filters import ALL_ROWS, RowFilter
from improved_ldm.data.formats import FAULT
from improved_ldm.data.images import read_image, read_size
from improved_ldm.data.retries import RemoteReadError
from improved_ldm.data.stored import StoredRow, Table, stored_windows
from improved_ldm.places import EXTENSIONS

# Members of webdataset shards that hold what a parquet file calls image, text and label.
WEBDATASET_COLUMNS = {
    "image": tuple(suffix[1:] for suffix in EXTENSIONS["imagefolder"]),
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
            read. One of several columns of captions is drawn for each row in each epoch.
        num_classes: number of classes; labels must be below it. None if it is not known.
        files: absolute paths of the local files that are read; empty for a dataset on the Hub.
        class_names: names of the classes in the order of their labels; None if the set does not have them.
        class_numbers: label of each class by its name, if labels are stored as names.
        caption_weights: weight of each column of captions; None weighs them equally.
        caption_template: caption of an image that has no other, with `{label}` for the name of its class.
        template_column: column of these classes.
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
    caption_column: str | tuple[str, ...] | None
    label_column: str | None
    num_classes: int | None = None
    files: tuple[str, ...] = ()
    class_names: list[str] | None = None
    class_numbers: Mapping[str, int] | None = None
    caption_weights: tuple[float, ...] | None = None
    caption_template: str | None = None
    template_column: str | None = None
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

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns of captions."""
        return names_of(self.caption_column)

    def captions(self) -> Iterator[str]:
        """All captions in the order of the set, without decoding images; bad rows are skipped."""
        for window in stored_windows(self.dataset, CAPTIONS_AT_ONCE, self.is_remote):
            for stored, *_ in window:
                with contextlib.suppress(BadRowError):
                    yield from self.all_captions(stored)

    def reason_to_leave_out(self, row: StoredRow, size: tuple[int, int] | None = None) -> str | None:
        """Why the filter of the set leaves out a row; None if it keeps it, or if the row is bad.

        Args:
            row: the stored row.
            size: (height, width) of its image, pixels, if it is known.
        """
        with contextlib.suppress(BadRowError):  # counted as such when it is read
            captions = None if self.caption_column is None else lambda: self.all_captions(row.values)
            return self.row_filter.reason(captions, lambda: size or self.image_size(row.values))
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
        caption = None if self.caption_column is None else self.caption(stored, seed)
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

    def caption(self, stored: dict[str, Any], seed: int = 0) -> str:
        """The caption of a stored row, drawn from those that it has; "" if it has none.

        Args:
            stored: the row.
            seed: seed of the row in this epoch.

        Raises:
            BadRowError: if it is missing, not a string or a list of strings, or not UTF-8.
        """
        return draw_caption(self.caption_options(stored), self.caption_weights, seed)

    def all_captions(self, stored: dict[str, Any]) -> list[str]:
        """The captions of a stored row, of which one is drawn.

        Raises:
            BadRowError: as in `caption`.
        """
        return list(chain.from_iterable(self.caption_options(stored)))

    def caption_options(self, stored: dict[str, Any]) -> list[list[str]]:
        """The captions of a stored row in each column, or the one that the template makes of its class.

        Raises:
            BadRowError: as in `caption`.
        """
        values = [self.value(stored, column) for column in self.caption_columns]
        if self.caption_template is None and all(value is ABSENT for value in values):
            raise BadRowError("caption is missing")
        try:
            options = [captions_of(None if value is ABSENT else value) for value in values]
        except TypeError as error:
            raise BadRowError("caption is not a string", str(error)) from error
        except UnicodeError as error:
            raise BadRowError("caption is not UTF-8", str(error)) from error
        if self.caption_template is not None and not any(options):
            name = self.class_names[self._class_of(stored, self.template_column)]
            options[0] = [caption_of_class(self.caption_template, name)]
        return [[self.caption_prefix + caption for caption in captions] for captions in options]

    def label(self, stored: dict[str, Any]) -> int:
        """The label of a stored row: an integer, or the number of the class that it names.

        Raises:
            BadRowError: if it is missing, not an integer, out of range, or names no class.
        """
        return self._class_of(stored, self.label_column)

    def _class_of(self, stored: dict[str, Any], column: str) -> int:
        value = self.value(stored, column)
        if value is ABSENT or value is None:
            raise BadRowError("label is missing")
        label = stored_label(value)
        if self.class_numbers is not None:
            if not isinstance(label, str) or label not in self.class_numbers:
                raise BadRowError("label is not the name of a class", f"it is {label!r:.40}")
            label = self.class_numbers[label]
        label = parse_integer(label)
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


def names_of(columns: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names of one column, of several, or of none."""
    return (columns,) if isinstance(columns, str) else tuple(columns or ())


def stored_label(value: Any) -> Any:
    """A label as it is stored, with the bytes of a text file as their text without spaces around it."""
    return value.decode(errors="replace").strip() if isinstance(value, bytes) else value


def parse_integer(value: Any) -> Any:
    """The integer that a text holds; any other value, and a text of more than 30 digits, as it is."""
    return int(value) if isinstance(value, str) and INTEGER.fullmatch(value) else value


def column_names(column: str, is_webdataset: bool) -> tuple[str, ...]:
    """The names that a column may have in a row, in the order in which they are tried."""
    return (column, *(WEBDATASET_COLUMNS.get(column, ()) if is_webdataset else ()))


def stored_names(columns: Iterable[str | Sequence[str] | None], is_webdataset: bool) -> tuple[str, ...]:
    """All names that these columns may have in a row; each is one column, several or none."""
    names = chain.from_iterable(map(names_of, columns))
    return tuple(name for column in names for name in column_names(column, is_webdataset))


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
