"""Train a small convolutional autoencoder of diffusers, whose latents suit a diffusion model.

Usage: accelerate launch training/train_autoencoder.py --output_dir runs/autoencoder
"""

import itertools
import sys
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from diffusers import AutoencoderDC, AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from pydantic import Field
from torch import nn

from improved_ldm.autoencoder import decode_latents, encode_images
from improved_ldm.bounds import (
    BatchSize,
    Count,
    DecayRate,
    Depth,
    LocalPath,
    NotNegative,
    Pixels,
    Place,
    Positive,
    Probability,
    Seed,
    Share,
    Text,
    Width,
    Workers,
)
from improved_ldm.data.loader import make_loader, make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.exits import exit_on_error
from improved_ldm.naming import naming_keys
from improved_ldm.provenance import write_json
from improved_ldm.settings import Section, parse_config_or_exit
from improved_ldm.trainer.launcher import open_accelerator
from improved_ldm.trainer.nonfinite import check_weights
from improved_ldm.trainer.optimizer import WeightAverage

ARCHITECTURE = {"block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels"}
Autoencoder = AutoencoderKL | AutoencoderDC
STATISTICS_WEIGHT = 1e-3


class Config(Section):
    """Settings of a run. `data` is anything that `open_rows` takes; captions are not read."""

    output_dir: LocalPath
    """Folder to save the autoencoder in."""
    data: Place = "embedded:fashion-mnist"
    """Images: an embedded set, a Hub id, a file or a folder."""
    test_split: Text = "test"
    """Split of the set for the final measurements."""
    resolution: Pixels = 32
    """Side length of images, in pixels."""
    type: Literal["kl", "dc"] = "kl"
    """`kl` is `AutoencoderKL`, `dc` `AutoencoderDC`, which does not compute at full resolution and trains faster."""
    block_out_channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=10)] = (16, 32, 32)
    """Channels per block; every block except the last halves the resolution. `dc` does not use the first."""
    layers_per_block: Depth = 1
    """Residual layers per block."""
    norm_num_groups: Width = 8
    """Groups per normalization; `kl` only."""
    latent_channels: Width = 4
    """Channels of the latents."""
    kl_weight: NotNegative = 3e-4
    """`kl` only: weight of the KL divergence, which is a mean over latent values, in nats."""
    latent_noise: NotNegative = 0.05
    """`dc` only: standard deviation of the noise in the latents that are decoded; the latents have about 1."""
    latent_flip_probability: Probability = 0.5
    """Probability of decoding a mirrored latent to the mirrored image."""
    min_crop: Share = 0.6
    """Side length of the smallest crop, as a fraction of the largest square."""
    reduce_probability: Probability = 0.5
    """Probability that an image is scaled down before it is scaled up again."""
    min_original_size: Pixels = 7
    """Smallest shorter side of an image that is scaled down, in pixels."""
    batch_size: BatchSize = 32
    """Images per process and step."""
    steps: Count = 6000
    """Optimizer steps."""
    learning_rate: Positive = 2e-3
    """Peak learning rate."""
    ema_decay: DecayRate = 0.995
    """Decay per step of the averaged weights."""
    num_workers: Workers = 0
    """Processes that read and transform images."""
    seed: Seed = 0
    """Seed of weights, data order and noise."""


def build_autoencoder(config: Config) -> Autoencoder:
    """An autoencoder of the configured size with new weights."""
    if config.type == "dc":
        return _build_dc(config)
    blocks = len(config.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        **config.model_dump(include=ARCHITECTURE),
        sample_size=config.resolution,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        force_upcast=False,
    )


def _build_dc(config: Config) -> AutoencoderDC:
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


class AutoencoderLoss(nn.Module):
    """Reconstruction error of a batch, and what keeps its latents near mean 0 and variance 1.

    For an `AutoencoderKL` that is the KL divergence; for an `AutoencoderDC` the distance of the mean and the variance
    of each channel from 0 and 1, with a little noise in what is decoded. Some latents are mirrored together with their
    targets, so that mirrored images get mirrored latents.
    Source: Rombach et al. 2022 without the adversarial part; mirroring after Kouzelis et al. 2025 (EQ-VAE); the
    statistics of `AutoencoderDC` are our choice.
    """

    def __init__(self, vae: Autoencoder, config: Config):
        super().__init__()
        self.vae, self.config = vae, config

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # (batch, 3, height, width) in [-1, 1] → scalar
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < self.config.latent_flip_probability
        latents, regularisation = self._kl(pixels) if self.config.type == "kl" else self._statistics(pixels)
        decoded = self.vae.decode(torch.where(mirrored, latents.flip(-1), latents)).sample
        target = torch.where(mirrored, pixels.flip(-1), pixels)
        return F.l1_loss(decoded, target) + 2 * F.mse_loss(decoded, target) + regularisation

    def _kl(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(pixels).latent_dist
        latents = posterior.sample()
        return latents, self.config.kl_weight * posterior.kl().mean() / latents[0].numel()

    def _statistics(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = self.vae.encode(pixels).latent
        variance, mean = torch.var_mean(latents, (0, 2, 3))
        distance = (mean.square() + (variance - 1).square()).mean()
        return latents + self.config.latent_noise * torch.randn_like(latents), STATISTICS_WEIGHT * distance


def load_pixels(config: Config, split: str, transform: ImageTransform) -> torch.Tensor:
    """The first 2000 images of a split, each transformed: (images, 3, resolution, resolution)."""
    with naming_keys(source="data", split="test_split"):
        rows = open_rows(config.data, split, caption_column=None)
    return pixel_values(next(iter(make_pass(rows, transform, batch_size=2000)))["pixels"])


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pixels: torch.Tensor):
    """Give the latents of `pixels` mean 0, variance 1 and no correlation between channels.

    The linear map and its inverse go into the 1x1 convolutions around the latents. The posterior's variance becomes
    the same for all images. Source: our choice, because detail in a direction of small variance is lost in noise.
    """
    posterior, channels = vae.encode(pixels).latent_dist, vae.config.latent_channels
    latents = posterior.sample().transpose(0, 1).flatten(1)
    mean = latents.mean(1)
    variances, directions = torch.linalg.eigh(torch.cov(latents))
    whitening = directions @ torch.diag(variances.rsqrt()) @ directions.T
    noise = whitening.square() @ posterior.var.mean((0, 2, 3))

    before, after = vae.quant_conv, vae.post_quant_conv  # gives means and logarithms of variances; reads latents
    before.weight[:channels] = torch.einsum("ij,jkhw->ikhw", whitening, before.weight[:channels])
    before.bias[:channels] = whitening @ (before.bias[:channels] - mean)
    before.weight[channels:] = 0
    before.bias[channels:] = noise.log()
    after.bias.add_(after.weight[:, :, 0, 0] @ mean)
    after.weight.copy_(torch.einsum("ijhw,jk->ikhw", after.weight, torch.linalg.inv(whitening)))
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def scale_latents(vae: AutoencoderDC, pixels: torch.Tensor):
    """Give each channel of the latents of `pixels` variance 1, in the convolutions around the latents."""
    deviation = vae.encode(pixels).latent.std((0, 2, 3))
    after, before = vae.encoder.conv_out, vae.decoder.conv_in
    after.weight.div_(deviation[:, None, None, None])
    after.bias.div_(deviation)
    before.weight.mul_(deviation[:, None, None])


@torch.no_grad()
def evaluate(vae: Autoencoder, pixels: torch.Tensor) -> dict[str, float]:
    """PSNR (dB, mean over images), L1 (pixels in [-1, 1]), spread of the latents, and error of mirrored latents."""
    latents, of_mirrored = (encode_images(vae, view, torch.Generator()) for view in (pixels, pixels.flip(-1)))
    error = decode_latents(vae, latents).clamp(-1, 1) - pixels
    psnr = 10 * (4 / error.square().mean((1, 2, 3)).clamp(min=1e-10)).log10()
    return {
        "psnr": psnr.mean().item(),
        "l1": error.abs().mean().item(),
        "latent_std": latents.std().item(),
        "latent_max": latents.abs().max().item(),
        "mirror_error": (of_mirrored.flip(-1) - latents).square().mean().item(),  # relative to variance 1
    }


def main(config: Config):
    accelerator = open_accelerator()
    set_seed(config.seed)  # equal weights on all ranks
    vae = build_autoencoder(config).to(memory_format=torch.channels_last)
    objective = AutoencoderLoss(vae, config)
    optimizer = torch.optim.AdamW(objective.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=0)
    steps = config.steps * accelerator.num_processes  # the scheduler steps once per process
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    objective, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    ema, not_skipped = (
        WeightAverage(vae, config.ema_decay, warmup=True),
        torch.tensor(False, device=accelerator.device),
    )

    set_seed(config.seed, device_specific=True)  # different noise on each rank
    with naming_keys(source="data"):
        rows = open_rows(config.data, caption_column=None)
    accelerator.print(rows.description)
    fields = config.model_dump(include={"resolution", "min_crop", "reduce_probability", "min_original_size"})
    transform = ImageTransform(crop_policy="crop_then_resize", crop_position="random", flip_probability=0.5, **fields)
    rank = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, transform, config.batch_size, config.seed, num_workers=config.num_workers, **rank)
    for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
        pixels = pixel_values(batch["pixels"].to(accelerator.device, memory_format=torch.channels_last))
        loss = objective(pixels)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.update_parameters(vae, not_skipped)
        if step % 100 == 0:
            check_weights(objective, step)
            accelerator.print(f"step {step} of {config.steps}: loss {loss.item():.4f}")

    check_weights(objective, config.steps)
    if accelerator.is_main_process:
        vae.load_state_dict(ema.module.state_dict())
        vae = vae.to("cpu", memory_format=torch.contiguous_format).eval()
        whole = ImageTransform(config.resolution)
        scale = whiten_latents if config.type == "kl" else scale_latents
        scale(vae, load_pixels(config, "train", whole))
        vae.save_pretrained(config.output_dir)
        test = load_pixels(config, config.test_split, whole)
        changed = load_pixels(config, config.test_split, transform)
        views = {"whole": test, "cropped, reduced, mirrored": changed}
        metrics = {view: evaluate(vae, pixels) for view, pixels in views.items()}
        accelerator.print(metrics)
        write_json(config.output_dir / "metrics.json", metrics)


if __name__ == "__main__":
    with exit_on_error("not trained", "batch_size"):
        main(parse_config_or_exit(Config, sys.argv[1:]))
