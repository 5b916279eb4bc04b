"""Reading and checking of individual arguments of the pipeline's call."""

import logging
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import torch

from improved_ldm.conditioning.values import is_sequence, plain, read_integer, read_numbers, refuse, shown

MAX_IMAGES = 2**16  # per call
MAX_PIXELS = 2**30  # of all images in a call
MAX_STEPS = 10**4
MAX_SCALE = 1000  # of guidance and of adapters
ATTENTION_KWARGS = ("attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")

logger = logging.getLogger(__name__)

Generators = torch.Generator | list[torch.Generator] | None


def read_labels(value: Any, num_classes: int, class_names: Sequence[str] | None) -> list[int]:
    """Class labels, from one or several integers or class names.

    Args:
        value: The argument `class_labels`.
        num_classes: Number of classes; labels are from 0 to `num_classes` - 1.
        class_names: Names of the classes, or None.

    Raises:
        ValueError: If the value or its type is not valid; for an unknown name the message lists the nearest ones.
    """
    values = list(plain(value)) if is_sequence(value) else [value]
    names = list(class_names or [])[:num_classes]
    valid = f"integers from 0 to {num_classes - 1}" + (" or names in `class_names`" if names else "")
    if not values:
        refuse("class_labels", value, f"at least one label; labels are {valid}")
    return [_read_label(label, num_classes, names, valid) for label in values]


def _read_label(value: Any, num_classes: int, names: list[str], valid: str) -> int:
    label = plain(value)
    if isinstance(label, str) and names:
        return _label_of_name(label, names)
    if type(label) is not int or not 0 <= label < num_classes:
        raise ValueError(f"`class_labels` has {shown(value)}; labels must be {valid}.")
    return label


def _label_of_name(name: str, names: list[str]) -> int:
    """The index of a name among the names; the case of letters does not matter."""
    exact = [label for label, known in enumerate(names) if known == name]
    alike = exact or [label for label, known in enumerate(names) if known.casefold() == name.casefold()]
    if len(alike) == 1:
        return alike[0]
    if alike:
        raise ValueError(f"`class_labels` has {shown(name)}, the name of classes {alike}; give one of these numbers.")
    folded = {known.casefold(): known for known in names}
    nearest = [folded[match] for match in get_close_matches(name.casefold(), folded, n=3, cutoff=0)]
    raise ValueError(
        f"`class_labels` has {shown(name)}, which is no class; the nearest of the {len(names)} names in `class_names` "
        f"are {', '.join(map(repr, nearest))}."
    )


def read_generators(value: Any, num_images: int) -> Generators:
    """One generator for all images, or a list with one per image.

    Raises:
        ValueError: If the type or the number of generators is not valid.
    """
    if value is None or isinstance(value, torch.Generator):
        return value
    if not isinstance(value, list | tuple) or not all(isinstance(item, torch.Generator) for item in value):
        refuse("generator", value, "a torch.Generator, such as torch.Generator().manual_seed(0), or a list of them")
    if len(value) != num_images:
        kind = type(value).__name__
        raise ValueError(f"`generator` is a {kind} of {len(value)}; it must have one for each of {num_images} images.")
    return list(value)


def check_latents(value: Any, shape: tuple[int, ...]):
    """Raise a ValueError if a value is not a floating-point tensor of this shape."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"`latents` is of type {kind}; it must be a floating torch.Tensor of shape {shape}.")
    if tuple(value.shape) != shape:
        raise ValueError(f"`latents` is {tuple(value.shape)}; it must be {shape}.")


def check_pixels(height: int, width: int, num_images: int):
    """Raise a ValueError if one call has too many images, or too many pixels in total."""
    if num_images > MAX_IMAGES:
        raise ValueError(
            f"`num_images_per_prompt` and the prompts give {num_images} images; one call samples ≤ {MAX_IMAGES}."
        )
    if height * width * num_images > MAX_PIXELS:
        raise ValueError(
            f"`height` {height} and `width` {width} of {num_images} images are {height * width * num_images} pixels; "
            f"one call samples ≤ {MAX_PIXELS}."
        )


def read_schedule(num_inference_steps: Any, timesteps: Any, sigmas: Any, default_steps: int) -> dict[str, Any]:
    """The argument of `set_timesteps` that gives the steps.

    Args:
        num_inference_steps: Number of steps, or None.
        timesteps: Descending timesteps, or None.
        sigmas: Descending noise levels, or None.
        default_steps: Number of steps if nothing is given.

    Raises:
        ValueError: If a value is not valid, both schedules are given, or the number of steps contradicts the schedule.
    """
    if num_inference_steps is not None:
        num_inference_steps = read_integer("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if not given:
        return {"num_inference_steps": num_inference_steps or default_steps}
    if len(given) > 1:
        raise ValueError("`timesteps` and `sigmas` are both given; give one of them.")
    ((name, value),) = given.items()
    schedule = read_numbers(name, value, 0, 1e6)
    if len(schedule) > MAX_STEPS or any(after >= before for before, after in pairwise(schedule)):
        refuse(name, value, f"a descending list of at most {MAX_STEPS} numbers")
    if num_inference_steps not in (None, len(schedule), len(schedule) - (name == "sigmas")):
        raise ValueError(
            f"`num_inference_steps` is {num_inference_steps}, but `{name}` has {len(schedule)}; give one of the two."
        )
    return {name: schedule}


def read_adapter_scale(**kwargs: dict[str, Any] | None) -> float:
    """The strength of the adapters in a call, from `attention_kwargs` under any of its names; 1 if not given.

    Raises:
        ValueError: If two names are given, or the value is not `{"scale": number}`.
    """
    given = {name: value for name, value in kwargs.items() if value is not None}
    if len(given) > 1:
        raise ValueError(f"{' and '.join(f'`{name}`' for name in given)} are names of one argument; give one of them.")
    for name, value in given.items():
        wanted = f"a dict with only 'scale', a number from -{MAX_SCALE} to {MAX_SCALE}"
        scale = plain(value.get("scale", 1.0)) if isinstance(value, dict) and set(value) <= {"scale"} else None
        if type(scale) not in (int, float) or not -MAX_SCALE <= scale <= MAX_SCALE:
            refuse(name, value, wanted)
        return scale
    return 1.0
