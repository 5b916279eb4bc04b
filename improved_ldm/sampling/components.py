"""The components of a pipeline, and the settings that its denoiser carries into the next pipeline."""

import math
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.conditioning.guidance import GuidanceOptions
from improved_ldm.conditioning.text import text_positions
from improved_ldm.conditioning.values import MAX_SIDE, read_integer, read_size
from improved_ldm.diffusion.fitting import trained_objective

ATTRIBUTE = "sampling_settings"  # of a denoiser that has been in a pipeline


class AsBefore:
    """The default of a setting: the value in the denoiser's last pipeline, else the value in `DEFAULTS`."""

    def __repr__(self) -> str:
        return "AS_BEFORE"


AS_BEFORE: Any = AsBefore()
DEFAULTS = {
    "text_padding": "noisy_replicate",
    "text_noise_scale": 0.02,
    "max_text_tokens": 77,
    "default_original_size": None,
    "default_size": None,
    "default_guidance_scale": 5.0,
    "default_num_inference_steps": 50,
    "class_names": None,
    "lineage": None,
    "objective": None,
    "guidance_options": None,
    "control_seen": None,
}


def check_components(vae: ModelMixin | None, transformer: ModelMixin | None, unet: ModelMixin | None):
    """Raise an error if the components do not make a pipeline."""
    if vae is None:
        raise ValueError("`vae` is None; the size of the latents follows from it.")
    if transformer is not None and unet is not None:
        raise ValueError(
            "`transformer` and `unet` are both given; a pipeline has one denoiser. Give None for the other one."
        )
    for name, denoiser in (("transformer", transformer), ("unet", unet)):
        if denoiser is not None and not hasattr(denoiser, "control_inputs"):
            raise TypeError(
                f"`{name}` is a {type(denoiser).__name__}, which is not one of the family's denoisers; "
                "`python -m improved_ldm.convert` converts a published model to one."
            )


def check_text(text_encoder: PreTrainedModel | None, max_text_tokens: int):
    """Raise a ValueError if prompts have more tokens than the text encoder has positions."""
    positions = math.inf if text_encoder is None else text_positions(text_encoder.config)
    if max_text_tokens > positions:
        raise ValueError(f"`max_text_tokens` is {max_text_tokens}; the text encoder has {positions} positions.")


def sampling_settings(
    given: dict[str, Any], denoiser: nn.Module | None, scheduler: SchedulerMixin | None
) -> dict[str, Any]:
    """All settings of a pipeline.

    Args:
        given: Values by the names of `DEFAULTS`; `AS_BEFORE` if the caller gives none.
        denoiser: Denoiser whose last pipeline provides the other values.
        scheduler: Scheduler that provides the objective if nothing else does.
    """
    before = getattr(denoiser, ATTRIBUTE, {})
    settings = {**DEFAULTS, **before}
    settings |= {name: value for name, value in given.items() if value is not AS_BEFORE}
    settings["guidance_options"] = GuidanceOptions.plain(settings["guidance_options"])
    if settings["default_size"] is not None:
        height, width = read_size("default_size", settings["default_size"])
        settings["default_size"] = [read_integer("default_size", side, 1, MAX_SIDE) for side in (height, width)]
    if denoiser is not None:
        check_channels(settings["guidance_options"], denoiser.config.in_channels)
    settings["control_seen"] = ControlRanges(settings["control_seen"]).record()
    check_objective(settings["objective"], before.get("objective"))
    if settings["objective"] is None and scheduler is not None:
        settings["objective"] = trained_objective(scheduler)
    return settings


def check_objective(objective: dict[str, Any] | None, trained: dict[str, Any] | None):
    """Raise a ValueError if an objective has another prediction type than the denoiser was trained for."""
    if objective is None or trained is None:
        return
    kinds = [one.get("prediction_type") for one in (objective, trained)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"`objective` has the prediction {kinds[0]!r}, but the denoiser was trained for {kinds[1]!r}: give the "
            "scheduler and the settings of its own pipeline."
        )


def check_channels(guidance_options: dict[str, Any] | None, latent_channels: int):
    """Raise a ValueError if more channels are to be guided than the latents have."""
    channels = (guidance_options or {}).get("channels") or 0
    if channels > latent_channels:
        raise ValueError(
            f"`guidance_options.channels` is {channels}; it must be at most {latent_channels}, the number of latent "
            "channels."
        )


def remember_settings(denoiser: nn.Module | None, config: dict[str, Any]):
    """Store the settings of a pipeline's config on its denoiser."""
    if denoiser is not None:
        setattr(denoiser, ATTRIBUTE, {name: config[name] for name in DEFAULTS})
