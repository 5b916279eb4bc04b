"""The configurations of the published recipes have the objectives and samplers that are compared here."""

from pathlib import Path

import pytest

from improved_ldm.settings import parse_config
from improved_ldm.trainer.config import ObjectiveConfig, RunConfig
from tests.published.sources import SOURCES

CONFIGS = Path(__file__).parents[2] / "training" / "configs" / "published"
RECIPES = {
    "dit": ("dit_xl", "ddpm"),
    "mdt": ("mdt_v2_xl", "ddpm"),
    "pixart": ("pixart_xl", "dpm_solver"),
    "sd3": ("sd3_like", "euler"),
    "ldm": ("ldm4", "ddim"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_samples_as_compared(name):
    (recipe, method), source = RECIPES[name], SOURCES[name]
    config = parse_config(RunConfig, ["--config", str(CONFIGS / f"{recipe}.yaml")])
    compared, sampler = ObjectiveConfig(**source.objective).model_dump(), source.samplers[method]
    resolution = {"shift": config.objective.shift}  # depends on the resolution
    assert config.objective.model_dump() | resolution == compared | resolution
    assert config.sampling.guidance_options == sampler.guidance_options
    schedulers = [
        source.make_objective().sampling_scheduler(settings.sampler, settings.timestep_spacing)
        for settings in (config.sampling, sampler)
    ]
    assert type(schedulers[0]) is type(schedulers[1])
    assert schedulers[0].config == schedulers[1].config
