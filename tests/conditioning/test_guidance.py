import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.conditioning.guidance import combine_predictions, guidance_terms, rescaled_guidance_scale

SCALE = st.floats(-20, 20)


def predictions(terms):
    """ε(c, s), ε(∅, s) or ε(∅, ∅) for each guidance term, and all three by name."""
    generator = torch.Generator().manual_seed(0)
    both, semantic, neither = torch.randn(3, 2, 4, 3, 3, generator=generator)
    by_term = {(True, True): both, (True, False): semantic, (False, False): neither}
    return torch.cat([by_term[term.semantic, term.control] for term in terms]), both, semantic, neither


@pytest.mark.parametrize(("scales", "count"), [((1, 1), 1), ((5, 1), 2), ((1, 3), 2), ((5, 3), 3), ((0, 7), 1)])
def test_only_evaluations_that_matter_are_asked_for(scales, count):
    assert len(guidance_terms(*scales)) == count


@given(SCALE, SCALE)
def test_weights_sum_to_one(semantic, control):
    assert sum(term.weight for term in guidance_terms(semantic, control)) == pytest.approx(1, abs=1e-9)


def test_unit_scales_return_the_plain_prediction_bit_for_bit():
    terms = guidance_terms(1, 1)
    stacked, both, _, _ = predictions(terms)
    assert torch.equal(combine_predictions(stacked, terms), both)


@given(SCALE)
def test_unit_control_scale_is_classifier_free_guidance(scale):
    terms = guidance_terms(scale)
    stacked, both, _, neither = predictions(terms)
    assert_close(combine_predictions(stacked, terms), neither + scale * (both - neither), rtol=1e-4, atol=1e-4)


@given(SCALE, SCALE)
def test_both_scales_follow_the_rule(scale, beta):
    terms = guidance_terms(scale, beta)
    stacked, both, semantic, neither = predictions(terms)
    expected = scale * (beta * both + (1 - beta) * semantic) + (1 - scale) * neither
    assert_close(combine_predictions(stacked, terms), expected, rtol=1e-4, atol=1e-3)


@given(st.floats(1, 20), st.floats(1, 8))
def test_no_guidance_stays_none_and_the_excess_grows_with_the_resolution(scale, factor):
    assert rescaled_guidance_scale(1.0, 256, 256 * factor) == 1.0
    rescaled = rescaled_guidance_scale(scale, 256, 256 * factor)
    assert rescaled - 1 == pytest.approx((scale - 1) * factor, abs=1e-9)
