"""Where a number comes from: libraries, device and command; and how records are written."""

import json
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets")


def library_versions(*more: str) -> dict[str, str]:
    """Versions of the libraries that every number depends on, and of further ones by their names on PyPI."""
    return {name: version(name) for name in (*LIBRARIES, *more)}


def device_name(device: torch.device) -> str:
    """What a device is called; of a processor, with the threads that it computes with."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or platform.machine()}, {torch.get_num_threads()} threads"


def launch_command() -> str:
    """The command that started this script; the options of `accelerate launch` are not known to what it starts."""
    if "ACCELERATE_DYNAMO_BACKEND" in os.environ:  # `accelerate launch` sets it for all that it starts
        return shlex.join(["accelerate", "launch", *sys.argv])
    return shlex.join(["python", *sys.orig_argv[1:]])


def write_json(file: Path, record: Any):
    """Write a record whole or not at all.

    Raises:
        ValueError: for NaN or infinity, which JSON does not have.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    unfinished.replace(file)
