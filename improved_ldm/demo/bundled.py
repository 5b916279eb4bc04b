"""The small pipeline that ships with the package, so that the demo works before any training."""

import json
from pathlib import Path
from typing import Any

import torch

from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import resolve

BUNDLED = "embedded:demo"
FOLDER = Path(resolve(BUNDLED))


def load_bundled() -> ImprovedLDMPipeline:
    """Load the bundled pipeline, which is stored in float16, in float32."""
    return ImprovedLDMPipeline.from_pretrained(FOLDER, dtype=torch.float32)


def first_prompt() -> str:
    """The prompt with which the page of the bundled pipeline starts."""
    return _read("opening.json")["prompt"]


def about_bundled() -> str:
    """A description of the bundled pipeline with its measured numbers."""
    trained, measured = _read("metrics.json"), _read("measured.json")["seen"]
    return (
        f"A small model: {trained['parameters'] / 1e6:.1f} M parameters, trained in {trained['seconds'] / 60:.0f} "
        f"minutes on one CPU core. It knows {_read('opening.json')['knows']}, and nothing else; "
        f"{measured['thing_right']:.0%} of its drawings show the thing that was asked for, and "
        f"{measured['style_right']:.0%} have the style."
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))
