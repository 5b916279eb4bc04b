"""The `--help` text of a configuration: every key with its description, type, choices and default."""

import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

HELP_WIDTH = 100  # characters
NO_BREAK = "\xa0"  # a space at which lines do not break
NAMES_OF_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", Path: "path", dict: "mapping"}


def help_text(config_class: type[BaseModel], default_yaml: Path | None = None) -> str:
    """The text that `--help` prints: the keys, section by section."""
    default = "optional" if default_yaml is None else f"default: {default_yaml}"
    use = "File of keys and values. They override the defaults below, and the command line overrides them."
    file = f"{use} {_unbroken(f'[YAML; {default}]')}"
    (_, first), *sections = _help_groups(config_class)
    groups = [("", [("--config", file), *first]), *sections]
    return "\n\n".join("\n".join(_help_lines(title, entries)) for title, entries in groups)


def _help_groups(
    section: type[BaseModel], title: str = "", prefix: str = "--"
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The title of a section with the names and texts of its keys, then the same of the sections in it."""
    fields = section.model_fields.items()
    yield title, [(prefix + name, _key_help(field)) for name, field in fields if not is_section(field.annotation)]
    for name, field in fields:
        for part in _sections_in(field.annotation):
            path, is_listed = f"{prefix}{name}", not is_section(field.annotation)
            title = f"{'each of the ' * is_listed}{path.removeprefix('--')}: {part.__doc__.splitlines()[0]}"
            yield from _help_groups(part, title, "" if is_listed else f"{path}.")


def _help_lines(title: str, entries: list[tuple[str, str]]) -> Iterator[str]:
    if title:
        yield textwrap.fill(title, HELP_WIDTH)
    indent = max(len(name) for name, _ in entries) + 4
    for name, text in entries:
        yield textwrap.fill(
            text,
            HELP_WIDTH,
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
        ).replace(NO_BREAK, " ")


def _unbroken(text: str) -> str:
    """A text that breaks into lines only after its commas and semicolons."""
    return re.sub(r"(?<![,;]) ", NO_BREAK, text)


def _key_help(field: FieldInfo) -> str:
    """The description of a key, its type or choices, and its default."""
    kinds = [_type_name(kind) for kind in type_members(field.annotation) if kind is not type(None)]
    if field.is_required():
        default = "required"
    elif field.default is None:
        default = "optional"
    else:
        kinds += ["null"] * (type(None) in type_members(field.annotation))
        default = f"default: {_as_typed(field.default)}"
    return f"{field.description} " + _unbroken(f"[{' or '.join(kinds)}; {default}]")


def _as_typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value, ensure_ascii=False)


def _type_name(kind: Any) -> str:
    """The name of a type, without the limits of its values, or its choices."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        parts = ["…" if part is ... else " or ".join(map(_type_name, type_members(part))) for part in arguments]
        return f"list ({', '.join(parts)})"
    return NAMES_OF_TYPES.get(origin or kind, "section")


def _sections_in(annotation: Any) -> tuple[type[BaseModel], ...]:
    """The section of a key, or of each element if the key is a list."""
    return tuple(kind for kind in (annotation, *get_args(annotation)) if is_section(kind))


def type_members(annotation: Any) -> tuple:
    """The types that a value may have; several only for a union."""
    if get_origin(annotation) is Annotated:
        return type_members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(member for part in get_args(annotation) for member in type_members(part))
    return (annotation,)


def is_section(annotation: Any) -> bool:
    """Whether a type is a section of a configuration."""
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
