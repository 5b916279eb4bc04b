"""The steps of a scheduler, checked against what the denoiser was trained on."""

import inspect
from typing import Any

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from improved_ldm.conditioning.values import shown
from improved_ldm.diffusion.fitting import is_flow
from improved_ldm.diffusion.schedules import NUM_TRAIN_TIMESTEPS, reads_variance


def set_steps(scheduler: SchedulerMixin, name: str, value: int | list[float], **options: Any):
    """Set the timesteps of a scheduler.

    Args:
        scheduler: Scheduler to change.
        name: `num_inference_steps`, `timesteps` or `sigmas`.
        value: Value of that argument of `set_timesteps`.
        options: Further arguments of `set_timesteps`.

    Raises:
        ValueError: If the scheduler does not accept the value, or its timesteps do not lead from noise to an image.
    """
    kind, is_given = type(scheduler).__name__, f"`{name}` is {shown(value)};"
    if name not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"`{name}` is given, but {kind} takes none; give `num_inference_steps`.")
    try:
        scheduler.set_timesteps(**{name: value}, **options)
    except (ValueError, LookupError, ArithmeticError, AssertionError) as error:
        raise ValueError(f"{is_given} {kind} refuses it: {error}") from error
    most = {"num_inference_steps": NUM_TRAIN_TIMESTEPS, "timesteps": NUM_TRAIN_TIMESTEPS}
    most |= {"sigmas": 1} if is_flow(scheduler) else {}
    if name in most and max(value if isinstance(value, list) else [value]) > most[name]:
        raise ValueError(f"{is_given} the model was trained up to {most[name]}.")
    if is_flow(scheduler):
        return
    first, last = (float(scheduler.timesteps[place]) for place in (0, -1))
    spacing = scheduler.config.get("timestep_spacing")
    if first >= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"{is_given} with the spacing {spacing!r} the {kind} starts at timestep {first:g}, but the model was "
            f"trained up to {NUM_TRAIN_TIMESTEPS - 1}. Take fewer steps."
        )
    if reads_variance(scheduler) and last != 0:
        raise ValueError(
            f"{is_given} with a learned variance the last timestep must be 0, because the {kind} adds noise at every "
            f"other one, but it is {last:g}."
        )
    if len(scheduler.timesteps) == 1 and first <= 1:
        other = "" if reads_variance(scheduler) else ", or the spacing 'trailing'"
        raise ValueError(
            f"{is_given} with one step and the spacing {spacing!r} the {kind} starts at timestep {first:g}, which has "
            f"no noise. Take more steps{other}."
        )
