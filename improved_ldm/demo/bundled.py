"""The tiny pipeline that ships with the package, so that the demo works before any training."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPModel

from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import resolve

BUNDLED = "embedded:demo"
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


def about_bundled() -> str:
    """A description of the bundled pipeline with its measured numbers."""
    metrics = json.loads((FOLDER / "metrics.json").read_text(encoding="utf-8"))
    return (
        f"A tiny model: {metrics['parameters'] / 1e6:.1f} M parameters, trained and measured in "
        f"{metrics['seconds'] / 60:.0f} minutes on one CPU core. It knows small grey pictures of T-shirts, "
        "trousers, pullovers, dresses, coats, sandals, shirts, sneakers, bags and ankle boots, and nothing else; "
        f"{metrics['obedience']['class_accuracy']:.0%} of its samples show what was asked for."
    )
