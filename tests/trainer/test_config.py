from pathlib import Path

import pytest
import yaml

from improved_ldm.trainer.config import AdapterRunConfig, ConfigError, RunConfig, parse_config, parse_config_or_exit
from improved_ldm.trainer.state import check_same_run

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path):
    config_class = AdapterRunConfig if path.stem.startswith("lora_") else RunConfig
    assert parse_config(config_class, ["--config", str(path)]).output_dir.startswith("runs/")


def test_command_line_wins_over_file():
    config = parse_config(
        RunConfig, ["--optimizer.learning_rate", "3e-4", "--training.steps=7"], CONFIGS / "quickstart.yaml"
    )
    assert (config.optimizer.learning_rate, config.training.steps) == (3e-4, 7)
    assert config.transform.resolution == 32


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.step", "3"], "`training.step` is not a key; the nearest valid key is `training.steps`"),
        (["--denoisr.name", "dit"], "nearest valid key is `denoiser`"),
        (["--learning_rate", "1"], "nearest valid key is `optimizer.learning_rate`"),
        (["--training.steps", "many"], "`training.steps` is 'many': Input should be a valid integer"),
        (["--training.steps", "0"], "`training.steps` is 0: Input should be greater than or equal to 1"),
        (["--denoiser.conditioning", "entangled"], "'disentangled' or 'published'"),
        (["--training.steps"], "--training.steps has no value"),
        (["steps"], "'steps' stands alone"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: there is no such file"),
        (["--seed.value", "3", "--seed", "1", "--seed.value.x", "1"], "is not a section"),
    ],
)
def test_bad_arguments_are_named(argv, message):
    with pytest.raises(ConfigError) as error:
        parse_config(RunConfig, argv)
    assert message in str(error.value)


def test_a_folder_of_another_run_is_refused(tmp_path):
    config = RunConfig()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    check_same_run(config.model_copy(update={"seed": 1}), tmp_path)  # nothing was trained yet
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 5})})
    check_same_run(longer, tmp_path)
    with pytest.raises(ValueError, match="`seed` was 0 and is 1"):
        check_same_run(config.model_copy(update={"seed": 1}), tmp_path)


def test_help_lists_every_key_and_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config_or_exit(RunConfig, ["--help"])
    assert stop.value.code == 0
    assert "--optimizer.learning_rate  float  (default: 0.0001)" in capsys.readouterr().out


def test_a_bare_no_is_the_word_that_it_looks_like():
    assert parse_config(RunConfig, ["--training.mixed_precision", "no"]).training.mixed_precision == "no"
