"""The settings of an image as the query of a link to the page."""

from typing import Any
from urllib.parse import parse_qsl, urlencode

from improved_ldm.demo.comparison import SHAPE, Settings
from improved_ldm.demo.limits import Limits, shown

OTHERS = "__"  # begins the names that Gradio and the Hub add to an address
MAX_VALUES = 100  # in a query
SWITCH = {"true": True, "false": False}


def write_link(settings: Settings, limits: Limits) -> str:
    """The query that `read_link` reads as these settings, without the part of the view that is as by default."""
    view, default = settings.view, limits.views[settings.view[SHAPE]]
    special = {name: value for name, value in view.items() if value != default[name] or (name == SHAPE and value)}
    record = _record(settings, limits) | special
    return urlencode(
        {name: str(value).lower() if isinstance(value, bool) else value for name, value in record.items()}
    )


def read_link(query: str, limits: Limits, first: Settings) -> tuple[Settings, list[str]]:
    """The settings of a link.

    Args:
        query: Query of the address, which anyone can have written.
        limits: Bounds of the values, as for the page's inputs.
        first: Settings with which the page starts. The link can leave values out, and has the default view then.

    Returns:
        The settings, and the names in the query that are no settings.

    Raises:
        TypeError: If the query is no text.
        ValueError: If a value is out of bounds or given twice. The message names the first such value.
    """
    if not isinstance(query, str):
        raise TypeError(f"`query` is {shown(query)}; it must be text.")
    pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_VALUES)
    given = dict(pairs)
    if len(pairs) > len(given):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"`{shown(twice)[1:-1]}` is given twice; a link has each setting once.")
    values, view = _record(first, limits), limits.views.get(given.get(SHAPE, ""), limits.view)
    known = {name: _value(given.get(name), default) for name, default in (values | view).items()}
    settings = limits.check(*(known[name] for name in values), {name: known[name] for name in view})
    return settings, [name for name in given if name not in known and not name.startswith(OTHERS)]


def _record(settings: Settings, limits: Limits) -> dict[str, Any]:
    """The settings besides the view by their names in the API."""
    subject, *_, view = settings._fields
    names = [limits.subject, *(name for name in settings._fields if name not in (subject, view))]
    return dict(zip(names, settings, strict=False))


def _value(text: str | None, default: Any) -> Any:
    """The value of a text with the type of the default value; a text that has no such value is returned unchanged."""
    if text is None:
        return default
    if isinstance(default, bool):
        return SWITCH.get(text, text)
    if not isinstance(default, str):
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                pass
    return text
