"""Two-scale guidance: one scale for the semantic condition, one for the control.

ε̂ = λ [ β ε(c, s) + (1 − β) ε(∅, s) ] + (1 − λ) ε(∅, ∅)

λ = `guidance_scale`, β = `control_guidance_scale`. The guiders of diffusers handle one condition only, so the rule is
implemented here.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.values import read_choice, read_integer, read_number, read_numbers, refuse

GuidanceSchedule = Literal["constant", "power_cosine", "interval"]
LAST_TIMESTEP = 1000.0  # T, the end of a schedule
MAX_CHANNELS, MAX_POWER = 2**16, 1000


@dataclass(frozen=True)
class GuidanceOptions:
    """Where and when the semantic guidance acts; the fields are the keys of the pipeline's `guidance_options`.

    Args:
        channels: Number of latent channels that are guided, the first ones; the others, and a learned variance, have
            λ = 1. None guides all latent channels. DiT, mDT-v2 and PixArt-α's ancestral sampler guide 3 of 4.
        schedule: `constant`; `power_cosine`, λ(t) = 1 + (λ − 1) · (1 − cos π(1 − t / T)^power) / 2; or `interval`,
            λ inside `interval` and 1 outside it, where the unconditional prediction is not evaluated.
        power: Power of `power_cosine`.
        interval: First and last timestep of `interval`, in [0, 1000]; 1000 is noise.

    Source: `channels`: DiT; `power_cosine`: mDT-v2; `interval`: Kynkäänniemi et al., 2024.
    """

    channels: int | None = None
    schedule: GuidanceSchedule = "constant"
    power: float = 4.0
    interval: tuple[float, float] = (0.0, LAST_TIMESTEP)

    @classmethod
    def read(cls, options: Mapping[str, Any] | None) -> Self:
        """The options of a dictionary; None or an empty one are the defaults.

        Raises:
            ValueError: If a key is unknown, a value is not valid, or a key belongs to another schedule.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(options, Mapping | None) or set(options or ()) - set(names):
            refuse("guidance_options", options, f"a dict with {', '.join(names)}")
        given = dict(options or {})
        schedule = given.get("schedule", "constant")
        read_choice("guidance_options.schedule", schedule, get_args(GuidanceSchedule))
        for name, owner in (("power", "power_cosine"), ("interval", "interval")):
            if name in given and schedule != owner:
                raise ValueError(
                    f"`guidance_options.{name}` is given, but the schedule is {schedule!r}; only {owner!r} reads it."
                )
        if given.get("channels") is not None:
            given["channels"] = read_integer("guidance_options.channels", given["channels"], 1, MAX_CHANNELS)
        if "power" in given:
            given["power"] = read_number("guidance_options.power", given["power"], 0, MAX_POWER)
        if "interval" in given:
            interval = read_numbers("guidance_options.interval", given["interval"], 0, LAST_TIMESTEP)
            if len(interval) != 2 or interval[0] > interval[1]:
                refuse("guidance_options.interval", given["interval"], "two ascending timesteps, such as [100, 800]")
            given["interval"] = tuple(interval)
        return cls(**given)

    @classmethod
    def plain(cls, options: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """A checked dictionary of options as a config stores it; None for no options."""
        read = asdict(cls.read(options))
        return {name: list(read[name]) if name == "interval" else read[name] for name in options or {}} or None

    def scale_at(self, guidance_scale: float, timestep: float | torch.Tensor) -> float:
        """λ(t) for λ = `guidance_scale` and a timestep in [0, 1000], which may be on any device."""
        if self.schedule == "interval":
            low, high = self.interval
            return guidance_scale if low <= float(timestep) <= high else 1.0
        if self.schedule == "power_cosine":
            progress = 1 - float(timestep) / LAST_TIMESTEP
            return 1 + (guidance_scale - 1) * (1 - math.cos(math.pi * progress**self.power)) / 2
        return guidance_scale


@dataclass(frozen=True)
class GuidanceTerm:
    """One network evaluation of the rule.

    Args:
        weight: Its weight.
        semantic: Whether it reads the semantic condition.
        control: Whether it reads the control.
        plain_weight: Its weight without semantic guidance, λ = 1.
    """

    weight: float
    semantic: bool
    control: bool
    plain_weight: float


def guidance_terms(
    guidance_scale: float, control_guidance_scale: float = 1.0, keeps_plain: bool = False
) -> list[GuidanceTerm]:
    """The evaluations that the rule needs, without those of weight zero.

    Args:
        guidance_scale: λ, the semantic scale.
        control_guidance_scale: β, the control scale.
        keeps_plain: Whether evaluations that only λ = 1 needs are kept, for channels without semantic guidance.

    Returns:
        One term if λ = β = 1, two if β = 1 (classifier-free guidance), three in general. The weights sum to 1.

    Source: Berrada et al., 2024; the formula is our reading.
    """
    semantic, control = float(guidance_scale), float(control_guidance_scale)
    terms = [
        GuidanceTerm(semantic * control, semantic=True, control=True, plain_weight=control),
        GuidanceTerm(semantic * (1 - control), semantic=True, control=False, plain_weight=1 - control),
        GuidanceTerm(1 - semantic, semantic=False, control=False, plain_weight=0.0),
    ]
    return [term for term in terms if term.weight != 0 or (keeps_plain and term.plain_weight != 0)]


def combine_predictions(
    predictions: torch.Tensor,
    terms: list[GuidanceTerm],
    guidance_rescale: float = 0.0,
    num_guided: int | None = None,
) -> torch.Tensor:
    """The weighted sum of the predictions for `guidance_terms`.

    Args:
        predictions: (terms · batch, channels, height, width), one term after the other.
        terms: Terms from `guidance_terms`.
        guidance_rescale: φ in [0, 1], how far the deviation of the result is rescaled to that of the first term, the
            conditional prediction; Lin et al., 2024, equation 16.
        num_guided: Number of channels with semantic guidance, the first ones; the others have λ = 1. None guides all.

    Returns:
        (batch, channels, height, width). A single term is returned unchanged, so λ = β = 1 is exactly the plain
        prediction.
    """
    if len(terms) == 1:
        return predictions
    parts = predictions[:, :num_guided].chunk(len(terms))
    guided = sum(term.weight * part for term, part in zip(terms, parts, strict=True))
    guided = rescale_noise_cfg(guided, parts[0], guidance_rescale) if guidance_rescale else guided
    others = predictions[:, guided.shape[1] :].chunk(len(terms))
    plain = [term.plain_weight * part for term, part in zip(terms, others, strict=True) if term.plain_weight]
    return torch.cat([guided, sum(plain)], dim=1) if others[0].shape[1] else guided


@dataclass(frozen=True)
class GuidedConditions:
    """The conditions of a call of the pipeline, and the guidance scales.

    Args:
        positive: Conditions to sample, with their control.
        negative: Conditions that the semantic guidance leads away from, with the null control.
        guidance_scale: λ.
        control_guidance_scale: β.
        guidance_rescale: φ.
        options: Where and when λ acts.
    """

    positive: Conditioning
    negative: Conditioning
    guidance_scale: float
    control_guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    options: GuidanceOptions = GuidanceOptions()
    _batches: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def reads_negative(self) -> bool:
        """Whether a step evaluates both the negative and the positive condition."""
        terms = guidance_terms(self.guidance_scale, self.control_guidance_scale)
        return {term.semantic for term in terms} == {True, False}

    def terms_at(self, timestep: float | torch.Tensor, has_variance: bool = False) -> list[GuidanceTerm]:
        """The evaluations in the step at a timestep in [0, 1000]; a variance is never guided."""
        scale = self.options.scale_at(self.guidance_scale, timestep)
        keeps_plain = has_variance or self.options.channels is not None
        return guidance_terms(scale, self.control_guidance_scale, keeps_plain)

    def batch(self, terms: list[GuidanceTerm]) -> Conditioning:
        """The conditions of all evaluations: one term after the other, each with a whole batch."""
        kinds = tuple((term.semantic, term.control) for term in terms)
        if kinds not in self._batches:  # the same for most steps
            parts = [(self.positive if semantic else self.negative, control) for semantic, control in kinds]
            parts = [part if control else part.without_control() for part, control in parts]
            self._batches[kinds] = Conditioning.concatenate(parts)
        return self._batches[kinds]

    def combine(self, predictions: torch.Tensor, terms: list[GuidanceTerm], num_channels: int) -> torch.Tensor:
        """The guided prediction from the predictions of all terms.

        Args:
            predictions: (terms · batch, channels, height, width).
            terms: Terms from `terms_at`.
            num_channels: Latent channels; further ones are a variance.
        """
        num_guided = min(self.options.channels or num_channels, num_channels)
        return combine_predictions(predictions, terms, self.guidance_rescale, num_guided)


def rescaled_guidance_scale(guidance_scale: float, from_resolution: float, to_resolution: float) -> float:
    """The semantic guidance scale that is best at another resolution: λ' = 1 + s (λ − 1) for an upscaling factor s.

    Args:
        guidance_scale: λ, best at `from_resolution`.
        from_resolution: Pixels per side.
        to_resolution: Pixels per side.

    Source: our reading of the appendix of Berrada et al., 2024; a sweep on your own data is more reliable.
    """
    return 1 + (guidance_scale - 1) * to_resolution / from_resolution
