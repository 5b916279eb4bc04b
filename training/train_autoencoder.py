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
from diffusers.optimization import get_cosine_schedule_with_warmup
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
    kl_weight: float = 3e-4  # of the mean divergence of a latent number, in nats
    latent_flip_probability: float = 0.5  # of decoding a mirrored latent to the mirrored image
    min_crop: float = 0.6  # smallest crop, fraction of the image
    reduce_probability: float = 0.5  # of reducing the image to fewer pixels before it is enlarged again
    min_original_size: int = 7  # shorter side that a reduced image keeps at least, pixels
    batch_size: int = 32  # of one process
    steps: int = 6000
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


def load_pixels(config: Config, split: str, transform: ImageTransform) -> torch.Tensor:
    """The first 2000 images of a split, each transformed: (images, 3, resolution, resolution)."""
    rows = open_rows(config.data, split, caption_column=None)
    return next(iter(make_loader(rows, transform, batch_size=2000, shuffle_window=0, repeat=False)))["pixels"]


@torch.no_grad()
def whiten_latents(vae: AutoencoderKL, pixels: torch.Tensor):
    """Give the latents of `pixels` mean 0, variance 1 and no correlation between channels.

    The linear map and its inverse go into the 1x1 convolutions around the latents. The posterior's variance becomes
    the same for all images. Source: our choice; detail that hides in a direction of small variance is lost in noise.
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
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    objective, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    ema = EMAModel(vae.parameters(), decay=config.ema_decay)

    set_seed(config.seed, device_specific=True)  # unequal noise
    rows = open_rows(config.data, caption_column=None)
    fields = config.model_dump(include={"resolution", "min_crop", "reduce_probability", "min_original_size"})
    transform = ImageTransform(crop_policy="crop_then_resize", crop_position="random", flip_probability=0.5, **fields)
    rank = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, transform, config.batch_size, config.seed, num_workers=config.num_workers, **rank)
    for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
        pixels = batch["pixels"].to(accelerator.device, memory_format=torch.channels_last)
        loss = objective(pixels)
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
        whiten_latents(vae, load_pixels(config, "train", whole))
        vae.save_pretrained(config.output_dir)
        test = load_pixels(config, config.test_split, whole)
        changed = load_pixels(config, config.test_split, transform)
        views = {"whole": test, "cropped, reduced, mirrored": changed}
        metrics = {view: evaluate(vae, pixels) for view, pixels in views.items()}
        accelerator.print(metrics)
        (config.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_config_or_exit(Config, sys.argv[1:]))
