"""Checks that a scheduler fits a denoiser's training: the same prediction type, the same noise at each timestep.

A scheduler with other settings samples garbage, or images that look plausible but are worse.
"""

import contextlib
import inspect
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from improved_ldm.diffusion.schedules import (
    flow_scheduler,
    reads_variance,
    scaled_input,
    step_kwargs,
    variance_preserving_sampler,
    variance_preserving_scheduler,
    without_unread_variance,
)

FLOW = "flow_prediction"
COMPARED = (0, 50, 200, 400, 600, 800, 900)  # timesteps; at the last one of all log SNR may be −∞
MAX_DIFFERENCE = 0.05  # of log SNR
PROBE_STEPS = 50
MAX_PROBE_ERROR = 0.3  # of latents of unit variance


def trained_objective(scheduler: SchedulerMixin) -> dict[str, Any] | None:
    """The objective of the denoiser that a scheduler was made for: the prediction type and the noise levels.

    Args:
        scheduler: Any scheduler of diffusers.

    Returns:
        `prediction_type`, and either the sampling `shift` of a flow or `log_snr`, natural logarithms, at the timesteps
        `COMPARED`; None if the scheduler has another kind of noise.
    """
    if is_flow(scheduler):
        shift = scheduler.config.get("shift", scheduler.config.get("flow_shift"))
        return {"prediction_type": FLOW, "shift": shift}
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None or len(table) <= COMPARED[-1] or "prediction_type" not in scheduler.config:
        return None
    alphas = torch.as_tensor(table)[list(COMPARED)].double()
    log_snr = (alphas / (1 - alphas)).log()
    return {
        "prediction_type": scheduler.config["prediction_type"],
        "log_snr": [round(value, 4) for value in log_snr.tolist()],
    }


def check_scheduler(
    scheduler: SchedulerMixin, objective: dict[str, Any] | None, predicts_variance: bool | None = None
):
    """Raise a ValueError, which lists settings that fit, if a scheduler does not fit a denoiser.

    Args:
        scheduler: Scheduler to check.
        objective: Objective of the denoiser, from `trained_objective`; None uses the scheduler's own.
        predicts_variance: Whether the denoiser predicts a variance; None if it is not known.
    """
    if predicts_variance is False and reads_variance(scheduler):
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__} with `variance_type` "
            f"{scheduler.config['variance_type']!r}, but the denoiser has no channels for a variance "
            "(`out_channels` = 2 · `in_channels`). Use `variance_type='fixed_small'`."
        )
    reason = _misfit(scheduler, objective or trained_objective(scheduler))
    if reason is not None:
        advice = "" if objective is None else f" {_advice(scheduler, objective)}"
        raise ValueError(
            f"`scheduler` is a {type(scheduler).__name__}, which does not fit the model: {reason}.{advice}"
        )


def _misfit(scheduler: SchedulerMixin, objective: dict[str, Any] | None) -> str | None:
    found = trained_objective(scheduler)
    return _difference(found, objective) or _misread_variance(scheduler) or _probe(scheduler, found)


def _misread_variance(scheduler: SchedulerMixin) -> str | None:
    """The reason if a scheduler takes a learned variance for another, or adds its noise in the last step."""
    if not reads_variance(scheduler):
        return None
    if scheduler.config["variance_type"] != "learned_range":
        return f"its `variance_type` is {scheduler.config['variance_type']!r}, but the denoiser predicts a range"
    probed = scheduler.from_config(scheduler.config)
    probed.set_timesteps(PROBE_STEPS)
    if probed.timesteps[-1] == 0:
        return None
    return f"its `timestep_spacing` {scheduler.config['timestep_spacing']!r} adds learned noise in the last step"


def _advice(scheduler: SchedulerMixin, objective: dict[str, Any]) -> str:
    """Settings that fit, for the scheduler's class if possible, else for another class."""
    prediction, shift = objective["prediction_type"], objective.get("shift", 1.0)
    if _misread_variance(scheduler):
        return "Use `variance_type='learned_range'` and `timestep_spacing='linspace'`, which ends at timestep 0."
    if prediction == FLOW:
        own = flow_scheduler(shift)
    elif _difference(trained_objective(scheduler), objective) is None:  # only the steps do not fit
        own = variance_preserving_sampler(scheduler.config, "ddim")
    else:
        own = variance_preserving_scheduler(prediction)
    if _difference(trained_objective(own), objective) is not None:
        return "Use the scheduler that the model was saved with."
    flow = {"use_flow_sigmas": True, "prediction_type": FLOW, "flow_shift": shift} if prediction == FLOW else {}
    for kind, settings in ((type(scheduler), {}), (type(scheduler), flow), (type(own), {})):
        with contextlib.suppress(Exception):  # a class that cannot be built with these settings does not fit
            candidate = kind.from_config(own.config, **settings)
            if _misfit(candidate, objective) is None:
                break
    taken = inspect.signature(type(candidate)).parameters
    settings = {
        name: value for name, value in candidate.config.items() if name in taken and value != taken[name].default
    }
    listed = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"A {type(candidate).__name__} fits with {listed or 'its defaults'}."


def is_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler steps along straight flow paths, from noise levels in [0, 1]."""
    config = scheduler.config
    if config.get("use_flow_sigmas"):
        return config.get("prediction_type") == FLOW
    return "shift" in inspect.signature(type(scheduler)).parameters and "prediction_type" not in config


def _difference(found: dict[str, Any] | None, objective: dict[str, Any] | None) -> str | None:
    if found is None or objective is None:
        return "its noise is of another kind"
    if found["prediction_type"] != objective["prediction_type"]:
        return f"it is for the prediction {found['prediction_type']!r}, not {objective['prediction_type']!r}"
    if "log_snr" not in objective:
        return None
    differences = (abs(ours - theirs) for ours, theirs in zip(objective["log_snr"], found["log_snr"], strict=True))
    if max(differences) > MAX_DIFFERENCE:
        return "the noise at its timesteps is not that of the training"
    return None


def _probe(scheduler: SchedulerMixin, objective: dict[str, Any]) -> str | None:
    """The reason if the scheduler does not arrive at known latents with an exact prediction, else None."""
    scheduler = without_unread_variance(scheduler.from_config(scheduler.config))
    generator = torch.Generator().manual_seed(0)
    latents = torch.linspace(-2.5, 2.5, 16).view(1, 4, 2, 2)
    try:
        drawn = _drawn(scheduler, objective, latents, generator)
    except Exception as error:  # a scheduler with another interface may raise anything
        return f"it does not step from noise to latents ({type(error).__name__}: {error})"
    worst = (drawn - latents).abs().max().item()
    left = 0.0 if objective["prediction_type"] == FLOW else float(1 - scheduler.alphas_cumprod[0]) ** 0.5  # at t = 0
    if worst < MAX_PROBE_ERROR + 3 * left:  # 3 deviations of that noise
        return None
    return f"with an exact prediction it misses the latents by {worst:.2f}"


def _drawn(scheduler, objective, latents, generator) -> torch.Tensor:
    mu = {"mu": 0.5} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(PROBE_STEPS, **mu)
    sample = torch.randn(latents.shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        model_input = scaled_input(scheduler, sample, timestep)
        prediction = _exact_prediction(scheduler, objective, latents, model_input, float(timestep))
        if reads_variance(scheduler):
            prediction = torch.cat([prediction, torch.zeros_like(prediction)], dim=1)
        options = step_kwargs(scheduler, generator)
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **options)[0]
    return sample


def _exact_prediction(scheduler, objective, latents, noisy, timestep: float) -> torch.Tensor:
    if objective["prediction_type"] == FLOW:
        sigma = max(timestep / scheduler.config["num_train_timesteps"], 1e-3)
        return (noisy - latents) / sigma
    table = torch.as_tensor(scheduler.alphas_cumprod).double()
    low = min(int(timestep), len(table) - 1)
    high, part = min(low + 1, len(table) - 1), timestep - low
    alpha = ((1 - part) * table[low].log() + part * table[high].log()).exp()
    signal, noise = alpha.sqrt().float(), (1 - alpha).sqrt().float()
    epsilon = (noisy - signal * latents) / noise
    return {"epsilon": epsilon, "v_prediction": signal * epsilon - noise * latents, "sample": latents}[
        objective["prediction_type"]
    ]
