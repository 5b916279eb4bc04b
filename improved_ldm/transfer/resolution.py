"""Transfer of a trained denoiser or pipeline to another resolution: positions, noise and guidance."""

from typing import Any, Literal, TypeVar, get_args

import torch

from improved_ldm.conditioning.guidance import rescaled_guidance_scale
from improved_ldm.diffusion.fitting import trained_objective
from improved_ldm.diffusion.schedules import rescale_scheduler
from improved_ldm.lineage import lineage_record
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.positions import PositionTransfer
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.resolution import (
    Resolution,
    default_size_of,
    latent_side,
    resolution_of,
    side_of,
    sides_of,
    size_text,
)

NoiseTransfer = Literal["rescale", "keep"]
GuidanceTransfer = Literal["rescale", "keep"]
Model = TypeVar("Model", Denoiser, ImprovedLDMPipeline)


@torch.no_grad()
def transfer(
    model: Model,
    resolution: Resolution = 512,
    positions: PositionTransfer = "resample",
    noise: NoiseTransfer = "rescale",
    latent_factor: int = 8,
    guidance: GuidanceTransfer = "keep",
) -> Model:
    """A copy of a denoiser or pipeline for another resolution.

    A UNet has no positions, so only its noise is rescaled.

    Args:
        model: A pipeline, or only a denoiser, which has no noise schedule of its own.
        resolution: Pixels per side, or (height, width). The side of the square with as many pixels decides positions,
            noise and guidance.
        positions: `resample`, `interpolate`, `extrapolate` or `keep`, see `Denoiser.resized`.
        noise: `rescale` keeps the uncertainty at each timestep, `keep` keeps the schedule.
        latent_factor: Image pixels per latent pixel along one side, if `model` is a denoiser; a pipeline has its own.
        guidance: `rescale` changes the `default_guidance_scale` λ of a pipeline to 1 + s (λ − 1), where s is the new
            resolution divided by the old one; `keep` keeps it. A denoiser has no guidance.

    Returns:
        A denoiser or pipeline, like `model`, for the new resolution; if `model` has this resolution already, it is not
        changed. The `lineage` of a pipeline records the changes; its other components are the same objects.

    Raises:
        ValueError: If the resolution does not divide into patches, or an option is unknown.

    Source: Berrada et al., 2024; the rule for the guidance is our reading of its appendix, and the least certain part
        of the method: compare scales on your own data.
    """
    for name, value, known in (("noise", noise, NoiseTransfer), ("guidance", guidance, GuidanceTransfer)):
        if value not in get_args(known):
            raise ValueError(f"`{name}` is {value!r}; it must be one of {', '.join(get_args(known))}.")
    denoiser = model if isinstance(model, Denoiser) else model.denoiser
    check_positions(denoiser, positions, is_square=len({*sides_of(resolution)}) == 1)
    if isinstance(model, Denoiser):
        return model.resized(_sample_size(model, resolution, latent_factor), positions)

    old, new = (resolution_of(*size) for size in (model.default_size, sides_of(resolution)))
    denoiser = denoiser.resized(_sample_size(denoiser, resolution, model.vae_scale_factor), positions)
    scheduler, components, config = model.scheduler, dict(model.components), dict(model.config)
    config["default_size"] = default_size_of(new)
    if noise == "rescale":
        scheduler = rescale_scheduler(scheduler, side_of(old), side_of(new))
        config["objective"] = trained_objective(scheduler)
    if guidance == "rescale":
        scale = config["default_guidance_scale"]
        config["default_guidance_scale"] = rescaled_guidance_scale(scale, side_of(old), side_of(new))
    if old != new:
        change = resolution_change(old, new, positions, noise, guidance)
        config["lineage"] = [*(model.config.lineage or []), lineage_record(model.name_or_path, **change)]
    settings = {name: config[name] for name in config.keys() - components.keys() if not name.startswith("_")}
    return type(model)(**{**components, "scheduler": scheduler, denoiser.component: denoiser, **settings})


def check_positions(denoiser: Denoiser, positions: PositionTransfer, is_square: bool):
    """Raise a ValueError if positions are to be interpolated for samples whose positions are computed anyway."""
    if positions == "interpolate" and denoiser.computes_positions and not is_square:
        raise ValueError(
            f"`positions` is 'interpolate', but a {type(denoiser).__name__} has interpolated positions of square "
            "samples only; give 'resample'."
        )


def resolution_change(
    old: Resolution, new: Resolution, positions: PositionTransfer, noise: NoiseTransfer, guidance: GuidanceTransfer
) -> dict[str, Any]:
    """The lineage entry for a change of resolution in pixels; it has the guidance only if that is rescaled."""
    sizes = [size if isinstance(size, int) else list(size) for size in (old, new)]
    change = {"resolution": sizes, "positions": positions, "noise": noise}
    return change | {"guidance": guidance} if guidance == "rescale" else change


def _sample_size(denoiser: Denoiser, resolution: Resolution, latent_factor: int) -> int:
    multiple = latent_factor * denoiser.patch_size
    if any(side <= 0 or side % multiple for side in sides_of(resolution)):
        wanted = f"a positive multiple of {multiple} pixels" + ", or two of them" * (not isinstance(resolution, int))
        raise ValueError(f"`resolution` is {size_text(resolution)}; it must be {wanted}.")
    return latent_side(resolution, latent_factor, denoiser.patch_size)
