"""Two-scale guidance: one scale for the semantic condition, one for the control.

ε̂ = λ [ β ε(c, s) + (1 − β) ε(∅, s) ] + (1 − λ) ε(∅, ∅)

λ = `guidance_scale`, β = `control_guidance_scale`. The guiders of diffusers combine predictions of one axis at a time,
so the rule stands here.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GuidanceTerm:
    """One network evaluation of the rule: its weight, and which of the two conditions it sees."""

    weight: float
    semantic: bool
    control: bool


def guidance_terms(guidance_scale: float, control_guidance_scale: float = 1.0) -> list[GuidanceTerm]:
    """The evaluations that the rule needs, those of weight zero left out.

    Args:
        guidance_scale: λ, the semantic scale.
        control_guidance_scale: β, the control scale.

    Returns:
        One term for λ = β = 1, two for β = 1 (classifier-free guidance), three in general. Weights sum to 1.

    Source: Berrada et al., 2024.
    """
    semantic, control = float(guidance_scale), float(control_guidance_scale)
    terms = [
        GuidanceTerm(semantic * control, semantic=True, control=True),
        GuidanceTerm(semantic * (1 - control), semantic=True, control=False),
        GuidanceTerm(1 - semantic, semantic=False, control=False),
    ]
    return [term for term in terms if term.weight != 0]


def combine_predictions(predictions: torch.Tensor, terms: list[GuidanceTerm]) -> torch.Tensor:
    """Weigh the predictions of `guidance_terms`.

    Args:
        predictions: (terms · batch, channels, height, width), the terms one after the other.
        terms: what `guidance_terms` returned.

    Returns:
        (batch, channels, height, width). A single term is returned untouched, so λ = β = 1 is the plain prediction
        bit for bit.
    """
    if len(terms) == 1:
        return predictions
    return sum(term.weight * part for term, part in zip(terms, predictions.chunk(len(terms)), strict=True))


def rescaled_guidance_scale(guidance_scale: float, from_resolution: float, to_resolution: float) -> float:
    """The semantic guidance scale that is best at another resolution: λ' = 1 + s (λ − 1) for an upscaling factor s.

    Args:
        guidance_scale: λ, best at `from_resolution`.
        from_resolution: pixels a side.
        to_resolution: pixels a side.

    Source: appendix of Berrada et al., 2024, as we read it; a sweep on one's own data says more.
    """
    return 1 + (guidance_scale - 1) * to_resolution / from_resolution
