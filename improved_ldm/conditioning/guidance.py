"""Two-scale guidance: one scale for the semantic condition, one for the control.

ε̂ = λ [ β ε(c, s) + (1 − β) ε(∅, s) ] + (1 − λ) ε(∅, ∅)

λ = `guidance_scale`, β = `control_guidance_scale`. The guiders of diffusers handle one condition only, so the rule is
implemented here.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg

from improved_ldm.conditioning.conditions import Conditioning


@dataclass(frozen=True)
class GuidanceTerm:
    """One network evaluation of the rule: its weight, and which of the two conditions it reads."""

    weight: float
    semantic: bool
    control: bool


def guidance_terms(guidance_scale: float, control_guidance_scale: float = 1.0) -> list[GuidanceTerm]:
    """The evaluations that the rule needs, without those of weight zero.

    Args:
        guidance_scale: λ, the semantic scale.
        control_guidance_scale: β, the control scale.

    Returns:
        One term if λ = β = 1, two if β = 1 (classifier-free guidance), three in general. The weights sum to 1.

    Source: Berrada et al., 2024; the formula is our reading.
    """
    semantic, control = float(guidance_scale), float(control_guidance_scale)
    terms = [
        GuidanceTerm(semantic * control, semantic=True, control=True),
        GuidanceTerm(semantic * (1 - control), semantic=True, control=False),
        GuidanceTerm(1 - semantic, semantic=False, control=False),
    ]
    return [term for term in terms if term.weight != 0]


def combine_predictions(
    predictions: torch.Tensor, terms: list[GuidanceTerm], guidance_rescale: float = 0.0
) -> torch.Tensor:
    """The weighted sum of the predictions for `guidance_terms`.

    Args:
        predictions: (terms · batch, channels, height, width), one term after the other.
        terms: Terms from `guidance_terms`.
        guidance_rescale: φ in [0, 1], how far the deviation of the result is rescaled to that of the first term, the
            conditional prediction; Lin et al., 2024, equation 16.

    Returns:
        (batch, channels, height, width). A single term is returned unchanged, so λ = β = 1 is exactly the plain
        prediction.
    """
    if len(terms) == 1:
        return predictions
    parts = predictions.chunk(len(terms))
    guided = sum(term.weight * part for term, part in zip(terms, parts, strict=True))
    return rescale_noise_cfg(guided, parts[0], guidance_rescale) if guidance_rescale else guided


@dataclass(frozen=True)
class GuidedConditions:
    """The conditions of a call of the pipeline, and the guidance scales.

    Args:
        positive: Conditions to sample, with their control.
        negative: Conditions that the semantic guidance leads away from, with the null control.
        guidance_scale: λ.
        control_guidance_scale: β.
        guidance_rescale: φ.
    """

    positive: Conditioning
    negative: Conditioning
    guidance_scale: float
    control_guidance_scale: float = 1.0
    guidance_rescale: float = 0.0

    @cached_property
    def terms(self) -> list[GuidanceTerm]:
        """The evaluations in a step."""
        return guidance_terms(self.guidance_scale, self.control_guidance_scale)

    @property
    def reads_negative(self) -> bool:
        """Whether a step evaluates both the negative and the positive condition."""
        return {term.semantic for term in self.terms} == {True, False}

    @cached_property
    def batch(self) -> Conditioning:
        """The conditions of all evaluations: one term after the other, each with a whole batch."""
        parts = [(self.positive if term.semantic else self.negative, term.control) for term in self.terms]
        return Conditioning.concatenate([part if control else part.without_control() for part, control in parts])

    def combine(self, predictions: torch.Tensor) -> torch.Tensor:
        """The guided prediction (batch, channels, height, width) from the predictions of all terms."""
        return combine_predictions(predictions, self.terms, self.guidance_rescale)


def rescaled_guidance_scale(guidance_scale: float, from_resolution: float, to_resolution: float) -> float:
    """The semantic guidance scale that is best at another resolution: λ' = 1 + s (λ − 1) for an upscaling factor s.

    Args:
        guidance_scale: λ, best at `from_resolution`.
        from_resolution: Pixels per side.
        to_resolution: Pixels per side.

    Source: our reading of the appendix of Berrada et al., 2024; a sweep on your own data is more reliable.
    """
    return 1 + (guidance_scale - 1) * to_resolution / from_resolution
