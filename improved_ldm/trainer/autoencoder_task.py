"""The training of an autoencoder: its loss, and what it keeps of images."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from improved_ldm.autoencoder import decode_latents, encode_images, spatial_factor
from improved_ldm.data.transforms import pixel_values
from improved_ldm.evaluation.reconstruction import hue_is_right, mean_saturation, psnr, reconstruction_strip
from improved_ldm.trainer.autoencoder_model import NoisyAutoencoder, build_autoencoder, normalise_latents
from improved_ldm.trainer.network_config import AutoencoderRunConfig
from improved_ldm.trainer.network_task import Images, Measured, NetworkTask
from improved_ldm.trainer.nonfinite import pass_nonfinite_to_gradient
from improved_ldm.trainer.randomness import ImageRandomness
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.task import Samples

STATISTICS_WEIGHT = 1e-3  # of the distance of an `AutoencoderDC`'s latents from mean 0 and variance 1
SHOWN = 8  # images in the picture of reconstructions


class AutoencoderTask(NetworkTask):
    """The training of a new autoencoder.

    Args:
        config: configuration of the run.
    """

    model: NoisyAutoencoder

    def __init__(self, config: AutoencoderRunConfig):
        vae = build_autoencoder(config.autoencoder).to(memory_format=torch.channels_last)
        size = config.transform.target_scale or config.transform.resolution
        super().__init__(NoisyAutoencoder(vae, config.autoencoder.latent_noise), size)
        self.config, self.factor = config.autoencoder, spatial_factor(vae)
        self.regularisation = self.config.kl_weight if self.config.type == "kl" else STATISTICS_WEIGHT

    def samples(self, batch: dict[str, Any]) -> Samples:
        return Samples({"pixels": batch["pixels"]})

    def loss(self, run: Run, model: nn.Module, batch: Samples, images: ImageRandomness) -> torch.Tensor:
        pixels = pixel_values(batch["pixels"]).to(memory_format=torch.channels_last)
        sides = (side // self.factor for side in pixels.shape[2:])
        noise = images.noise((self.config.latent_channels, *sides))
        mirrored = images.mirrored(self.config.latent_flip_probability)[:, None, None, None]
        with run.accelerator.autocast():
            decoded, distance = model(pixels, noise, mirrored)
        decoded, target = decoded.float(), torch.where(mirrored, pixels.flip(-1), pixels)
        reconstruction = F.l1_loss(decoded, target) + 2 * F.mse_loss(decoded, target)
        return pass_nonfinite_to_gradient(reconstruction + self.regularisation * distance)

    def random_choices(self, run: Run, images: ImageRandomness) -> dict[str, torch.Tensor]:
        return {"mirrored": images.mirrored(self.config.latent_flip_probability)}

    def measure(self, model: NoisyAutoencoder, images: Images) -> Measured:
        kept = _Kept()
        for batch in images():
            pixels = pixel_values(batch["pixels"])
            latents = encode_images(model.vae, pixels, seeds=batch["seed"])
            mirrored = encode_images(model.vae, pixels.flip(-1), seeds=batch["seed"])
            kept.add(pixels, decode_latents(model.vae, latents).cpu(), latents.cpu(), mirrored.cpu())
        return kept.measured()

    def finish(self, model: NoisyAutoencoder, images: Images):
        device = model.vae.device
        normalise_latents(model.vae, (pixel_values(batch["pixels"].to(device)) for batch in images()))

    def save(self, model: NoisyAutoencoder, folder: Path):
        model.vae.to("cpu", memory_format=torch.contiguous_format).save_pretrained(folder)

    def usage(self, folder: Path) -> str:
        return f"--autoencoder.pretrained {folder}"


class _Kept:
    """What an autoencoder keeps of images, added up batch by batch."""

    def __init__(self):
        self.by_image: dict[str, list[torch.Tensor]] = {}
        self.right = self.coloured = 0
        self.shown: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, pixels: torch.Tensor, decoded: torch.Tensor, latents: torch.Tensor, of_mirrored: torch.Tensor):
        """Add images, their reconstructions, their latents and those of the mirrored images, on the CPU."""
        values = {
            "psnr": psnr(pixels, decoded),
            "l1": (decoded.clamp(-1, 1) - pixels).abs().mean((1, 2, 3)),
            "saturation": mean_saturation(pixels),
            "saturation_of_reconstructions": mean_saturation(decoded),
            "latent_mean": latents.mean((1, 2, 3)),
            "latent_square": latents.square().mean((1, 2, 3)),
            "latent_max": latents.abs().amax((1, 2, 3)),
            "mirror_error": (of_mirrored.flip(-1) - latents).square().mean((1, 2, 3)),
        }
        for name, value in values.items():
            self.by_image.setdefault(name, []).append(value)
        right, coloured = hue_is_right(pixels, decoded)
        self.right, self.coloured = self.right + right, self.coloured + coloured
        missing = SHOWN - len(self.shown)
        self.shown += list(zip(pixels[:missing], decoded[:missing], strict=True)) if missing > 0 else []

    def measured(self) -> Measured:
        """The numbers over all images, and a picture of the first of them."""
        means = {name: torch.cat(values) for name, values in self.by_image.items()}
        largest = means.pop("latent_max").max().item()
        means = {name: value.double().mean().item() for name, value in means.items()}
        variance = means.pop("latent_square") - means.pop("latent_mean") ** 2
        values = {
            **{name: means[name] for name in ("psnr", "l1")},
            "hue_right": self.right / self.coloured if self.coloured else None,
            **{name: means[name] for name in ("saturation", "saturation_of_reconstructions")},
            "latent_std": variance**0.5,
            "latent_max": largest,
            "mirror_error": means["mirror_error"],  # relative to variance 1
        }
        hue = f", hue right in {values['hue_right']:.1%} of coloured pixels" if self.coloured else ""
        picture = reconstruction_strip(*map(torch.stack, zip(*self.shown, strict=True)))
        return Measured(values, f"PSNR {values['psnr']:.1f} dB{hue}", picture)
