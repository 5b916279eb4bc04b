"""Runs on the latents of different kinds of autoencoder."""

import pytest
from diffusers import DiffusionPipeline

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
