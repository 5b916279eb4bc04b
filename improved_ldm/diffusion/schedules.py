"""The noise schedules for training and sampling, as diffusers schedulers, and their rescaling."""

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers.scheduling_utils import SchedulerMixin

NUM_TRAIN_TIMESTEPS = 1000

BetaSchedule = Literal["scaled_linear", "linear", "cosine"]
SamplerName = Literal["ddim", "ddpm", "dpm_solver", "euler"]
TimestepSpacing = Literal["trailing", "leading", "linspace"]

BETA_ENDS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}  # of Stable Diffusion; of DDPM
# sampler → its class, its own settings, and its default spacing of timesteps
VARIANCE_PRESERVING_SAMPLERS: dict[str, tuple[type[SchedulerMixin], dict[str, Any], TimestepSpacing]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, "trailing"),
    "ddpm": (DDPMScheduler, {"clip_sample": False, "variance_type": "fixed_small"}, "linspace"),
    "dpm_solver": (
        DPMSolverMultistepScheduler,
        {"final_sigmas_type": "sigma_min", "variance_type": None},
        "linspace",
    ),
}
FLOW_SAMPLERS = ("euler", "dpm_solver")


def variance_preserving_scheduler(
    prediction_type: str,
    beta_schedule: BetaSchedule = "scaled_linear",
    beta_start: float | None = None,
    beta_end: float | None = None,
) -> DDIMScheduler:
    """DDIM on a schedule of betas.

    Args:
        prediction_type: `epsilon` or `v_prediction`.
        beta_schedule: `linear` in β, `scaled_linear`, which is linear in sqrt(β), or `cosine`.
        beta_start: First β; default: 0.00085 of `scaled_linear`, 0.0001 of `linear`. A `cosine` has no ends.
        beta_end: Last β; default: 0.012 of `scaled_linear`, 0.02 of `linear`.

    Raises:
        ValueError: If an end of a `cosine` is given, or the ends are not 0 < start ≤ end < 1.

    Source: `scaled_linear`: Berrada et al., 2024; `linear`: DDPM and DiT; `cosine`: Nichol and Dhariwal, 2021. The
        trailing spacing of timesteps, which starts at the noisiest step, is our choice.
    """
    scheduler = DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        prediction_type=prediction_type,
        **_betas(beta_schedule, beta_start, beta_end),
    )
    return variance_preserving_sampler(scheduler.config, "ddim")


def _betas(beta_schedule: BetaSchedule, beta_start: float | None, beta_end: float | None) -> dict[str, Any]:
    """The schedule as arguments of a diffusers scheduler."""
    if beta_schedule == "cosine":
        for name, value in (("beta_start", beta_start), ("beta_end", beta_end)):
            if value is not None:
                raise ValueError(f"`{name}` is {value}; a 'cosine' `beta_schedule` has no ends to set.")
        return {"beta_schedule": "squaredcos_cap_v2"}
    if beta_schedule not in BETA_ENDS:
        raise ValueError(f"`beta_schedule` is {beta_schedule!r}; it must be one of cosine, {', '.join(BETA_ENDS)}.")
    start, end = BETA_ENDS[beta_schedule]
    start, end = start if beta_start is None else beta_start, end if beta_end is None else beta_end
    if not 0 < start <= end < 1:
        raise ValueError(f"`beta_start` is {start} and `beta_end` {end}; they must be 0 < start ≤ end < 1.")
    return {"beta_schedule": beta_schedule, "beta_start": start, "beta_end": end}


def variance_preserving_sampler(
    config: Mapping[str, Any],
    sampler: SamplerName,
    timestep_spacing: TimestepSpacing | None = None,
    learned_variance: bool = False,
) -> SchedulerMixin:
    """A scheduler of diffusers with the betas and the prediction type of another one.

    Args:
        config: Config of a scheduler with betas.
        sampler: `ddim`, `ddpm` (ancestral) or `dpm_solver`.
        timestep_spacing: `trailing` starts at the noisiest timestep and ends above 0, `linspace` spans all timesteps,
            `leading` takes steps of equal length from timestep 1 on, as latent diffusion does; default: `trailing` for
            `ddim`, else `linspace`.
        learned_variance: Whether `ddpm` reads the variance from the denoiser.

    Raises:
        ValueError: If the sampler is unknown or for a flow, or the spacing would add noise in the last step.

    Source: `ddpm` with a learned variance: DiT; `dpm_solver`: PixArt-α; `ddim` with `leading`: latent diffusion.
    """
    if sampler not in VARIANCE_PRESERVING_SAMPLERS:
        raise ValueError(
            f"`sampler` is {sampler!r}; for the prediction {config['prediction_type']!r} it must be one of "
            f"{', '.join(VARIANCE_PRESERVING_SAMPLERS)}."
        )
    kind, settings, spacing = VARIANCE_PRESERVING_SAMPLERS[sampler]
    spacing = timestep_spacing or spacing
    if sampler == "ddpm" and learned_variance:
        settings = settings | {"variance_type": "learned_range"}
        if spacing != "linspace":
            raise ValueError(
                f"`timestep_spacing` is {spacing!r}; with a learned variance it must be 'linspace', which ends at "
                "timestep 0: other spacings add noise in the last step."
            )
    offset = int(spacing == "leading")
    return kind.from_config(config, **settings, timestep_spacing=spacing, steps_offset=offset)


def flow_scheduler(shift: float, sampler: SamplerName = "euler") -> SchedulerMixin:
    """Steps along straight flow paths.

    Args:
        shift: Shift towards higher noise levels: σ' = shift · σ / (1 + (shift − 1) σ).
        sampler: `euler` or `dpm_solver`.

    Raises:
        ValueError: If the sampler is unknown or not for a flow.

    Source: Stable Diffusion 3.
    """
    if sampler == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=shift)
    if sampler == "dpm_solver":
        return DPMSolverMultistepScheduler(
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
    raise ValueError(f"`sampler` is {sampler!r}; for a flow it must be one of {', '.join(FLOW_SAMPLERS)}.")


def reads_variance(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler steps with a variance that the denoiser predicts: only ancestral steps do."""
    is_learned = str(scheduler.config.get("variance_type")).startswith("learned")
    return is_learned and isinstance(scheduler, DDPMScheduler | DDPMParallelScheduler)


def without_unread_variance(scheduler: SchedulerMixin) -> SchedulerMixin:
    """The scheduler, which is changed if it is for a learned variance that its steps do not use.

    Schedulers made from the config of an ancestral one have such a setting; some of diffusers' would then cut the
    prediction to the three channels of an image.
    """
    if scheduler.config.get("variance_type") in ("learned", "learned_range") and not reads_variance(scheduler):
        scheduler.register_to_config(variance_type=None)
    return scheduler


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
