"""Autoencoders of both classes, trained for a few steps and read back."""

import json

import pytest
import torch
from diffusers import AutoModel

from improved_ldm.autoencoder import decode_latents, encode_images, latent_channels, spatial_factor
from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from tests.trainer.conftest import load_script

SMALL = {"block_out_channels": [8, 16, 16], "latent_channels": 4, "resolution": 16, "steps": 30, "batch_size": 8}


@pytest.mark.parametrize("kind", ["kl", "dc"])
def test_latents_have_unit_variance_and_pictures_get_clearer(few_images, tmp_path, kind):
    script = load_script("train_autoencoder")
    psnr = {}
    for steps in (1, 30):
        folder = tmp_path / str(steps)
        options = {**SMALL, "steps": steps, "norm_num_groups": 4, "min_crop": 0.9, "reduce_probability": 0}
        script.main(script.Config(output_dir=folder, data=str(few_images), type=kind, **options))
        psnr[steps] = json.loads((folder / "metrics.json").read_text())["whole"]["psnr"]
    assert psnr[30] > psnr[1] + 1

    vae = AutoModel.from_pretrained(str(folder))
    assert (spatial_factor(vae), latent_channels(vae)) == (4, 4)
    batch = next(iter(make_pass(open_rows(str(few_images)), ImageTransform(16), batch_size=100)))
    latents = encode_images(vae, pixel_values(batch["pixels"]), torch.Generator().manual_seed(0))
    assert latents.std((0, 2, 3)).sub(1).abs().max() < 0.2
    assert decode_latents(vae, latents).shape == (100, 3, 16, 16)
