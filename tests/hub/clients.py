"""Functions that the tests run with the real clients: `clients.py FUNCTION ARGUMENTS`, with arguments as JSON."""

import hashlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, constants, create_repo, get_session, upload_folder
from huggingface_hub.utils import hf_raise_for_status

import improved_ldm  # noqa: F401  registers the pipeline
from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import RowStream, open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.exits import exit_on_error
from improved_ldm.hub import adapter_base


def draw(source: str, file: str, dtype: str = "float32", **options):
    """Save an image sampled with a fixed seed, and the lineage of the pipeline."""
    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=getattr(torch, dtype), **options)
    side, generator = pipeline.denoiser.config.sample_size, torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, side, side, generator=generator).to(pipeline.denoiser.dtype)
    condition = {"prompt": "a photo of a sneaker"} if pipeline.takes_text else {"class_labels": 1}
    image = pipeline(**condition, latents=latents, output_type="np").images
    np.savez(file, image=image, lineage=json.dumps(pipeline.config.lineage))


def follow(card: str, file: str):
    """Run the usage example of a card and save the image."""
    torch.set_num_threads(1)
    code = ModelCard(card).text.partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"image.png"', repr(file)), {})


def execute(code: str):
    """Run lines that load a model."""
    exec(code, {"DiffusionPipeline": DiffusionPipeline})


def check_base(folder: str, base: str, message: str):
    """Check a base that must be refused with a given message."""
    try:
        adapter_base.check_base(Path(folder), base)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("it was not refused")


def save_and_push(folder: str, to: str, name: str):
    """Load a folder and push it with the pipeline's own methods, in one call and in two."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.save_pretrained(to, push_to_hub=True, repo_id=name, commit_message="saved")
    pipeline.push_to_hub(f"{name}-too", commit_message="pushed")


def push_dataset(parquet: str, name: str):
    """Push captioned images as a dataset."""
    datasets.Dataset.from_parquet(parquet).push_to_hub(name)


def stream(name: str, file: str, num_workers: int = 0):
    """Save the result of one pass over a streamed dataset: captions in order, and a hash of all pixels."""
    captions, digest = [], hashlib.sha256()
    with exit_on_error("not read"):
        rows = open_rows(name)
        loader = make_pass(rows, ImageTransform(32), 8, num_workers=num_workers)
        for batch in loader:
            captions += batch["caption"]
            digest.update(batch["pixels"].numpy().tobytes())
    Path(file).write_text(json.dumps([captions, digest.hexdigest()]), encoding="utf-8")


def push_folder(folder: str, name: str):
    """Push files as a dataset."""
    create_repo(name, repo_type="dataset")
    upload_folder(repo_id=name, folder_path=folder, repo_type="dataset")


def read(name: str, file: str, **options):
    """Save the captions of a dataset and the numbers of skipped rows."""
    rows = open_rows(name, **options)
    stream = RowStream(rows, shuffle_window=0, repeat=False)
    captions = [row.caption for row in stream]
    record = {"captions": captions, "skipped": stream.state_dict()["skipped_rows"], "description": rows.description}
    Path(file).write_text(json.dumps(record), encoding="utf-8")


def validate(card: str):
    """Validate the front matter of a card on the double; `ModelCard.validate` ignores HF_ENDPOINT."""
    body = {"repoType": "model", "content": str(ModelCard.load(card))}
    response = get_session().post(f"{constants.ENDPOINT}/api/validate-yaml", json=body)
    hf_raise_for_status(response)


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
