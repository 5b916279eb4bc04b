"""The five published recipes: their networks with our classes, their objectives, and their recorded numbers."""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from improved_ldm.convert import from_published
from improved_ldm.convert.diffusers_classes import unet_config
from improved_ldm.diffusion.objectives import Objective, make_objective
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.mdt import MDTDenoiser
from improved_ldm.models.mmdit import MMDiTDenoiser
from improved_ldm.models.pixart import PixArtDenoiser
from improved_ldm.models.unet import UNetDenoiser

FIXTURES = Path(__file__).parents[1] / "fixtures"
SIZES = {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "conditioning": "published"}


@dataclass(frozen=True)
class Sampler:
    """A published sampler in our terms.

    Args:
        guidance_scale: Guidance scale of the samples.
        guidance_options: Guidance options of the samples.
        sampler: Argument of `sampling_scheduler`.
        timestep_spacing: Argument of `sampling_scheduler`.
    """

    guidance_scale: float
    guidance_options: dict[str, Any] = field(default_factory=dict)
    sampler: str | None = None
    timestep_spacing: str | None = None


@dataclass(frozen=True)
class Source:
    """A published recipe in our terms.

    Args:
        network: Function that returns the published network, with recorded weights.
        function: Function that returns a denoiser whose prediction is the fixed function.
        objective: Arguments of `make_objective`.
        samplers: Samplers by their names in the recorded numbers.
    """

    network: Callable[[], Denoiser]
    function: Callable[[], Denoiser]
    objective: dict[str, Any]
    samplers: dict[str, Sampler]

    def make_objective(self) -> Objective:
        return make_objective(**self.objective)


@cache
def numbers(name: str) -> dict[str, torch.Tensor]:
    """What the published code gave, and its inputs."""
    return load_file(FIXTURES / "published" / f"{name}.safetensors")


def read_json(folder: str, file: str) -> dict[str, Any]:
    return json.loads((FIXTURES / folder / file).read_text(encoding="utf-8"))


def official(repository: str, folder: str) -> Denoiser:
    config = read_json(folder, "config.json")["constructor_kwargs"]
    return from_published(repository, load_file(FIXTURES / folder / "state_dict.safetensors"), config)


def ldm_unet() -> Denoiser:
    """The UNet of latent diffusion; its weights are drawn, from seeds that are the names in diffusers' class."""
    config = read_json("published", "ldm_unet.json")
    shapes = UNet2DConditionModel.from_config(config).state_dict()
    weights = {name: _drawn_weight(name, tensor.shape) for name, tensor in shapes.items()}
    return from_published("diffusers", weights, config)


def _drawn_weight(name: str, shape: torch.Size) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 1:
        return torch.from_numpy(values * np.float32(0.1) + np.float32(name.endswith(".weight")))
    return torch.from_numpy(values / np.float32(np.sqrt(np.prod(shape[1:]))))


def fixed_denoiser(
    family: type[Denoiser],
    predict: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    condition: Callable[..., torch.Tensor],
    **config,
) -> Denoiser:
    """A denoiser of the family whose prediction is a fixed function of latents, timestep and condition.

    Args:
        family: Class of the denoiser, which decides the conditions that it is given.
        predict: Function of (batch, channels, height, width) latents, the timestep, and (batch, channels, 1, 1).
        condition: Function of the denoiser and its conditions to one number per image, (batch,).
        config: Arguments of the class.
    """

    class FixedDenoiser(family):
        def forward(self, hidden_states, timestep, return_dict=True, **conditions):
            channel = torch.arange(hidden_states.shape[1]).view(-1, 1, 1)
            shift = condition(self, **conditions).view(-1, 1, 1, 1) + channel
            return (predict(hidden_states, timestep.float(), shift),)

    return FixedDenoiser(**config).eval()


def fixed_noise(latents, timestep, shift, level, variance=True):
    """Nearly the noise in normally distributed latents; `level` is about 1 − ᾱ_t."""
    noise = level(timestep).sqrt() * latents + 0.1 * torch.sin(2 * latents + shift)
    return torch.cat([noise, torch.cos(3 * latents + shift)], dim=1) if variance else noise


def linear_level(timestep):
    return 1 - torch.exp(-(1e-4 * timestep + 9.95e-6 * timestep**2))


def scaled_linear_level(timestep):
    low = 0.0015**0.5
    slope = (0.0195**0.5 - low) / 999
    return 1 - torch.exp(-((low + slope * timestep) ** 3 - low**3) / (3 * slope))


def fixed_velocity(latents, timestep, shift):
    """Nearly the velocity of a flow to normally distributed latents."""
    sigma = timestep / 1000
    return (2 * sigma - 1) / (sigma**2 + (1 - sigma) ** 2) * latents + 0.1 * torch.sin(2 * latents + shift)


def of_class(denoiser, class_labels, **_):
    return class_labels.float()


def of_masked_text(denoiser, encoder_hidden_states, encoder_attention_mask, **_):
    text = denoiser.trunk.text(encoder_hidden_states, len(encoder_hidden_states))
    return (text.mean(-1) * encoder_attention_mask).sum(1)


def of_text(denoiser, encoder_hidden_states, pooled_projections=None, **_):
    pooled = 0 if pooled_projections is None else pooled_projections.mean(-1)
    return encoder_hidden_states.mean(-1).sum(1) + pooled


def fixed_pixart() -> Denoiser:
    sizes = SIZES | {"out_channels": 8, "text_dim": 32, "published": {"num_null_tokens": 12}}
    predict = partial(fixed_noise, level=linear_level)
    denoiser = fixed_denoiser(PixArtDenoiser, predict, of_masked_text, **sizes)
    weights = load_file(FIXTURES / "official_pixart" / "state_dict.safetensors")
    denoiser.trunk.null_text.copy_(weights["y_embedder.y_embedding"])
    return denoiser


def fixed_class_denoiser(family: type[Denoiser], **config) -> Denoiser:
    sizes = SIZES | {"out_channels": 8, "num_classes": 10} | config
    return fixed_denoiser(family, partial(fixed_noise, level=linear_level), of_class, **sizes)


def fixed_mmdit() -> Denoiser:
    return fixed_denoiser(MMDiTDenoiser, fixed_velocity, of_text, **SIZES, text_dim=32, pooled_dim=24)


def fixed_unet() -> Denoiser:
    config = unet_config(read_json("published", "ldm_unet.json"), {})
    predict = partial(fixed_noise, level=scaled_linear_level, variance=False)
    return fixed_denoiser(UNetDenoiser, predict, of_text, **config, conditioning="published")


LINEAR = {"prediction": "epsilon", "beta_schedule": "linear", "learned_variance": True}
THREE_CHANNELS = {"channels": 3}
POWER_COSINE = {"channels": 3, "schedule": "power_cosine", "power": 4.0}
SOURCES = {
    "dit": Source(
        partial(official, "facebookresearch/DiT", "official_dit"),
        partial(fixed_class_denoiser, DiTDenoiser),
        LINEAR,
        {"ddpm": Sampler(1.5, THREE_CHANNELS)},
    ),
    "mdt": Source(
        partial(official, "sail-sg/MDT", "official_mdtv2"),
        partial(fixed_class_denoiser, MDTDenoiser, num_layers=4, num_decoder_layers=2),
        LINEAR | {"loss_weighting": "min_snr"},
        {"ddpm": Sampler(3.8, POWER_COSINE)},
    ),
    "pixart": Source(
        partial(official, "PixArt-alpha/PixArt-alpha", "official_pixart"),
        fixed_pixart,
        LINEAR,
        {
            "ddpm": Sampler(4.5, THREE_CHANNELS),
            "dpm_solver": Sampler(4.5, sampler="dpm_solver"),
            "dpm_solver_whole": Sampler(4.5, sampler="dpm_solver"),  # the published one at whole timesteps
        },
    ),
    "sd3": Source(
        partial(official, "Stability-AI/sd3", "official_sd3_mmdit_pure"),
        fixed_mmdit,
        {"prediction": "flow", "shift": 3.0},
        {"euler": Sampler(4.5), "dpmpp_2m": Sampler(4.5, sampler="dpm_solver")},
    ),
    "ldm": Source(
        ldm_unet,
        fixed_unet,
        {"prediction": "epsilon", "beta_start": 0.0015, "beta_end": 0.0195},
        {"ddim": Sampler(3.0, sampler="ddim", timestep_spacing="leading")},
    ),
}
