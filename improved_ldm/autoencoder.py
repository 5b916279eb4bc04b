"""Encoding of images to latents and decoding, with a diffusers autoencoder."""

import copy
import warnings
from collections.abc import Callable
from weakref import WeakSet

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from improved_ldm.seeds import normal

_too_hot: WeakSet[ModelMixin] = WeakSet()  # autoencoders that have overflowed in the dtype of their weights


def _shift_and_scale(vae: ModelMixin, like: torch.Tensor) -> tuple:
    """What makes (latents − shift) · scale of about unit variance: numbers, or tensors (channels, 1, 1)."""
    config = vae.config
    if _is_representation(vae):  # it normalises its latents itself
        return 0.0, 1.0
    if _patch(vae) > 1:
        mean, deviation = vae.bn.running_mean, (vae.bn.running_var + config.batch_norm_eps).sqrt()
    elif config.get("latents_mean") is not None:
        mean, deviation = torch.tensor(config.latents_mean), torch.tensor(config.latents_std)
        deviation = deviation / (config.get("scaling_factor") or 1.0)
    else:
        return config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
    return tuple(value[:, None, None].to(like.device, like.dtype) for value in (mean, 1 / deviation))


def _is_representation(vae: ModelMixin) -> bool:
    """Whether an autoencoder is an `AutoencoderRAE`, which reads and writes images of one size in [0, 1]."""
    return vae.config.get("encoder_input_size") is not None


def _has_frames(vae: ModelMixin) -> bool:
    """Whether an autoencoder reads videos; an image is a video of one frame."""
    return vae.config.get("temperal_downsample") is not None  # diffusers' spelling


def _patch(vae: ModelMixin) -> int:
    """Side of the patches of latent pixels that `AutoencoderKLFlux2` joins into channels."""
    if vae.config.get("batch_norm_eps") is None:
        return 1
    height, width = vae.config.patch_size
    if height != width:
        raise ValueError(f"`patch_size` of the autoencoder is {height} × {width}; it must be square.")
    return height


@torch.no_grad()
def encode_images(
    vae: ModelMixin,
    pixels: torch.Tensor,
    generator: torch.Generator | None = None,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Encode images to latents that are scaled to about unit variance.

    Args:
        vae: An autoencoder for images of diffusers: `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderDC`,
            `AutoencoderRAE`, `AutoencoderKLFlux2` and similar, or `VQModel`, whose latents are quantised only when
            decoded. If half precision overflows, it computes in float32.
        pixels: (batch, 3, height, width) in [−1, 1].
        generator: Generator for the posterior sample, if the autoencoder has a posterior.
        seeds: (batch,) int64, one per image, used in place of the generator: an image's latents then do not depend on
            the others in its batch.

    Returns:
        (batch, latent_channels, height / factor, width / factor), in the dtype of the computation; with a posterior
        it is a sample of it.

    Raises:
        ValueError: If the autoencoder has one size of images, and these have another.
    """
    check_image_size(vae, tuple(pixels.shape[2:]))

    def encode():
        images = pixels.to(vae.device, vae.dtype)
        images = (images + 1) / 2 if _is_representation(vae) else images
        encoded = vae.encode(images[:, :, None] if _has_frames(vae) else images)
        posterior = getattr(encoded, "latent_dist", None)
        return encoded, _own_latents(encoded) if posterior is None else posterior.parameters

    encoded, _ = _in_range(vae, encode, pixels)
    latents = _sampled(encoded, generator, seeds)
    latents = latents[:, :, 0] if _has_frames(vae) else latents
    latents = F.pixel_unshuffle(latents, _patch(vae)) if _patch(vae) > 1 else latents
    shift, scale = _shift_and_scale(vae, latents)
    return (latents - shift) * scale


def _own_latents(encoded) -> torch.Tensor:
    """The latents of an autoencoder without a posterior, by either of diffusers' names."""
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent


def _sampled(encoded, generator: torch.Generator | None, seeds: torch.Tensor | None) -> torch.Tensor:
    """A sample from an autoencoder's posterior, or its latents if it has no posterior."""
    posterior = getattr(encoded, "latent_dist", None)
    if posterior is None:
        return _own_latents(encoded)
    if seeds is None:
        return posterior.sample(generator)
    noise = normal(seeds.to(posterior.mean.device), posterior.mean.shape[1:])
    return posterior.mean + posterior.std * noise.to(posterior.mean.dtype)


@torch.no_grad()
def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Decode latents to images (batch, 3, height, width) in about [−1, 1]; the inverse of `encode_images`."""

    def decode():
        normal = latents.to(vae.dtype)
        shift, scale = _shift_and_scale(vae, normal)
        own = normal / scale + shift
        own = F.pixel_shuffle(own, _patch(vae)) if _patch(vae) > 1 else own
        pixels = vae.decode(own[:, :, None] if _has_frames(vae) else own).sample
        pixels = pixels[:, :, 0] if _has_frames(vae) else pixels
        pixels = pixels * 2 - 1 if _is_representation(vae) else pixels
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
    """Image pixels per pixel of the latents of `encode_images`, along one side."""
    config = vae.config
    if _is_representation(vae):
        return config.patch_size
    ratio = config.get("spatial_compression_ratio") or vars(vae).get("spatial_compression_ratio")
    blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    return (ratio or 2 ** (len(blocks) - 1)) * _patch(vae)


def latent_channels(vae: ModelMixin) -> int:
    """Channels of the latents of `encode_images`."""
    config = vae.config
    if _is_representation(vae):
        return config.encoder_hidden_size
    return (config.get("latent_channels") or config.z_dim) * _patch(vae) ** 2


def check_image_size(vae: ModelMixin, size: tuple[int, int]):
    """Raise a ValueError if an autoencoder has one size of images and these, (height, width) in pixels, differ."""
    if not _is_representation(vae):
        return
    side = vae.config.encoder_input_size // vae.config.encoder_patch_size * vae.config.patch_size
    if size != (side, side):
        raise ValueError(
            f"the images are {size[0]} × {size[1]}; this {type(vae).__name__} has {side} × {side} pixels."
        )


def encoding_copy(vae: ModelMixin, dtype: torch.dtype) -> ModelMixin:
    """A copy of an autoencoder that encodes in a dtype, so that the weights that a pipeline saves and uses stay exact.

    On a GPU it has the channels last, which its convolutions prefer.
    """
    layout = torch.channels_last if vae.device.type == "cuda" and not _has_frames(vae) else torch.preserve_format
    return nn.Module.to(copy.deepcopy(vae), dtype=dtype, memory_format=layout)
