"""Callbacks at the end of a step, and the properties of a pipeline that describe the current call."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, PipelineCallback

from improved_ldm.conditioning.guidance import GuidedConditions
from improved_ldm.conditioning.values import read_number, refuse, shown
from improved_ldm.sampling.arguments import MAX_SCALE

# the tensors that a callback can request, and the condition that each one holds
JOINED = {  # the negative rows, then the positive ones; only the positive ones if guidance is off
    "prompt_embeds": "encoder_hidden_states",
    "pooled_prompt_embeds": "pooled_projections",
    "add_text_embeds": "pooled_projections",  # SDXL's name
    "add_time_ids": "control",  # SDXL's name
}
NEGATIVE = {
    "negative_prompt_embeds": "encoder_hidden_states",
    "negative_pooled_prompt_embeds": "pooled_projections",
}
CALLBACK_TENSORS = ("latents", *JOINED, *NEGATIVE)
DIMENSIONS = {"encoder_hidden_states": 3, "pooled_projections": 2, "control": 2}

Callback = Callable[[DiffusionPipeline, int, Any, dict], dict | None]


class CallState:
    """Properties of a pipeline that describe the current call, or the last one, under diffusers' names."""

    _guidance_scale: float | None = None
    _guidance_rescale: float = 0.0
    _num_timesteps: int = 0
    _current_timestep: torch.Tensor | None = None
    _interrupt: bool = False

    @property
    def guidance_scale(self) -> float | None:
        """λ, strength of the semantic condition; None before the first call."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """φ, how far guidance is rescaled."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a step evaluates both the negative and the positive condition."""
        return self._guidance_scale not in (None, 0, 1)

    @property
    def num_timesteps(self) -> int:
        """Number of steps in the call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """The current timestep, in the scheduler's units; None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps are skipped; a callback or another thread sets `_interrupt`."""
        return self._interrupt


@dataclass(frozen=True)
class StepEnd:
    """A callback at the end of a step, and the names of the tensors that it gets."""

    callback: Callback
    names: tuple[str, ...]

    def __call__(
        self,
        pipeline: DiffusionPipeline,
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        guided: GuidedConditions,
    ) -> tuple[torch.Tensor, GuidedConditions]:
        """Call the callback and return the latents and conditions with its changes.

        A `_guidance_scale` or `_guidance_rescale` that it sets on the pipeline applies from the next step on; a scale
        of 0 turns guidance off, as in diffusers' own callbacks.

        Raises:
            ValueError: If returned tensors have other names or shapes.
        """
        if (pipeline._guidance_scale or 1.0) != guided.guidance_scale:  # another thread's call has set it
            pipeline._guidance_scale = guided.guidance_scale
        pipeline._guidance_rescale = guided.guidance_rescale
        scale = pipeline._guidance_scale
        given = {name: latents if name == "latents" else _tensor(name, guided, len(latents)) for name in self.names}
        tensors = dict(given)
        returned = self.callback(pipeline, step, timestep, tensors)
        if not isinstance(returned, dict | None):
            refuse("callback_on_step_end", returned, "a function that returns a dict of tensors or None")
        tensors |= returned or {}
        unknown = [name for name in tensors if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end` returned {', '.join(map(shown, unknown))}; "
                f"it can return {', '.join(CALLBACK_TENSORS)}."
            )
        # if a tensor has two names, the replaced one counts
        for name in sorted(tensors, key=lambda name: tensors[name] is not given.get(name)):
            if name == "latents":
                latents = _checked(name, tensors[name], latents)
            else:
                guided = _with_tensor(name, tensors[name], guided, len(latents))
        if pipeline._guidance_scale != scale:
            scale = read_number("guidance_scale", pipeline._guidance_scale, 0, MAX_SCALE)
            guided = replace(guided, guidance_scale=scale or 1.0)
        if pipeline._guidance_rescale != guided.guidance_rescale:
            rescale = read_number("guidance_rescale", pipeline._guidance_rescale, 0, 1)
            guided = replace(guided, guidance_rescale=rescale)
        return latents, guided


def read_callback(callback: Any, names: Any) -> StepEnd | None:
    """The callback of a call with the names of its tensors; None if there is no callback.

    Args:
        callback: A function, a callback of diffusers, which lists its own tensors, or None.
        names: Names of tensors.

    Raises:
        ValueError: If a name is unknown, or the callback needs a feature that the pipeline does not have.
    """
    names = () if names is None else names
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        refuse("callback_on_step_end_tensor_inputs", names, "a list of names, such as ['latents']")
    _check_names("callback_on_step_end_tensor_inputs", names)
    if callback is None:
        return None
    if not callable(callback) or not _takes_a_step(callback):
        refuse("callback_on_step_end", callback, "a function of (pipeline, step, timestep, tensors)")
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        for part in getattr(callback, "callbacks", [callback]):
            if isinstance(part, IPAdapterScaleCutoffCallback):
                raise ValueError(
                    "`callback_on_step_end` has an IPAdapterScaleCutoffCallback; the pipeline has no IP adapter."
                )
        _check_names("callback_on_step_end", callback.tensor_inputs)
        names = (*callback.tensor_inputs, *names)
    return StepEnd(callback, tuple(dict.fromkeys(names)))


def _takes_a_step(callback: Callable) -> bool:
    """Whether a function accepts four arguments, as far as its signature is known."""
    try:
        inspect.signature(callback).bind(*[None] * 4)
    except TypeError:
        return False
    except ValueError:  # a function in C that has no signature
        pass
    return True


def _check_names(argument: str, names: list[str] | tuple[str, ...]):
    unknown = sorted(set(names) - set(CALLBACK_TENSORS))
    if unknown:
        raise ValueError(f"`{argument}` has {', '.join(unknown)}; it may have {', '.join(CALLBACK_TENSORS)}.")


def _tensor(name: str, guided: GuidedConditions, num_images: int) -> torch.Tensor:
    """The tensor with a name; it has no channels if the denoiser does not read it."""
    field = JOINED.get(name) or NEGATIVE[name]
    negative, positive = getattr(guided.negative, field), getattr(guided.positive, field)
    if positive is None:
        negative = positive = torch.empty(num_images, *[0] * (DIMENSIONS[field] - 1))
    if name in NEGATIVE:
        return negative
    return torch.cat([negative, positive]) if guided.reads_negative else positive


def _with_tensor(name: str, value: Any, guided: GuidedConditions, num_images: int) -> GuidedConditions:
    """The conditions with a tensor that a callback changed; for a joined tensor the positive rows are enough."""
    given = _tensor(name, guided, num_images)
    field = JOINED.get(name) or NEGATIVE[name]
    if not given.numel():  # the denoiser does not read it
        return guided
    if name in NEGATIVE:
        return replace(guided, negative=replace(guided.negative, **{field: _checked(name, value, given)}))
    if isinstance(value, torch.Tensor) and 0 < len(value) < num_images and _is_same(value, given[-len(value) :]):
        return guided  # diffusers' own callbacks cut to one row, regardless of the batch size
    positive = given[-num_images:]
    if getattr(value, "shape", None) == positive.shape:
        return replace(guided, positive=replace(guided.positive, **{field: _checked(name, value, positive)}))
    negative, positive = _checked(name, value, given).split(num_images)
    return replace(
        guided,
        positive=replace(guided.positive, **{field: positive}),
        negative=replace(guided.negative, **{field: negative}),
    )


def _is_same(value: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether tensors are equal; NaN, which marks unknown values, equals itself."""
    return value.shape == other.shape and torch.allclose(value.to(other), other, rtol=0, atol=0, equal_nan=True)


def _checked(name: str, value: Any, given: torch.Tensor) -> torch.Tensor:
    """A returned tensor, on the device and in the dtype of the one that was given."""
    if not isinstance(value, torch.Tensor) or value.shape != given.shape:
        what = tuple(value.shape) if isinstance(value, torch.Tensor) else shown(value)
        raise ValueError(
            f"`{name}`, as `callback_on_step_end` returned it, is {what}; it must be {tuple(given.shape)}."
        )
    return value.to(given)
