"""The tiny pipeline that ships with the package, so that the demo works before any training."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPModel

from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import resolve

BUNDLED = "embedded:demo"
OPENING = "opening.json"  # the first prompt, and what the pipeline knows
FOLDER = Path(resolve(BUNDLED))


def load_bundled() -> ImprovedLDMPipeline:
    """Load the bundled denoiser with the embedded autoencoder and text encoder, in float32."""
    clip = resolve("embedded:clip")
    return ImprovedLDMPipeline.from_pretrained(
        FOLDER,
        vae=AutoencoderKL.from_pretrained(resolve("embedded:autoencoder")),
        text_encoder=CLIPModel.from_pretrained(clip).text_model.eval(),
        tokenizer=AutoTokenizer.from_pretrained(clip),
        dtype=torch.float32,
    )


def first_prompt() -> str:
    """The prompt with which the page of the bundled pipeline starts."""
    return _read(OPENING)["prompt"]


def about_bundled() -> str:
    """A description of the bundled pipeline with its measured numbers."""
    metrics = _read("metrics.json")
    return (
        f"A tiny model: {metrics['parameters'] / 1e6:.1f} M parameters, trained and measured in "
        f"{metrics['seconds'] / 60:.0f} minutes on one CPU core. It knows {_read(OPENING)['knows']}, and nothing "
        f"else; {metrics['obedience']['class_accuracy']:.0%} of its samples show what was asked for."
    )


def _read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))
