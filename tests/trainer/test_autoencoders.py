"""Runs on the latents of different kinds of autoencoder."""

import pytest
import torch
from diffusers import DiffusionPipeline

from improved_ldm.data.cache import LatentCache
from improved_ldm.trainer.components import load_autoencoder, load_text_encoder
from improved_ldm.trainer.config import AutoencoderConfig, TextConfig
from tests.test_autoencoder_types import make
from tests.trainer.conftest import load_script

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("kl with statistics", "dc", "rae", "qwen")]


@pytest.mark.parametrize("kind", ["flux2", *SLOW])
def test_a_run_trains_and_its_pipeline_samples(kind, arguments, tmp_path):
    make(kind).save_pretrained(tmp_path / "vae")
    options = {"autoencoder.pretrained": tmp_path / "vae", "training.steps": 2}
    load_script("train_t2i").main(arguments(**options))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.vae) is type(make(kind))
    assert pipeline("a coat", num_inference_steps=1).images[0].size == (32, 32)


def test_the_precision_of_encoding_leaves_the_saved_weights_exact(arguments, tmp_path):
    options = {"autoencoder.dtype": "bf16", "text.dtype": "bf16", "training.steps": 2}
    load_script("train_t2i").main(arguments(**options))
    (folder,) = (tmp_path / "run" / "cache").iterdir()
    rows = LatentCache(folder).rows(torch.arange(8)).to("cpu")
    for values in (rows.latents, rows.text.hidden_states):
        assert torch.equal(values, values.bfloat16().float())  # the cache keeps more bits
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    embedded = load_autoencoder(AutoencoderConfig()), load_text_encoder(TextConfig(max_tokens=16))[1]
    for saved, source in zip((pipeline.vae, pipeline.text_encoder), embedded, strict=True):
        assert saved.dtype == torch.float32
        assert all(map(torch.equal, saved.parameters(), source.parameters()))
