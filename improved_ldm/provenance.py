"""The provenance of results (libraries, device and command), and the reading and writing of records."""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from improved_ldm.places import shareable_place

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets")


def library_versions(*more: str) -> dict[str, str]:
    """Versions of the libraries that all results depend on, and of further ones by their names on PyPI."""
    return {name: version(name) for name in (*LIBRARIES, *more)}


def device_name(device: torch.device) -> str:
    """The name of a device; for a CPU, with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def launch_command() -> str:
    """The command that started this script, without the options of `accelerate launch`, which it does not pass on."""
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # `accelerate launch` sets it for every process that it starts
        module = getattr(sys.modules["__main__"], "__spec__", None)  # set if the script was started with `-m`
        script = ["-m", module.name] if module else [_without_folders(sys.argv[0])]
        return shlex.join(["accelerate", "launch", *script, *map(_without_folders, sys.argv[1:])])
    return shlex.join(["python", *map(_without_folders, sys.orig_argv[1:])])


def _without_folders(argument: str) -> str:
    key, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    if not value.startswith(("[", "{")):
        return f"{key}{equals}{shareable_place(value)}"
    places = sorted((text for text in _texts_in(value) if shareable_place(text) != text), key=len, reverse=True)
    if places:
        value = re.sub("|".join(map(re.escape, places)), lambda found: shareable_place(found[0]), value)
    return f"{key}{equals}{value}"


def _texts_in(argument: str) -> Iterator[str]:
    """The texts in a YAML list or mapping; none if the argument is not YAML."""
    try:
        yield from (token.value for token in yaml.scan(argument) if isinstance(token, yaml.ScalarToken))
    except yaml.YAMLError:
        return


def write_json(file: Path, record: Any):
    """Write a record to a JSON file, completely or not at all.

    Raises:
        ValueError: If the record has NaN or infinity, which JSON does not support.
    """
    write_text(file, json.dumps(record, indent=2, allow_nan=False) + "\n")


def write_text(file: Path, text: str):
    """Write a text to a file, completely or not at all."""
    write_whole(file, lambda unfinished: unfinished.write_text(text, encoding="utf-8", newline="\n"))


def write_whole(file: Path, write: Callable[[Path], Any]):
    """Write a file completely or not at all: to a temporary file next to it, which is synced to disk and renamed.

    Args:
        file: File to write; its folder is created.
        write: Function that writes the content to a given path.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished")
    try:
        write(unfinished)
        with unfinished.open("rb+") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_json_lines(file: Path, records: Iterable[dict[str, Any]]):
    """Write records to a file, one per line, completely or not at all."""
    write_text(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json_lines(file: Path, on_damage: Callable[[str], Any] | None = None) -> list[dict[str, Any]]:
    r"""Read records, one per line; only "\n" ends a line, because strings may contain other separators.

    Args:
        file: File to read; a missing file has no records.
        on_damage: Function that is called with a message for each line that is not a record; the line is skipped. None
            raises an error.

    Raises:
        ValueError: If a line is not a JSON object in UTF-8; the message names the file and the line.
    """
    records = []
    for number, line in enumerate(file.read_bytes().split(b"\n") if file.exists() else (), 1):
        if not line.strip():
            continue
        try:
            records.append(parse_json_object(line.decode("utf-8")))
        except ValueError:
            if on_damage is None:
                raise ValueError(
                    f"{file}, line {number}: it must be a JSON object, but it is {line[:40]!r}."
                ) from None
            on_damage(f"{file}, line {number} is left out: it is no whole JSON object, but {line[:40]!r}")
    return records


def parse_json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text.

    Raises:
        ValueError: If the text is not a JSON object; the message gives the reason.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it must be a JSON object: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"it must be a JSON object, not {type(record).__name__}.")
    return record
