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
    measured = _read("measured.json")
    seen, held_out = (measured[name]["thing_right"] for name in ("seen", "held_out"))
    parameters, knows = _read("metrics.json")["parameters"], _read("opening.json")["knows"]
    return (
        f"A small model: {parameters / 1e6:.1f} M parameters, trained on one CPU core. It knows {knows}, and nothing "
        f"else. Of the combinations that it was trained on, {seen:.0%} of the drawings show the thing that was asked "
        f"for; of new ones, {held_out:.0%}."
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))
