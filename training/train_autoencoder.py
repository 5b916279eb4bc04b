"""Train a small convolutional autoencoder (diffusers' `AutoencoderKL`) whose latents suit a diffusion model.

Usage: accelerate launch training/train_autoencoder.py --output_dir runs/autoencoder
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from pydantic import BaseModel, ConfigDict
from torch import nn

from improved_ldm.autoencoder import decode_latents, encode_images
from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.trainer.config import parse_config_or_exit

ARCHITECTURE = {"block_out_channels", "layers_per_block", "norm_num_groups", "latent_channels"}


class Config(BaseModel):
    """What a run is made of. `data` is anything that `open_rows` takes; captions are not read."""

    model_config = ConfigDict(extra="forbid")

    output_dir: Path
    data: str = "embedded:fashion-mnist"
    test_split: str = "test"
    resolution: int = 32  # pixels
    block_out_channels: tuple[int, ...] = (16, 32, 32)  # every block but the last halves the resolution
    layers_per_block: int = 1
    norm_num_groups: int = 8
    latent_channels: int = 4
    kl_weight: float = 3e-3  # of the mean divergence of a latent number, in nats
    latent_flip_probability: float = 0.5  # of decoding a mirrored latent to the mirrored image
    tint_probability: float = 0.2  # of drawing the image between two random colours, so that grey data teaches colour
    min_crop: float = 0.6  # smallest crop, fraction of the image
    reduce_probability: float = 0.5  # of reducing the image to fewer pixels before it is enlarged again
    min_original_size: int = 7  # shorter side that a reduced image keeps at least, pixels
    batch_size: int = 32  # of one process
    steps: int = 7000
    learning_rate: float = 2e-3
    ema_decay: float = 0.995
    num_workers: int = 0
    seed: int = 0


def build_autoencoder(config: Config) -> AutoencoderKL:
    """An autoencoder of the configured size with fresh weights."""
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


class AutoencoderLoss(nn.Module):
    """Reconstruction error and KL divergence of a batch.

    Mirroring some latents and their targets alike makes the latent of a mirrored image the mirrored latent.
    Source: Rombach et al. 2022 without the adversarial part; mirroring after Kouzelis et al. 2025 (EQ-VAE).
    """

    def __init__(self, vae: AutoencoderKL, kl_weight: float, latent_flip_probability: float):
        super().__init__()
        self.vae, self.kl_weight, self.latent_flip_probability = vae, kl_weight, latent_flip_probability

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        # (batch, 3, height, width) in [-1, 1] → scalar
        posterior = self.vae.encode(pixels).latent_dist
        mirrored = torch.rand(len(pixels), 1, 1, 1, device=pixels.device) < self.latent_flip_probability
        latents = posterior.sample()
        decoded = self.vae.decode(torch.where(mirrored, latents.flip(-1), latents)).sample
        target = torch.where(mirrored, pixels.flip(-1), pixels)
        reconstruction = F.l1_loss(decoded, target) + 2 * F.mse_loss(decoded, target)
        return reconstruction + self.kl_weight * posterior.kl().mean() / latents[0].numel()


def tint(pixels: torch.Tensor, probability: float) -> torch.Tensor:
    """Draw some images between two random colours instead of black and white; inversions are among them."""
    dark, bright = torch.rand(2, len(pixels), 3, 1, 1) * 2 - 1
    tinted = torch.lerp(dark, bright, (pixels + 1) / 2)
    return torch.where(torch.rand(len(pixels), 1, 1, 1) < probability, tinted, pixels)


def load_pixels(config: Config, split: str, transform: ImageTransform) -> torch.Tensor:
    """The first 2000 images of a split, each transformed: (images, 3, resolution, resolution)."""
    rows = open_rows(config.data, split, caption_column=None)
    return next(iter(make_loader(rows, transform, batch_size=2000, shuffle_window=0, repeat=False)))["pixels"]


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, pixels: torch.Tensor):
    """Give the latents of `pixels` mean 0 and variance 1 in every channel, through the convolutions around them."""
    latents = vae.encode(pixels).latent_dist.sample()
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    before, after = vae.quant_conv, vae.post_quant_conv
    before.bias.sub_(torch.cat([mean, 2 * std.log()]))  # the encoder gives means and logarithms of variances
    before.bias[: len(mean)] /= std
    before.weight[: len(mean)] /= std[:, None, None, None]
    after.bias.add_(after.weight.flatten(1) @ mean)
    after.weight.mul_(std[:, None, None])
    vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)


@torch.no_grad()
def evaluate(vae: AutoencoderKL, pixels: torch.Tensor) -> dict[str, float]:
    """PSNR (dB, mean over images), L1 (pixels in [-1, 1]), spread of the latents, and error of mirrored latents."""
    latents, of_mirrored = (encode_images(vae, view, torch.Generator()) for view in (pixels, pixels.flip(-1)))
    error = decode_latents(vae, latents).clamp(-1, 1) - pixels
    psnr = 10 * (4 / error.square().mean((1, 2, 3)).clamp(min=1e-10)).log10()
    return {
        "psnr": psnr.mean().item(),
        "l1": error.abs().mean().item(),
        "latent_std": latents.std().item(),
        "latent_max": latents.abs().max().item(),
        "mirror_error": (of_mirrored.flip(-1) - latents).square().mean().item(),  # of variance 1
    }


def main(config: Config):
    accelerator = Accelerator()
    set_seed(config.seed)  # equal weights on all ranks
    vae = build_autoencoder(config).to(memory_format=torch.channels_last)
    objective = AutoencoderLoss(vae, config.kl_weight, config.latent_flip_probability)
    optimizer = torch.optim.AdamW(objective.parameters(), config.learning_rate, (0.9, 0.99), weight_decay=0)
    steps = config.steps * accelerator.num_processes  # the scheduler steps once a process
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, pct_start=0.05)
    objective, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    ema = EMAModel(vae.parameters(), decay=config.ema_decay)

    set_seed(config.seed, device_specific=True)  # unequal noise
    rows = open_rows(config.data, caption_column=None)
    crops = ("crop_then_resize", "random", config.min_crop)
    reductions = (config.reduce_probability, config.min_original_size)
    transform = ImageTransform(config.resolution, *crops, 0.5, *reductions)
    rank = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, transform, config.batch_size, config.seed, num_workers=config.num_workers, **rank)
    for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
        pixels = tint(batch["pixels"], config.tint_probability).to(accelerator.device)
        loss = objective(pixels.contiguous(memory_format=torch.channels_last))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if step % 100 == 0:
            accelerator.print(f"step {step} of {config.steps}: loss {loss.item():.4f}")

    if accelerator.is_main_process:
        ema.copy_to(vae.parameters())
        vae = vae.to("cpu", memory_format=torch.contiguous_format).eval()
        whole = ImageTransform(config.resolution)
        standardise_latents(vae, load_pixels(config, "train", whole))
        vae.save_pretrained(config.output_dir)
        test = load_pixels(config, config.test_split, whole)
        changed = load_pixels(config, config.test_split, transform)
        views = {"whole": test, "cropped, reduced, mirrored": changed, "tinted": tint(test, 1.0)}
        metrics = {view: evaluate(vae, pixels) for view, pixels in views.items()}
        accelerator.print(metrics)
        (config.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_config_or_exit(Config, sys.argv[1:]))
