"""The noise schedules for training and sampling, as diffusers schedulers, and their rescaling."""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

NUM_TRAIN_TIMESTEPS = 1000


def variance_preserving_scheduler(prediction_type: str) -> DDIMScheduler:
    """DDIM on the `scaled_linear` betas of latent diffusion, 0.00085 to 0.012.

    Args:
        prediction_type: `epsilon` or `v_prediction`.

    Source: Berrada et al., 2024; trailing timestep spacing, which starts at the noisiest step, is our choice.
    """
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing",
    )


def flow_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """Euler steps along straight flow paths.

    Args:
        shift: Shift towards higher noise levels: σ' = shift · σ / (1 + (shift − 1) σ).

    Source: Stable Diffusion 3.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)


def scaled_input(scheduler: SchedulerMixin, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """The denoiser's input for a sample; some schedulers keep samples at another scale."""
    return scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample


def step_kwargs(scheduler: SchedulerMixin, generator: Any) -> dict[str, Any]:
    """The generator as an argument of `step`, for schedulers that add random noise in a step."""
    return {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}


def rescale_scheduler(scheduler: SchedulerMixin, from_resolution: float, to_resolution: float) -> SchedulerMixin:
    """A scheduler with which images at a new resolution are as uncertain at each timestep as at the old one.

    SNR'(t) = SNR(t) · (s / s')², so ᾱ' = s² ᾱ / (s'² + ᾱ (s² − s'²)); for a flow with noise level σ,
    σ' = (s' / s) σ / (1 + (s' / s − 1) σ), which is a shift. The schedule is written into the config, as
    `trained_betas` or `shift`, so that every scheduler made from it keeps it.

    Args:
        scheduler: Any scheduler of diffusers with betas, or a flow with a shift; it is not changed.
        from_resolution: S, pixels per side that the scheduler was made for.
        to_resolution: S', pixels per side.

    Returns:
        A scheduler of the same class; the given one if the resolutions are equal.

    Raises:
        ValueError: If a resolution is not positive, or the scheduler has neither betas nor a shift.

    Source: Berrada et al., 2024; the rule is our reading.
    """
    if not (from_resolution > 0 and to_resolution > 0):
        raise ValueError(f"`from_resolution` {from_resolution} and `to_resolution` {to_resolution} must be positive.")
    if from_resolution == to_resolution:
        return scheduler
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"this {name} shifts with the size of each image (`use_dynamic_shifting`); it needs no rescaling."
        )
    for shift in ("shift", "flow_shift"):
        if shift in config and (shift == "shift" or config.get("use_flow_sigmas")):
            return scheduler.from_config(config, **{shift: config[shift] * to_resolution / from_resolution})
    if "trained_betas" not in config:
        raise ValueError(f"a {name} has neither betas nor a shift; its schedule cannot be rescaled.")
    betas = rescaled_betas(scheduler.alphas_cumprod.double().numpy(), (to_resolution / from_resolution) ** 2)
    return scheduler.from_config(config, trained_betas=betas)


def rescaled_betas(alphas_cumprod: np.ndarray, factor: float) -> list[float]:
    """Betas whose signal-to-noise ratio is that of `alphas_cumprod` (T,) divided by `factor`, as float32 numbers.

    Each beta corrects the rounding of the earlier ones, because a scheduler computes the product of 1 − β in float32.
    """
    target = alphas_cumprod / (factor + alphas_cumprod * (1 - factor))
    betas, product = [], np.float32(1)
    for wanted in target:
        beta = np.float32(1 - wanted / np.float64(product))
        product *= np.float32(1) - beta
        betas.append(float(beta))
    return betas
