"""YAML for configurations: one document of plain values, limited to a size that a person writes."""

import re
from typing import Any, ClassVar

import yaml

MAX_CHARACTERS = 30_000  # read in less than a second
MAX_DEPTH = 20
MAX_VALUES = 20_000  # with aliases expanded

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")}


class PlainYamlError(ValueError):
    """A text that is not YAML, or holds more than plain values."""


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 reads them: `no` and `2024-01-01` are words, `1e-4` is a number, `010` is ten."""

    yaml_implicit_resolvers: ClassVar[dict] = {}
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.depth == MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {MAX_DEPTH} levels deep")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


_Loader.add_constructor(_TAG + "int", _Loader.construct_yaml_int)
for _name, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", "<<", "<"),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), list(_first))


def read_plain(text: str) -> Any:
    """The values of a YAML text; None for an empty one.

    Raises:
        PlainYamlError: if it is not one document of words, numbers, lists and mappings with distinct words as keys;
            or is too long, too deeply nested or, with aliases expanded, holds too many values for a configuration.
    """
    if len(text) > MAX_CHARACTERS:
        raise PlainYamlError(f"has {len(text):,} characters; a configuration has at most {MAX_CHARACTERS:,}")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark is not None and "\n" in text.strip() else ""
        raise PlainYamlError(f"is not a plain YAML value: {where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise PlainYamlError(f"is not YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise PlainYamlError(f"is not a plain YAML value: {error}") from None


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count the values of a node and their depth, with aliases expanded, and check its tags and keys.

    Args:
        node: composed node.
        known: counts of the nodes that were visited before, by id; None for those that contain this node.
    """
    if id(node) in known:
        if known[id(node)] is None:
            raise _problem("it contains itself", node)
        return known[id(node)]
    known[id(node)] = None
    if node.tag not in _PLAIN_TAGS:
        raise _problem(f"the tag {node.tag.replace(_TAG, '!!')!r} is not supported", node)
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        children = [value for _, value in node.value]
    sizes = [_measure(child, known) for child in children]
    values, depth = 1 + sum(size[0] for size in sizes), 1 + max((size[1] for size in sizes), default=0)
    if values > MAX_VALUES:
        raise _problem(f"it holds more than {MAX_VALUES:,} values", node)
    if depth > MAX_DEPTH:
        raise _problem(f"it is nested more than {MAX_DEPTH} levels deep", node)
    known[id(node)] = values, depth
    return values, depth


def _check_keys(node: yaml.MappingNode):
    seen = set()
    for key, _ in node.value:
        if key.tag == _TAG + "merge":
            continue
        if key.tag != _TAG + "str":
            raise _problem("a key must be a word", key)
        if key.value in seen:
            raise _problem(f"the key {key.value[:80]!r} is listed twice", key)
        seen.add(key.value)


def _problem(text: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)
