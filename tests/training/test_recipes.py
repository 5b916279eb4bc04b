"""The published recipes: at a small scale only size, data and steps change, and each trains and samples as it says."""

import itertools
import json

import pytest
from diffusers import DiffusionPipeline

from improved_ldm.settings import parse_config
from improved_ldm.trainer.config import RunConfig
from reproduce import TRAINERS
from reproduction.tables import RECIPE, RECIPES, SCALES, load_tables
from tests.training.test_reproduce import TINY, flat

TABLE = load_tables()["recipes"]
PUBLISHED = [setting for setting in TABLE.settings if setting.endswith("published recipe")]
LDM, *OTHERS = PUBLISHED
OF_SIZE = (  # keys, or beginnings of them, of size, data, steps and of what is counted in steps
    *("data.", "cache.", "autoencoder.", "text.pretrained", "text.max_tokens", "transform.resolution", "evaluation."),
    *("denoiser.size", "denoiser.options", "optimizer.warmup_steps", "optimizer.ema_decay", "optimizer.ema_every"),
    *("training.steps", "training.batch_size", "training.gradient_", "training.mixed_precision", "training.compile"),
    *("training.checkpoint_every", "training.keep_checkpoints", "training.log_every", "training.trackers"),
    *("training.cpu_threads", "sampling.every", "sampling.num_inference_steps"),
)
TINY_RUN = {key: value for key, value in TINY.items() if not key.startswith(("denoiser.", "evaluation."))} | {
    "optimizer.warmup_steps": 1,
    "sampling.guidance_scale": 2.0,
    "evaluation.judge": "null",
}
SCHEDULERS = {
    "LDM-4": ("DDIMScheduler", {"beta_start": 0.0015, "timestep_spacing": "leading", "steps_offset": 1}),
    "DiT": ("DDPMScheduler", {"beta_schedule": "linear", "variance_type": "learned_range"}),
    "mDT-v2": ("DDPMScheduler", {"beta_schedule": "linear", "variance_type": "learned_range"}),
    "PixArt-α": ("DPMSolverMultistepScheduler", {"beta_schedule": "linear"}),
    "SD3-like": ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("setting", TABLE.settings)
def test_a_scale_changes_size_data_and_steps_only(setting, scale):
    own = TABLE.settings[setting]
    recipe = flat(parse_config(RunConfig, [], RECIPES / f"{own[RECIPE]}.yaml").model_dump())
    config = flat(TABLE.run_config(setting, scale, []).model_dump())
    changed = {key for key in recipe.keys() | config.keys() if recipe.get(key) != config.get(key)}
    assert not [key for key in changed if key not in own and not key.startswith(OF_SIZE)]


def test_the_columns_are_the_published_mode_and_both_modes_of_one_recipe():
    for setting, own in TABLE.settings.items():
        config = TABLE.run_config(setting, "cpu", [])
        assert config.denoiser.conditioning == ("disentangled" if setting.endswith("improved") else "published")
        assert (own[RECIPE] == "paper") != (setting in PUBLISHED)
    assert {f"{path.stem}" for path in RECIPES.glob("*.yaml")} == {own[RECIPE] for own in TABLE.settings.values()}


@pytest.mark.parametrize("recipe", [TABLE.settings[setting][RECIPE] for setting in PUBLISHED])
def test_every_value_of_a_published_recipe_has_its_source(recipe):
    text = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8")
    for section in ("transform", "autoencoder", "objective", "optimizer", "sampling"):
        after = text.partition(f"\n{section}:\n")[2].splitlines()
        lines = itertools.takewhile(lambda line: line.startswith(" "), after)
        assert all("# " in line for line in lines), section


@pytest.mark.parametrize("setting", [pytest.param(LDM, marks=pytest.mark.slow), *OTHERS])
def test_a_published_recipe_trains_and_samples(setting, few_images, tmp_path):
    values = TINY_RUN | {"data.source": few_images, "output_dir": tmp_path / "run"}
    config = TABLE.run_config(setting, "cpu", [f"--{key}={value}" for key, value in values.items()])
    TRAINERS[TABLE.trainer_of(setting)](config)
    history = (tmp_path / "run" / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert all(record["loss"] > 0 and "skipped_steps" not in record for record in map(json.loads, history))
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    name, expected = SCHEDULERS[setting.partition(",")[0]]
    assert type(pipeline.scheduler).__name__ == name
    assert expected.items() <= dict(pipeline.scheduler.config).items()
    assert (pipeline.config.guidance_options or {}) == config.sampling.guidance_options
    assert (tmp_path / "run" / "samples.png").exists()
