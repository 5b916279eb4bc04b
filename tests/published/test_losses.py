"""The loss of each published recipe, its terms and the gradient of a training step are those of the published code."""

import pytest

from tests.published.comparison import difference, loss_terms, recorded_randomness, training_step
from tests.published.sources import SOURCES, numbers

TOLERANCE = 1e-5
LIKELIHOOD_TOLERANCE = 0.02  # of the bound at timestep 0, where differences of nearly equal float32 numbers remain
STEPS = [(name, number) for name in SOURCES for number in range(4)]


def tolerance(name: str, number: int, term: str) -> float:
    """The tolerance of a term, the loss or the gradient norm at one of the recorded timesteps."""
    if numbers(name)["loss.timesteps"][number] > 0 or name == "ldm":
        return TOLERANCE
    return TOLERANCE if term.endswith("mse") else LIKELIHOOD_TOLERANCE


@pytest.mark.parametrize(("name", "number"), STEPS)
def test_each_term_is_the_published_one(name, number):
    for term, pair in loss_terms(name, number).items():
        assert difference(*pair) <= tolerance(name, number, term), term


@pytest.mark.parametrize(("name", "number"), STEPS)
def test_loss_and_gradient_of_a_training_step_are_the_published_ones(name, number):
    for term, pair in training_step(name, number).items():
        assert difference(*pair) <= tolerance(name, number, term), term


@pytest.mark.parametrize("name", SOURCES)
def test_timesteps_at_the_recorded_quantiles_are_the_published_ones(name):
    objective, expected = SOURCES[name].make_objective(), numbers(name)["loss.timesteps"]
    for number, timestep in enumerate(expected):
        fractions = recorded_randomness(name, number).timestep_fractions()
        assert difference(objective.timestep_quantile(fractions), timestep.expand_as(fractions)) <= TOLERANCE
