"""The noise schedules that the family trains and samples with, as diffusers schedulers, and their rescaling."""

import numpy as np
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

NUM_TRAIN_TIMESTEPS = 1000


def variance_preserving_scheduler(prediction_type: str) -> DDIMScheduler:
    """DDIM on the `scaled_linear` betas of latent diffusion, 0.00085 to 0.012.

    Args:
        prediction_type: `epsilon` or `v_prediction`.

    Source: Berrada et al., 2024; trailing timestep spacing is our choice, it starts at the noisiest step.
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
        shift: moves noise levels up: σ' = shift · σ / (1 + (shift − 1) σ).

    Source: Stable Diffusion 3.
    """
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)


def rescale_scheduler(scheduler: SchedulerMixin, from_resolution: float, to_resolution: float) -> SchedulerMixin:
    """The scheduler that leaves a larger image as uncertain at each timestep as it left a smaller one.

    SNR'(t) = SNR(t) · (s / s')², which is ᾱ' = s² ᾱ / (s'² + ᾱ (s² − s'²)); for a flow with noise level σ
    σ' = (s' / s) σ / (1 + (s' / s − 1) σ), which is a shift. The schedule is written into the config, as
    `trained_betas` or `shift`, so that every scheduler made from it keeps it.

    Args:
        scheduler: any of diffusers' that has betas, or a flow with a shift; it stays as it is.
        from_resolution: s, pixels a side that the scheduler was made for.
        to_resolution: s', pixels a side.

    Returns:
        A scheduler of the same class; the same one for equal resolutions.

    Raises:
        ValueError: for resolutions that are not positive, or a scheduler whose schedule is neither.

    Source: Berrada et al., 2024.
    """
    if not (from_resolution > 0 and to_resolution > 0):
        raise ValueError(f"`from_resolution` {from_resolution} and `to_resolution` {to_resolution} must be positive.")
    if from_resolution == to_resolution:
        return scheduler
    config, name = scheduler.config, type(scheduler).__name__
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"this {name} shifts by the size of each image (`use_dynamic_shifting`); it needs no rescaling."
        )
    for shift in ("shift", "flow_shift"):
        if shift in config and (shift == "shift" or config.get("use_flow_sigmas")):
            return scheduler.from_config(config, **{shift: config[shift] * to_resolution / from_resolution})
    if "trained_betas" not in config:
        raise ValueError(f"a {name} has neither betas nor a shift; its schedule cannot be rescaled.")
    betas = rescaled_betas(scheduler.alphas_cumprod.double().numpy(), (to_resolution / from_resolution) ** 2)
    return scheduler.from_config(config, trained_betas=betas)


def rescaled_betas(alphas_cumprod: np.ndarray, factor: float) -> list[float]:
    """Betas whose signal-to-noise ratio is that of `alphas_cumprod` (T,) over `factor`, as float32 numbers.

    Each beta makes up for the rounding of those before it, for a scheduler multiplies 1 − β up in float32.
    """
    target = alphas_cumprod / (factor + alphas_cumprod * (1 - factor))
    betas, product = [], np.float32(1)
    for wanted in target:
        beta = np.float32(1 - wanted / np.float64(product))
        product *= np.float32(1) - beta
        betas.append(float(beta))
    return betas
