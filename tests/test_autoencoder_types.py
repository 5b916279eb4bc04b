"""Every kind of image autoencoder of diffusers: encoded, decoded and saved."""

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderRAE,
    AutoencoderTiny,
    AutoModel,
    Flux2Pipeline,
    VQModel,
)

from improved_ldm.autoencoder import decode_latents, encode_images, latent_channels, spatial_factor

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
}
STATISTICS = {"latents_mean": [0.1, -0.2, 0.3, 0.4], "latents_std": [0.5, 1.0, 2.0, 4.0]}
VIDEO = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}


def flux2() -> AutoencoderKLFlux2:
    vae = AutoencoderKLFlux2(**BLOCKS, latent_channels=2)
    vae.bn.running_mean.copy_(torch.linspace(-1, 1, 8))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2, 8))
    return vae


# name → constructor, spatial factor, latent channels
KINDS = {
    "kl": (lambda: AutoencoderKL(**BLOCKS, scaling_factor=0.5, shift_factor=0.1), 2, 4),
    "kl with statistics": (lambda: AutoencoderKL(**BLOCKS, **STATISTICS, scaling_factor=0.5), 2, 4),
    "vq": (lambda: VQModel(**BLOCKS, latent_channels=3, num_vq_embeddings=8), 2, 3),
    "tiny": (
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        2,
        4,
    ),
    "dc": (
        lambda: AutoencoderDC(
            latent_channels=8,
            attention_head_dim=4,
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.4,
        ),
        2,
        8,
    ),
    "flux2": (flux2, 4, 8),
    "rae": (
        lambda: AutoencoderRAE(
            encoder_type="mae",
            encoder_hidden_size=64,
            encoder_patch_size=4,
            encoder_num_hidden_layers=1,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=1,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
            patch_size=8,
            encoder_input_size=16,
            scaling_factor=0.5,
        ),
        8,
        64,
    ),
    "qwen": (lambda: AutoencoderKLQwenImage(**VIDEO, **STATISTICS), 2, 4),
    "wan": (lambda: AutoencoderKLWan(**VIDEO, **STATISTICS, scale_factor_spatial=2), 2, 4),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str):
    torch.manual_seed(0)
    return KINDS[kind][0]().eval()


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@every_kind
def test_images_go_through_in_the_stated_shapes(kind, pixels):
    vae, (_, factor, channels) = make(kind), KINDS[kind]
    latents = encode_images(vae, pixels, seeds=torch.arange(2))
    assert (spatial_factor(vae), latent_channels(vae)) == (factor, channels)
    assert latents.shape == (2, channels, 32 // factor, 32 // factor)
    decoded = decode_latents(vae, latents)
    assert decoded.shape == pixels.shape and decoded.isfinite().all()
    alone = encode_images(vae, pixels[1:], seeds=torch.tensor([1]))
    torch.testing.assert_close(alone, latents[1:], rtol=1e-4, atol=1e-4)


def test_statistics_are_those_that_diffusers_applies(pixels):
    vae = make("kl with statistics")
    raw = vae.encode(pixels).latent_dist
    latents = encode_images(vae, pixels, torch.Generator().manual_seed(3))
    mean, deviation = (torch.tensor(STATISTICS[name])[:, None, None] for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents, (raw.sample(torch.Generator().manual_seed(3)) - mean) * 0.5 / deviation)
    # as the pipeline of SDXL decodes
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(latents * deviation / 0.5 + mean).sample)


def test_patched_latents_are_those_of_flux2(pixels):
    vae = make("flux2")
    raw = vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(3))
    mean = vae.bn.running_mean[:, None, None]
    deviation = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()[:, None, None]
    latents = encode_images(vae, pixels, torch.Generator().manual_seed(3))
    torch.testing.assert_close(latents, (Flux2Pipeline._patchify_latents(raw) - mean) / deviation)
    own = Flux2Pipeline._unpatchify_latents(latents * deviation + mean)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(own).sample)


def test_a_representation_autoencoder_reads_zero_to_one_and_one_size(pixels):
    vae = make("rae")
    latents = encode_images(vae, pixels)
    torch.testing.assert_close(latents, vae.encode((pixels + 1) / 2).latent)
    torch.testing.assert_close(decode_latents(vae, latents), vae.decode(latents).sample * 2 - 1)
    with pytest.raises(ValueError, match="the images are 16 × 16; this AutoencoderRAE has 32 × 32 pixels"):
        encode_images(vae, pixels[..., :16, :16])


@every_kind
def test_weights_come_back_from_a_folder(kind, pixels, tmp_path):
    vae = make(kind)
    vae.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(str(tmp_path)).eval()
    seeds = torch.arange(2)
    torch.testing.assert_close(encode_images(again, pixels, seeds=seeds), encode_images(vae, pixels, seeds=seeds))
