"""An autoencoder in half precision whose values exceed the range of float16."""

import warnings

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel

from improved_ldm.autoencoder import decode_latents, encode_images, spatial_factor


def autoencoder(dtype: torch.dtype, hot: float = 1.0) -> AutoencoderKL:
    """A tiny autoencoder; `hot` scales the activations between two layers, and the last layer scales them back."""
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=16).eval()
    with torch.no_grad():
        for before in (vae.decoder.conv_in, vae.encoder.conv_in):  # followed by a group norm
            before.weight.mul_(hot)
            before.bias.mul_(hot)
    return vae.to(dtype)


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def test_a_hot_autoencoder_decodes_in_float32_and_says_so_once(latents):
    vae, exact = autoencoder(torch.float16, 1e5), autoencoder(torch.float32, 1e5)
    with pytest.warns(UserWarning, match="the autoencoder overflows in float16; it computes in float32"):
        pixels = decode_latents(vae, latents)
    assert pixels.isfinite().all()
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float16}
    with warnings.catch_warnings(action="error"):
        torch.testing.assert_close(decode_latents(vae, latents), pixels, rtol=0, atol=0)
        assert decode_latents(exact, latents).isfinite().all()
    assert pixels.dtype == torch.float32


def test_a_hot_autoencoder_encodes_in_float32_with_the_same_draws(pixels):
    vae = autoencoder(torch.float16, 1e5)
    with pytest.warns(UserWarning, match="overflows in float16"):
        first = encode_images(vae, pixels, torch.Generator().manual_seed(2))
    assert first.isfinite().all() and first.dtype == torch.float32
    again = encode_images(vae, pixels, torch.Generator().manual_seed(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_latents_beyond_the_range_of_float16_are_decoded(latents):
    with pytest.warns(UserWarning, match="overflows in float16"):
        assert decode_latents(autoencoder(torch.float16), latents * 1e5).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_cool_autoencoder_computes_in_its_own_dtype(latents, pixels, dtype):
    vae = autoencoder(dtype)
    with warnings.catch_warnings(action="error"):
        decoded = decode_latents(vae, latents)
        assert decoded.dtype == encode_images(vae, pixels).dtype == dtype
    scaled = latents.to(dtype) / vae.config.scaling_factor
    torch.testing.assert_close(decoded, vae.decode(scaled).sample, rtol=0, atol=0)


def test_nan_latents_are_not_taken_for_heat(latents):
    latents[0, 0, 0, 0] = torch.nan
    vae = autoencoder(torch.float16)
    with warnings.catch_warnings(action="error"):
        assert decode_latents(vae, latents).isnan().any()


def test_an_autoencoder_without_a_posterior_is_encoded_as_well(pixels):
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1)}
    tiny = AutoencoderTiny(**blocks, decoder_block_out_channels=(8, 8), num_decoder_blocks=(1, 1))
    tiny.encoder.layers[0].weight.data.mul_(2e5)
    with pytest.warns(UserWarning, match="overflows in float16"):
        assert encode_images(tiny.half(), pixels).isfinite().all()


def test_a_vq_autoencoder_quantises_only_what_it_decodes(pixels):
    """As LDM-4's, whose latents have scale 1."""
    torch.manual_seed(0)
    vae = VQModel(
        latent_channels=3, num_vq_embeddings=8, norm_num_groups=4, block_out_channels=(8,), scaling_factor=1.0
    )
    latents = encode_images(vae, pixels)
    assert torch.equal(latents, vae.encode(pixels).latents)
    assert spatial_factor(vae) == 1 and len(latents.unique(dim=0)) == 2
    quantised = vae.quantize(latents)[0]
    torch.testing.assert_close(decode_latents(vae, latents), decode_latents(vae, quantised))
