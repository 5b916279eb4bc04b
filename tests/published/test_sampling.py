"""The pipeline arrives where the published samplers arrive, from the same noise and with the same guidance."""

import pytest

from tests.published.comparison import difference, trajectory
from tests.published.sources import SOURCES, numbers

TOLERANCE = 1e-5
# PixArt-α's DPM-Solver asks the network for fractions of a timestep, that of diffusers for whole ones
FRACTIONS = {"network": 5e-3, "function": 1e-3}
TRAJECTORIES = [
    pytest.param(name, kind, sampler, id=f"{name}-{kind}-{sampler}")
    for name in SOURCES
    for kind, sampler in (key.split(".")[1:] for key in sorted(numbers(name)) if key.count(".") == 2)
    if not sampler.startswith(("latents", "dpmpp_2m"))
]


@pytest.mark.parametrize(("name", "kind", "sampler"), TRAJECTORIES)
def test_latents_are_the_published_ones(name, kind, sampler):
    ours, published = trajectory(name, kind, sampler)
    tolerance = FRACTIONS[kind] if sampler == "dpm_solver_20" else TOLERANCE
    for step in range(2):  # after half of the steps, and after all
        assert difference(ours[step], published[step]) <= tolerance


@pytest.mark.parametrize(
    ("name", "sampler", "change"),
    [
        ("dit", "ddpm_50", {"guidance_options": {}}),
        ("mdt", "ddpm_50", {"guidance_options": {"channels": 3}}),
        ("pixart", "ddpm_50", {"guidance_options": {}}),
        ("pixart", "dpm_solver_20", {"guidance_options": {"channels": 3}}),
        ("sd3", "euler_50", {"guidance_scale": 4.4}),
        ("ldm", "ddim_50", {"timestep_spacing": "trailing"}),
    ],
)
def test_another_sampler_arrives_elsewhere(name, sampler, change):
    assert difference(*trajectory(name, "function", sampler, **change)) > 5e-3


def test_no_sampler_takes_the_published_second_order_steps_of_a_flow():
    """diffusers has no scheduler with the steps of `dpmpp_2m` on a flow; its DPM-Solver arrives nearby."""
    assert 1e-3 < difference(*trajectory("sd3", "function", "dpmpp_2m_50")) < 0.05
