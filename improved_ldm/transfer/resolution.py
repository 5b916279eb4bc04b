"""A trained denoiser or pipeline to another resolution: positions are resampled and the noise is rescaled."""

from typing import Literal, TypeVar, get_args

import torch

from improved_ldm.diffusion.schedules import rescale_scheduler
from improved_ldm.models.denoiser import Denoiser, PositionTransfer
from improved_ldm.pipeline import ImprovedLDMPipeline

NoiseTransfer = Literal["rescale", "keep"]
Model = TypeVar("Model", Denoiser, ImprovedLDMPipeline)


@torch.no_grad()
def transfer(
    model: Model,
    resolution: int = 512,
    positions: PositionTransfer = "resample",
    noise: NoiseTransfer = "rescale",
    latent_factor: int = 8,
) -> Model:
    """A copy of a denoiser or pipeline that goes on at another resolution.

    A UNet has no positions; there the noise alone is rescaled.

    Args:
        model: a pipeline, or a denoiser alone, which has no noise schedule of its own.
        resolution: pixels a side.
        positions: `resample`, `interpolate`, `extrapolate` or `keep`, as `Denoiser.resized` says.
        noise: `rescale` keeps the uncertainty of each timestep, `keep` the schedule.
        latent_factor: pixels a side of a latent pixel, where `model` is a denoiser; a pipeline knows its own.

    Returns:
        What was given, of the new resolution; for the resolution that it has, it is as it was. A pipeline's `lineage`
        says what was changed; its other components are the same objects.

    Raises:
        ValueError: for a resolution that does not divide into patches, or a word that is not one of those above.

    Source: Berrada et al., 2024.
    """
    if noise not in get_args(NoiseTransfer):
        raise ValueError(f"`noise` is {noise!r}; it must be one of {', '.join(get_args(NoiseTransfer))}.")
    if isinstance(model, Denoiser):
        return model.resized(_sample_size(model, resolution, latent_factor), positions)

    denoiser = model.denoiser.resized(_sample_size(model.denoiser, resolution, model.vae_scale_factor), positions)
    scheduler, components, config = model.scheduler, dict(model.components), dict(model.config)
    if noise == "rescale":
        scheduler = rescale_scheduler(scheduler, model.default_size, resolution)
    if resolution != model.default_size:
        change = {"resolution": [model.default_size, resolution], "positions": positions, "noise": noise}
        config["lineage"] = [
            *(model.config.lineage or []),
            {"source": model.name_or_path and str(model.name_or_path), **change},
        ]
    settings = {name: config[name] for name in config.keys() - components.keys() if not name.startswith("_")}
    return type(model)(**{**components, "scheduler": scheduler, denoiser.component: denoiser, **settings})


def _sample_size(denoiser: Denoiser, resolution: int, latent_factor: int) -> int:
    multiple = latent_factor * denoiser.patch_size
    if resolution <= 0 or resolution % multiple:
        raise ValueError(f"`resolution` is {resolution}; it must be a positive multiple of {multiple} pixels.")
    return resolution // latent_factor
