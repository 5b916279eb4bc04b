"""Images to latents and back, through a diffusers autoencoder."""

import torch
from diffusers.models.modeling_utils import ModelMixin


def _scale_and_shift(vae: ModelMixin) -> tuple[float, float]:
    return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0


@torch.no_grad()
def encode_images(vae: ModelMixin, pixels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Latents of images, scaled to about unit variance.

    Args:
        vae: an `AutoencoderKL` or `AutoencoderTiny`.
        pixels: (batch, 3, height, width) in [−1, 1].
        generator: source of the posterior sample, for autoencoders that have one.

    Returns:
        (batch, latent_channels, height / factor, width / factor).
    """
    scale, shift = _scale_and_shift(vae)
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = encoded.latent_dist.sample(generator) if hasattr(encoded, "latent_dist") else encoded.latents
    return (latents - shift) * scale


@torch.no_grad()
def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Images of latents: the inverse of `encode_images`, (batch, 3, height, width) in about [−1, 1]."""
    scale, shift = _scale_and_shift(vae)
    return vae.decode(latents.to(vae.dtype) / scale + shift).sample


def spatial_factor(vae: ModelMixin) -> int:
    """Image pixels a latent pixel, along one side."""
    return 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)
