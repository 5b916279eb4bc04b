"""A look at the first rows of a set: whether they hold the requested columns."""

from itertools import chain, islice
from typing import Any

from improved_ldm.data.rows import ABSENT, BadRowError, Rows, names_of, stored_label
from improved_ldm.data.shards import LOST
from improved_ldm.data.stored import stored_windows

PROBED_ROWS = 100  # first rows, of which at least one must hold a column
EXPECTED = {
    "image_column": "encoded images",
    "caption_column": "strings or lists of strings",
    "label_column": "integers or names of classes",
}


def check_columns(rows: Rows, names: list[str], nothing: str, layouts: str = "") -> Any:
    """Check that there are rows, and that one of the first rows holds each requested column.

    Of several columns of captions one must hold captions; the others may be empty, but must exist.

    Args:
        rows: the opened set.
        names: names of its columns; empty if they are known only from its rows.
        nothing: the error if there are no rows.
        layouts: what gives captions to such a set, for the error if it has none.

    Returns:
        The first label; None if labels are not read.

    Raises:
        ValueError: if a column is missing, empty or of another type, or there are no rows.
    """
    probe = _Probe(rows)
    windows = stored_windows(rows.dataset, 1, rows.is_remote)
    has_rows, lost = False, {}
    for stored, place, _ in islice(chain.from_iterable(windows), PROBED_ROWS):
        if LOST in stored:
            lost[place] = stored[LOST]
            continue
        has_rows = True
        probe.look_at(stored)
        if not probe.missing:
            return probe.label
    if not has_rows:
        raise ValueError(" ".join([nothing, *(f"{place}: {reason}." for place, reason in lost.items())]))
    probe.check(names, layouts)
    return probe.label


class _Probe:
    """What the first rows hold of the requested columns.

    Args:
        rows: the rows.
    """

    def __init__(self, rows: Rows):
        self.rows, self.label, self.columns, self.present, self.wrong = rows, None, {}, set(), {}
        requested = {
            "image_column": (rows.image_column,),
            "caption_column": rows.caption_columns if rows.caption_template is None else (),
            "label_column": names_of(rows.label_column),
        }
        self.missing = [(argument, column) for argument, columns in requested.items() for column in columns]

    def look_at(self, stored: dict[str, Any]):
        """Take a row into account."""
        self.columns |= dict.fromkeys(column for column in stored if column != "__key__")
        for argument, column in list(self.missing):
            value = _value_or_absent(self.rows, stored, column)
            if value is not ABSENT:
                self.present.add(column)
            if value is ABSENT or value is None:
                continue
            if _is_expected(argument, value, self.rows.is_webdataset):
                self.missing.remove((argument, column))
                self.label = stored_label(value) if argument == "label_column" else self.label
            else:
                self.wrong.setdefault((argument, column), value)

    def check(self, names: list[str], layouts: str):
        """Raise a ValueError if a column is missing.

        Args:
            names, layouts: as in `check_columns`.
        """
        captions = [column for column in self.rows.caption_columns if ("caption_column", column) not in self.missing]
        for argument, column in self.missing:
            asked = f"`{argument}` is {column!r}"
            if (argument, column) in self.wrong:
                kind = _type_name(self.wrong[argument, column])
                raise ValueError(f"{asked}; it must hold {EXPECTED[argument]}, not {kind}.")
            columns = names or list(self.columns)
            is_there = column in columns or column in self.present
            if argument == "caption_column" and captions and is_there:
                continue
            holds = "it is empty in the first rows" if is_there else "it is not among them"
            message = f"{asked}; the set has the columns {', '.join(columns)}; {holds}."
            raise ValueError(f"{message} {layouts}".rstrip() if argument == "caption_column" else message)


def _is_expected(argument: str, value: Any, is_webdataset: bool) -> bool:
    """Whether a value has the type that a column of this kind holds."""
    if argument == "image_column":
        return isinstance(value, bytes | dict)
    if argument == "label_column":  # a bool is an int in Python
        return isinstance(value, int | str | bytes if is_webdataset else int | str) and not isinstance(value, bool)
    values = value if isinstance(value, list | tuple) else [value]
    text = str | bytes if is_webdataset else str
    return all(isinstance(item, text) or item is None for item in values)


def _type_name(value: Any) -> str:
    """The type of a value; for a list, also that of the first item that is no string."""
    if not isinstance(value, list | tuple):
        return type(value).__name__
    return f"lists of {next(type(item).__name__ for item in value if not isinstance(item, str | None))}"


def _value_or_absent(rows: Rows, stored: dict[str, Any], column: str) -> Any:
    try:
        return rows.value(stored, column)
    except BadRowError:
        return ABSENT
