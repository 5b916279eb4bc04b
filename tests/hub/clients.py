"""What the tests let the real clients do: `clients.py FUNCTION ARGUMENTS`, the arguments as JSON."""

import json
import sys

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

import improved_ldm  # noqa: F401  registers the pipeline


def draw(source: str, file: str, dtype: str = "float32", **options):
    """Keep what a pipeline draws for a class from a fixed seed, and its lineage."""
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=getattr(torch, dtype), **options)
    side, generator = pipeline.denoiser.config.sample_size, torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side, side, generator=generator).to(pipeline.denoiser.dtype)
    condition = {"prompt": "a photo of a sneaker"} if pipeline.takes_text else {"class_labels": 1}
    image = pipeline(**condition, latents=latents, output_type="np").images
    np.savez(file, image=image, lineage=json.dumps(pipeline.config.lineage))


def follow(card: str, file: str):
    """Do what the lines of use of a card say, and keep the image."""
    torch.set_num_threads(1)
    code = ModelCard(card).text.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"image.png"', repr(file)), {})


def push_dataset(parquet: str, name: str):
    """Push captioned images as a dataset."""
    datasets.Dataset.from_parquet(parquet).push_to_hub(name)


def validate(card: str):
    """Let the Hub look at the front matter of a card."""
    ModelCard.load(card).validate()


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
