"""Autoencoders with new weights, and the scale of their latents after training."""

from collections.abc import Iterable

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn

from improved_ldm.trainer.network_config import NewAutoencoderConfig

Autoencoder = AutoencoderKL | AutoencoderDC


def build_autoencoder(config: NewAutoencoderConfig) -> Autoencoder:
    """An autoencoder of the configured size with new weights.

    Raises:
        ValueError: if the sizes do not suit each other.
    """
    try:
        return (_build_dc if config.type == "dc" else _build_kl)(config)
    except (ArithmeticError, RuntimeError, ValueError) as error:
        raise ValueError(f"`autoencoder` has sizes that do not suit each other: {error}") from error


def _build_kl(config: NewAutoencoderConfig) -> AutoencoderKL:
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **config.model_dump(include={"block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels"}),
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def _build_dc(config: NewAutoencoderConfig) -> AutoencoderDC:
    """Convolutions only, and none at full resolution, where most of the time of an `AutoencoderKL` goes."""
    channels = config.block_out_channels
    layers = (0, *(config.layers_per_block,) * (len(channels) - 1))
    both = {"block_types": "ResBlock", "block_out_channels": channels, "layers_per_block": layers}
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        **{f"{half}_{key}": value for half in ("encoder", "decoder") for key, value in both.items()},
        **{f"{half}_qkv_multiscales": ((),) * len(channels) for half in ("encoder", "decoder")},
        encoder_out_shortcut=False,  # so that the last convolution can scale the latents
        decoder_in_shortcut=False,
    )


class NoisyAutoencoder(nn.Module):
    """An autoencoder as it is trained: with noise in its latents, of which some are mirrored.

    Mirrored images then get mirrored latents. Source: Rombach et al. 2022 without the adversarial part; mirroring
    after Kouzelis et al. 2025 (EQ-VAE); the statistics of `AutoencoderDC` are our choice.

    Args:
        vae: the autoencoder.
        latent_noise: standard deviation of the noise in the latents of an `AutoencoderDC`.
    """

    def __init__(self, vae: Autoencoder, latent_noise: float):
        super().__init__()
        self.vae, self.latent_noise = vae, latent_noise

    def forward(
        self, pixels: torch.Tensor, noise: torch.Tensor, mirrored: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode, change and decode images.

        Args:
            pixels: (batch, 3, height, width) in [-1, 1].
            noise: (batch, latent_channels, height / factor, width / factor) standard normal.
            mirrored: (batch, 1, 1, 1) bool, which latents are mirrored.

        Returns:
            The decoded latents, and the distance of the latents from mean 0 and variance 1, a scalar: for an
            `AutoencoderKL` the KL divergence per latent value, in nats; for an `AutoencoderDC` the squared distance of
            the mean and the variance of each channel.
        """
        encoded = self.vae.encode(pixels)
        posterior = getattr(encoded, "latent_dist", None)
        if posterior is None:
            variance, mean = torch.var_mean(encoded.latent, (0, 2, 3))
            latents, distance = encoded.latent + self.latent_noise * noise, mean.square() + (variance - 1).square()
        else:
            latents, distance = posterior.mean + posterior.std * noise, posterior.kl() / noise[0].numel()
        return self.vae.decode(torch.where(mirrored, latents.flip(-1), latents)).sample, distance.mean()


@torch.no_grad()
def normalise_latents(vae: Autoencoder, batches: Iterable[torch.Tensor]):
    """Give the latents of images mean 0 and variance 1, in the convolutions around the latents.

    Args:
        vae: the autoencoder; its weights are changed.
        batches: images, (batch, 3, height, width) in [-1, 1].
    """
    (_whiten if isinstance(vae, AutoencoderKL) else _scale)(vae, batches)


def _whiten(vae: AutoencoderKL, batches: Iterable[torch.Tensor]):
    """Remove the correlation between channels, too.

    The linear map and its inverse go into the 1x1 convolutions around the latents. The posterior's variance becomes
    the same for all images. Source: our choice, because detail in a direction of small variance is lost in noise.
    """
    channels, moments = vae.config.latent_channels, Moments()
    for pixels in batches:
        posterior = vae.encode(pixels).latent_dist
        moments.add(posterior.mean, posterior.var)
    mean, noise = moments.mean.float(), moments.mean_noise.float()
    variances, directions = torch.linalg.eigh(moments.covariance() + moments.mean_noise.diag())
    whitening = (directions @ torch.diag(variances.rsqrt()) @ directions.T).float()

    before, after = vae.quant_conv, vae.post_quant_conv  # gives means and logarithms of variances; reads latents
    before.weight[:channels] = torch.einsum("ij,jkhw->ikhw", whitening, before.weight[:channels])
    before.bias[:channels] = whitening @ (before.bias[:channels] - mean)
    before.weight[channels:] = 0
    before.bias[channels:] = (whitening.square() @ noise).log()
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.copy_(torch.einsum("ijhw,jk->ikhw", after.weight, torch.linalg.inv(whitening)))
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


def _scale(vae: AutoencoderDC, batches: Iterable[torch.Tensor]):
    """The means stay as training has left them, near 0: the decoder's padding could not follow a shift."""
    moments = Moments()
    for pixels in batches:
        moments.add(vae.encode(pixels).latent)
    deviation = moments.covariance().diag().sqrt().float()
    after, before = vae.encoder.conv_out, vae.decoder.conv_in
    after.weight.div_(deviation[:, None, None, None])
    after.bias.div_(deviation)
    before.weight.mul_(deviation[:, None, None])


class Moments:
    """Mean and covariance of the channels of latents, over all images and places, added up batch by batch."""

    def __init__(self):
        self.count, self.sum, self.products, self.noise = 0, 0.0, 0.0, 0.0

    def add(self, latents: torch.Tensor, noise: torch.Tensor | None = None):
        """Add latents, (batch, channels, height, width), and the variances of the noise in them, if there is any."""
        values = latents.double().transpose(0, 1).flatten(1)
        self.count += values.shape[1]
        self.sum, self.products = self.sum + values.sum(1), self.products + values @ values.T
        if noise is not None:
            self.noise = self.noise + noise.double().sum((0, 2, 3))

    @property
    def mean(self) -> torch.Tensor:
        """(channels,) float64."""
        return self.sum / self.count

    @property
    def mean_noise(self) -> torch.Tensor:
        """Mean variance of the noise, (channels,) float64."""
        return self.noise / self.count

    def covariance(self) -> torch.Tensor:
        """(channels, channels) float64, of the latents without the noise."""
        return self.products / self.count - self.mean[:, None] * self.mean
