"""Every text file is read and written as UTF-8, regardless of the machine's locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODE_AT = {"read_text": None, "write_text": None, "NamedTemporaryFile": 0, "TemporaryFile": 0, "fdopen": 1}
BINARY = {"NamedTemporaryFile", "TemporaryFile"}  # their default mode
# Modules and classes whose `open` does not open text files; `_Shard` is a `TarFile`, `members` a `ZipFile`.
OTHER_OPENERS = {"Image", "_Shard", "fsspec", "members", "os", "tarfile", "webbrowser", "zipfile"}


def without_encoding(source: str) -> Iterator[int]:
    """Lines of calls that read or write text without an encoding."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        function, owner = call.func, None
        if isinstance(function, ast.Attribute):
            name, owner = function.attr, getattr(function.value, "id", "")
        else:
            name = getattr(function, "id", "")
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        is_open = name == "open" and owner not in OTHER_OPENERS
        is_method = name in ("read_text", "write_text") and owner is not None
        if not (is_open or is_method or name in ("fdopen", *BINARY)) or "encoding" in keywords:
            continue
        place = (1 if owner is None or owner == "io" else 0) if name == "open" else MODE_AT[name]
        mode = keywords.get("mode")
        if place is not None and len(call.args) > place:
            mode = call.args[place]
        mode = getattr(mode, "value", "b" if name in BINARY else "")
        if "b" not in str(mode):
            yield call.lineno


def sources() -> list[Path]:
    return sorted(file for part in ("improved_ldm", "training", "tests") for file in (ROOT / part).rglob("*.py"))


@pytest.mark.parametrize("file", sources(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_text_file_has_an_encoding(file):
    lines = list(without_encoding(file.read_text(encoding="utf-8")))
    assert not lines, f"{file}: give `encoding` in lines {lines}"


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text()",
        "path.write_text('a')",
        "(a / 'b').open()",
        "path.open('w')",
        "open(file, 'a')",
        "io.open(file)",
        "open(file, mode='r+')",
        "tempfile.NamedTemporaryFile('w')",
        "NamedTemporaryFile(mode='w+')",
        "os.fdopen(number, 'w')",
    ],
)
def test_a_call_without_an_encoding_is_seen(call):
    assert list(without_encoding(call)) == [1]


@pytest.mark.parametrize(
    "call",
    [
        "path.read_text(encoding='utf-8')",
        "path.open('rb')",
        "open(file, 'ab')",
        "Image.open(file)",
        "NamedTemporaryFile()",
        "os.fdopen(number, 'wb')",
        "open(file, mode='wb')",
        "write_text(file, text)",
    ],
)
def test_other_calls_are_not(call):
    assert not list(without_encoding(call))
