from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import yaml
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from pydantic import BaseModel

from improved_ldm.settings import ConfigError, Section, parse_config, parse_config_or_exit
from improved_ldm.trainer.components import build_denoiser
from improved_ldm.trainer.config import AdapterRunConfig, RunConfig
from improved_ldm.trainer.same_run import check_same_run

CONFIGS = Path(__file__).parents[2] / "training" / "configs"


@pytest.mark.parametrize(
    "path", sorted({*CONFIGS.rglob("*.yaml")} - {*CONFIGS.glob("networks/*")}), ids=lambda path: path.stem
)
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
        (["steps"], "'steps' has no key"),
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
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    check_same_run(config.model_copy(update={"seed": 1}), tmp_path)  # nothing has been trained yet
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    longer = config.model_copy(update={"training": config.training.model_copy(update={"steps": 5})})
    check_same_run(longer, tmp_path)
    with pytest.raises(ValueError, match="`seed` was 0 and is 1"):
        check_same_run(config.model_copy(update={"seed": 1}), tmp_path)


def test_a_run_of_the_first_version_goes_on(tmp_path):
    """Its configuration has no `control_route`, and its published options are next to the others."""
    config = parse_config(
        RunConfig,
        ["--denoiser.name", "pixart", "--denoiser.options", "{published: {size_conditions: true}}"],
    )
    values = config.model_dump(mode="json")
    del values["denoiser"]["control_route"]
    values["denoiser"]["options"] = {"size_conditions": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    check_same_run(config, tmp_path)
    other = config.denoiser.model_copy(update={"control_route": "tokens"})
    with pytest.raises(ValueError, match=r"`denoiser\.control_route` was 'norm' and is 'tokens'"):
        check_same_run(config.model_copy(update={"denoiser": other}), tmp_path)


def test_the_route_of_the_control_reaches_the_denoiser(autoencoder):
    for route in ("norm", "tokens"):
        config = parse_config(
            RunConfig,
            ["--denoiser.control_route", route, "--denoiser.size", "tiny/2", "--transform.resolution", "32"],
        )
        assert build_denoiser(config, autoencoder, num_classes=3).config.control_route == route


SCRIPTS = (
    "train_t2i",
    "train_lora",
    "evaluate",
    "train_autoencoder",
    "train_clip",
    "train_judge",
    "publish",
    "look_at_data",
)


def config_class(script: str) -> type[Section]:
    """The configuration class of a script."""
    module = import_module(f"training.{script}")
    runs = ("RunConfig", "AdapterRunConfig", "AutoencoderRunConfig", "ClipRunConfig", "JudgeRunConfig")
    names = ("Config", "EvaluateConfig", *runs)
    return next(getattr(module, name) for name in names if hasattr(module, name))


def described_keys(section: type[BaseModel], prefix: str = "--"):
    """The names of all keys with their descriptions, those of the elements of lists without a prefix."""
    for name, field in section.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        inner = [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]
        if field.annotation not in inner:
            yield f"{prefix}{name}", field.description
        for part in inner:
            yield from described_keys(part, f"{prefix}{name}." if part is field.annotation else "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_key(script, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config_or_exit(config_class(script), ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    shown, keys = " ".join(text.split()), list(described_keys(config_class(script)))
    assert len(keys) > 5
    for key, description in keys:
        assert description.strip() and "\n" not in description, key
        assert f"{key} {description}" in shown


def test_help_shows_types_choices_and_defaults(capsys):
    with pytest.raises(SystemExit):
        parse_config_or_exit(AdapterRunConfig, ["-h"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--optimizer.learning_rate Peak learning rate. [number; default: 0.0001]" in text
    assert "[one of constant, cosine; default: constant]" in text
    assert "--base Folder or Hub id of the pipeline that the adapter is for. [text; required]" in text


def test_a_section_stands_for_its_source():
    argv = ["--data", "runs/images", "--data.split", "test"]
    assert parse_config(RunConfig, argv, CONFIGS / "quickstart.yaml").data.source == "runs/images"


def test_a_bare_no_is_the_word_that_it_looks_like():
    assert parse_config(RunConfig, ["--training.mixed_precision", "no"]).training.mixed_precision == "no"


def test_two_equal_sides_are_one_number():
    config = parse_config(RunConfig, ["--transform.resolution", "[32, 32]"])
    assert config.transform.resolution == 32


@pytest.mark.filterwarnings("error")
def test_a_resolution_of_two_sides_is_kept_in_files():
    stages = (
        "[{resolution: [16, 32], steps: 60}, {resolution: [32, 64], steps: 60, crop_policy: crop_at_target_scale}]"
    )
    config = parse_config(RunConfig, ["--stages", stages])
    first, last = config.of_stage(0), config.of_stage(1)
    assert Path(first.output_dir).name == "stage-1-16x32" and first.transform.resolution == (16, 32)
    assert last.transform.target_scale == (32, 64)
    assert config.model_dump(mode="json")["stages"][0]["resolution"] == [16, 32]
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("resolution", [[16, 36], [36, 16]])
def test_both_sides_divide_into_patches(autoencoder, resolution):
    config = RunConfig.model_validate({"transform": {"resolution": resolution}, "denoiser": {"size": "tiny/4"}})
    message = f"`transform.resolution` is {resolution[0]}x{resolution[1]}; both sides must be multiples of 8 pixels"
    with pytest.raises(ValueError, match=message):
        build_denoiser(config, autoencoder, num_classes=3)


@pytest.mark.parametrize("name", get_available_trackers())
def test_installed_trackers_are_accepted(name):
    config = parse_config(RunConfig, ["--training.trackers", f"[{name}]"])
    assert config.training.trackers == (str(name),)


def test_trackers_that_do_not_exist_or_are_not_installed_are_refused():
    missing = next(name for name in LOGGER_TYPE_TO_CLASS if name not in map(str, get_available_trackers()))
    for name, message in ((missing, "which is not installed"), ("board", "it may have")):
        with pytest.raises(ConfigError, match=message):
            parse_config(RunConfig, ["--training.trackers", f"[{name}]"])
