import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.conditioning.guidance import (
    GuidanceOptions,
    combine_predictions,
    guidance_terms,
    rescaled_guidance_scale,
)

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


@given(SCALE, st.one_of(st.just(1.0), SCALE), st.integers(1, 3))
def test_channels_that_are_not_guided_have_the_semantic_scale_1(scale, beta, num_guided):
    terms = guidance_terms(scale, beta, keeps_plain=True)
    stacked, both, semantic, _ = predictions(terms)
    found = combine_predictions(stacked, terms, num_guided=num_guided)
    plain = both if beta == 1 else beta * both + (1 - beta) * semantic
    assert_close(found[:, num_guided:], plain[:, num_guided:], rtol=1e-4, atol=1e-4)
    if beta == 1:
        assert torch.equal(found[:, num_guided:], both[:, num_guided:])
    guided = guidance_terms(scale, beta)
    expected = combine_predictions(predictions(guided)[0], guided)
    assert_close(found[:, :num_guided], expected[:, :num_guided], rtol=1e-4, atol=1e-3)


def test_the_power_cosine_is_the_published_one():
    options = GuidanceOptions.read({"schedule": "power_cosine", "power": 4})
    found = {timestep: options.scale_at(3.8, timestep) for timestep in (0, 222, 500)}
    assert found == pytest.approx({0: 3.8, 222: 1.83, 500: 1.03}, abs=0.01)


@given(st.floats(1, 20), st.floats(0.01, 10), st.floats(0, 1000))
def test_a_power_cosine_is_between_no_guidance_and_the_scale(scale, power, timestep):
    options = GuidanceOptions(schedule="power_cosine", power=power)
    assert 1 - 1e-9 <= options.scale_at(scale, timestep) <= scale + 1e-9
    assert options.scale_at(scale, 0) == pytest.approx(scale) and options.scale_at(scale, 1000) == 1


@given(st.floats(-5, 20), st.floats(0, 1000))
def test_an_interval_guides_only_inside(scale, timestep):
    options = GuidanceOptions.read({"schedule": "interval", "interval": [200, 700.5]})
    assert options.scale_at(scale, timestep) == (scale if 200 <= timestep <= 700.5 else 1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"channel": 3}, "`guidance_options` is"),
        ("power_cosine", "`guidance_options` is"),
        ({"channels": 0}, "`guidance_options.channels` is 0"),
        ({"channels": 2.5}, "`guidance_options.channels` is 2.5"),
        ({"channels": True}, "`guidance_options.channels` is True"),
        ({"schedule": "linear"}, "`guidance_options.schedule` is 'linear'"),
        ({"schedule": None}, "`guidance_options.schedule` is None"),
        ({"power": 4}, "`guidance_options.power` is given"),
        ({"schedule": "interval", "power": 4}, "`guidance_options.power` is given"),
        ({"schedule": "power_cosine", "interval": [1, 2]}, "`guidance_options.interval` is given"),
        ({"schedule": "power_cosine", "power": -1}, "`guidance_options.power` is -1"),
        ({"schedule": "power_cosine", "power": float("nan")}, "`guidance_options.power` is nan"),
        ({"schedule": "interval", "interval": [700, 200]}, "`guidance_options.interval` is"),
        ({"schedule": "interval", "interval": [0, 1001]}, "`guidance_options.interval`"),
        ({"schedule": "interval", "interval": [500]}, "`guidance_options.interval` is"),
        ({"schedule": "interval", "interval": 500}, "`guidance_options.interval` is"),
    ],
)
def test_guidance_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GuidanceOptions.read(options)
