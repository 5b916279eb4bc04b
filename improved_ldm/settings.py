"""Typed settings of a script: a YAML file, and `--section.key value` on the command line.

pydantic checks types and ranges; unknown keys stop a run with the nearest valid name.
"""

import difflib
import reprlib
import sys
from collections.abc import Collection, Iterator
from copy import copy
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from improved_ldm.exits import leave, one_line
from improved_ldm.places import check_path
from improved_ldm.plain_yaml import MAX_CHARACTERS, PlainYamlError, read_plain
from improved_ldm.settings_help import help_text, is_section, type_members

ConfigType = TypeVar("ConfigType", bound="Section")


MAX_KEY = 200  # characters
MAX_PROBLEMS = 3  # problems of a configuration that are reported at once
NULL = ("null", "Null", "NULL", "~")  # YAML's words for None


class ConfigError(ValueError):
    """A configuration that names an unknown key or gives a value of a wrong type or range."""


class Section(BaseModel):
    """A part of a configuration, which has no other keys than its fields.

    The string below a field describes it in one line; `--help` shows it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )

    successors: ClassVar[dict[str, str]] = {}  # of earlier keys, if no key has the same name in another section

    def check_given(self, typed: Collection[str], filed: Collection[str]):
        """Raise a ValueError for a key that was given and would be ignored.

        Args:
            typed: keys that were given on the command line.
            filed: keys that were given in the file.
        """


def with_defaults(section: type[ConfigType], **defaults: Any) -> type[ConfigType]:
    """A section with the same keys and other defaults."""
    fields = {}
    for name, default in defaults.items():
        field = copy(section.model_fields[name])
        field.default = default
        fields[name] = (field.annotation, field)
    return create_model(section.__name__, __base__=section, __doc__=section.__doc__, **fields)


def parse_config(config_class: type[ConfigType], argv: list[str], default_yaml: Path | None = None) -> ConfigType:
    """Read a configuration from a YAML file and command-line overrides.

    Args:
        config_class: the typed configuration.
        argv: `--config FILE` and `--section.key VALUE` pairs. Values are YAML, but texts are taken as typed.
            `--section VALUE` sets the `source` of a section that has one.
        default_yaml: file to read if `--config` is not given.

    Returns:
        The configuration, checked.

    Raises:
        ConfigError: if a key or a value is not valid; its one line names the key, the value and what would be valid.
    """
    arguments = _pair_arguments(argv)
    path = arguments.pop("config", default_yaml)
    values = {} if path is None else _read_file(path)
    filed = set(_names_in(values))
    known = dict(_key_paths(config_class))
    names = {key: f"{key}.source" if f"{key}.source" in known else key for key in arguments}
    texts = {name for name, field in known.items() if _takes_text(field.annotation)}
    for key, text in arguments.items():
        _set_nested(values, key, names[key], _parse_value(key, text, is_text=names[key] in texts))
    try:
        config = config_class.model_validate(values)
        config.check_given(set(names.values()), filed)
    except ValidationError as error:
        problems = [_explain(config_class, problem) for problem in error.errors()]
        more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
        raise ConfigError(one_line(" ".join([*problems[:MAX_PROBLEMS], *more]))) from None
    except ValueError as error:
        raise ConfigError(one_line(str(error))) from None
    return config


def parse_config_or_exit(
    config_class: type[ConfigType], argv: list[str], default_yaml: Path | None = None
) -> ConfigType:
    """`parse_config` for a script: an error prints its message and exits, `--help` prints the keys and exits."""
    if {"--help", "-h"} & set(argv):
        print(help_text(config_class, default_yaml))
        sys.exit(0)
    try:
        return parse_config(config_class, argv, default_yaml)
    except ConfigError as error:
        leave(f"configuration error: {error}")


def _read_file(path: str | Path) -> dict[str, Any]:
    """The keys and values of a configuration file.

    Raises:
        ConfigError: if it is not such a file.
    """
    try:
        check_path(path)
    except ValueError as error:
        raise ConfigError(f"--config {_short(str(path))}: {error}.") from None
    try:
        if Path(path).is_dir():
            raise ConfigError(f"--config {path} is a folder; it must be a YAML file.")
        if not Path(path).is_file():
            raise ConfigError(f"--config {path}: there is no such file.")
        with Path(path).open(encoding="utf-8") as file:
            values = read_plain(file.read(MAX_CHARACTERS + 1))
    except PlainYamlError as error:
        raise ConfigError(f"--config {path} {error}.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"--config {path} is not UTF-8 text, from byte {error.start} on.") from None
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from None
    if values is None:
        raise ConfigError(f"--config {path} is empty; it must hold keys and their values.")
    if not isinstance(values, dict):
        raise ConfigError(f"--config {path} holds a {type(values).__name__}; it must hold keys and their values.")
    return values


def _pair_arguments(argv: list[str]) -> dict[str, str]:
    pairs, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ConfigError(f"{_short(word)} has no key; arguments are written `--section.key value`.")
        key, has_value, value = word[2:].partition("=")
        if not all(key.split(".")) or len(key) > MAX_KEY:
            raise ConfigError(f"{_short('--' + key)} is not a key; arguments are written `--section.key value`.")
        if not has_value:
            if not words:
                raise ConfigError(f"--{key} has no value.")
            value = words.pop(0)
        pairs[key] = value
    return pairs


def _parse_value(key: str, value: str, is_text: bool):
    """A value of the command line, read as YAML; a text without quotation marks is taken as typed."""
    if is_text and not value.startswith(("'", '"')):
        return None if value in NULL else value
    try:
        return read_plain(value)
    except PlainYamlError as error:
        raise ConfigError(f"--{key} is {_short(value)}; it {error}.") from None


def _set_nested(values: dict, key: str, name: str, value):
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--{key}: {section!r} is not a section.")
    values[last] = value


def _names_in(values: Any, prefix: str = "") -> Iterator[str]:
    """The keys of nested mappings, each section before its own keys."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names_in(value, f"{prefix}{key}.")


def _explain(config_class: type[Section], problem: dict) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing" and any(isinstance(part, int) for part in problem["loc"]):
        return f"`{key}` is missing."
    if problem["type"] == "missing":
        return f"`{key}` is not given; give `--{key}`."
    if problem["type"] in ("model_type", "model_attributes_type"):
        return f"`{key}` is {_short(problem['input'])}; it is a section; give its keys one by one."
    if problem["type"] in ("tuple_type", "list_type"):
        return f"`{key}` is {_short(problem['input'])}; it must be a list, written `[…, …]`."
    if problem["type"] != "extra_forbidden":
        reason = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
        named = f"`{key}` is {_short(problem['input'])}: " if key else ""
        return f"{named}{reason.removesuffix('.')}."
    known, shown = dict(_key_paths(config_class)), key[:MAX_KEY]
    successor = config_class.successors.get(key)
    nearest = [successor] if successor else [path for path in known if path.rsplit(".", 1)[-1] == problem["loc"][-1]]
    if not nearest:  # it is not the right name in the wrong section
        nearest = difflib.get_close_matches(shown, known, n=1, cutoff=0.5)
    hint = f"; the nearest valid key is `{nearest[0]}`" if nearest else f"; valid keys are {', '.join(known)}"
    return f"`{shown}` is not a key{hint}."


_values = reprlib.Repr()
_values.maxstring = _values.maxother = _values.maxlong = 80


def _short(value: Any) -> str:
    """A value as it is shown in a message, shortened."""
    return _values.repr(value)


def _takes_text(annotation: Any) -> bool:
    return set(type_members(annotation)) <= {str, Path, type(None)}


def _key_paths(config_class: type[BaseModel], prefix: str = ""):
    for name, field in config_class.model_fields.items():
        yield prefix + name, field
        if is_section(field.annotation):
            yield from _key_paths(field.annotation, f"{prefix}{name}.")
