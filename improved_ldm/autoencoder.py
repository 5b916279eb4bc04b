"""Encoding of images to latents and decoding, with a diffusers autoencoder."""

import warnings
from collections.abc import Callable
from weakref import WeakSet

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from improved_ldm.seeds import normal

_too_hot: WeakSet[ModelMixin] = WeakSet()  # autoencoders that have overflowed in the dtype of their weights


def _scale_and_shift(vae: ModelMixin) -> tuple[float, float]:
    return vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0


@torch.no_grad()
def encode_images(
    vae: ModelMixin,
    pixels: torch.Tensor,
    generator: torch.Generator | None = None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode images to latents that are scaled to about unit variance.

    Args:
        vae: An `AutoencoderKL`, `AutoencoderTiny` or `VQModel`, whose latents are quantised only when decoded. If half
            precision overflows, it computes in float32.
        pixels: (batch, 3, height, width) in [−1, 1].
        generator: Generator for the posterior sample, if the autoencoder has a posterior.
        seeds: (batch,) int64, one per image, used in place of the generator: an image's latents then do not depend on
            the others in its batch.

    Returns:
        (batch, latent_channels, height / factor, width / factor), in the dtype of the computation.
    """
    scale, shift = _scale_and_shift(vae)

    def encode():
        encoded = vae.encode(pixels.to(vae.device, vae.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        return encoded, encoded.latents if posterior is None else posterior.parameters

    encoded, _ = _in_range(vae, encode, pixels)
    return (_sampled(encoded, generator, seeds) - shift) * scale


def _sampled(encoded, generator: torch.Generator | None, seeds: torch.Tensor | None) -> torch.Tensor:
    """A sample from an autoencoder's posterior, or its latents if it has no posterior."""
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        return encoded.latents
    if seeds is None:
        return posterior.sample(generator)
    noise = normal(seeds.to(posterior.mean.device), posterior.mean.shape[1:])
    return posterior.mean + posterior.std * noise.to(posterior.mean.dtype)


@torch.no_grad()
def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to images (batch, 3, height, width) in about [−1, 1]; the inverse of `encode_images`."""
    scale, shift = _scale_and_shift(vae)

    def decode():
        pixels = vae.decode(latents.to(vae.dtype) / scale + shift).sample
        return pixels, pixels

    return _in_range(vae, decode, latents)[0]


def _in_range(vae: ModelMixin, compute: Callable[[], tuple], inputs: torch.Tensor) -> tuple:
    """Compute in the dtype of an autoencoder's weights or, if finite inputs overflow in it, in float32.

    Args:
        vae: Autoencoder; its dtype is restored.
        compute: Function that returns an output and the tensor that must be finite, in the autoencoder's dtype.
        inputs: Inputs of the computation.
    """
    dtype = vae.dtype
    if dtype not in (torch.float16, torch.bfloat16):
        return compute()
    if vae not in _too_hot:
        output = compute()
        if output[1].isfinite().all() or not inputs.isfinite().all():
            return output
        _too_hot.add(vae)
        name = str(dtype).removeprefix("torch.")
        warnings.warn(f"the autoencoder overflows in {name}; it computes in float32", stacklevel=4)
    nn.Module.to(vae, torch.float32)  # the `to` of diffusers warns at every cast
    try:
        return compute()
    finally:
        nn.Module.to(vae, dtype)


def spatial_factor(vae: ModelMixin) -> int:
    """Image pixels per latent pixel, along one side."""
    return 2 ** (len(vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels) - 1)
