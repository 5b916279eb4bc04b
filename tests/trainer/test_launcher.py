"""Settings of `accelerate launch` in real processes."""

import os
import subprocess
import sys

import pytest
import yaml

from improved_ldm.settings import ConfigError, parse_config
from improved_ldm.trainer.config import RunConfig, TrainingConfig
from improved_ldm.trainer.launcher_variables import LAUNCHER_VARIABLES
from improved_ldm.trainer.loop_config import LoopConfig
from tests.trainer.conftest import ROOT, load_script

START = """
import sys
from improved_ldm.trainer.config import RunConfig
from improved_ldm.settings import parse_config
from improved_ldm.trainer.run import start_run
run = start_run(parse_config(RunConfig, sys.argv[1:]))
print("started:", run.accelerator.mixed_precision, run.accelerator.gradient_accumulation_steps, run.images_per_step)
"""
PRECISION, ACCUMULATION = LAUNCHER_VARIABLES.values()

# (variables, keys, final output)
STARTS = [
    ({}, {}, "started: no 1 32"),
    ({PRECISION: "no"}, {}, "started: no 1 32"),
    ({PRECISION: "no"}, {"training.mixed_precision": "bf16"}, "started: bf16 1 32"),
    ({PRECISION: "bf16"}, {}, "started: bf16 1 32"),
    ({PRECISION: "bf16"}, {"training.mixed_precision": "bf16"}, "started: bf16 1 32"),
    ({ACCUMULATION: "4"}, {}, "started: no 1 128"),
    ({ACCUMULATION: "1"}, {"training.gradient_accumulation_steps": "2"}, "started: no 1 64"),
    ({ACCUMULATION: "auto"}, {}, "started: no 1 32"),
    ({"ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_USE_FSDP": "false"}, {}, "started: no 1 32"),
    (
        {PRECISION: "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29512"},
        {},
        "asked for several processes but starts",
    ),
    ({PRECISION: "bf16"}, {"training.mixed_precision": "no"}, "`training.mixed_precision` is 'no', but `accelerate"),
    (
        {ACCUMULATION: "4"},
        {"training.gradient_accumulation_steps": "2"},
        "`training.gradient_accumulation_steps` is 2",
    ),
    ({PRECISION: "fp8"}, {}, f"{PRECISION} is 'fp8'"),
    ({ACCUMULATION: "-3"}, {}, f"{ACCUMULATION} is '-3'"),
    ({ACCUMULATION: "many"}, {}, f"{ACCUMULATION} is 'many'"),
    ({PRECISION: "fp16"}, {}, "`training.mixed_precision` is 'fp16', which needs a GPU"),
    ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {}, "asks for `--dynamo_backend`"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "asks for `--use_deepspeed`"),
    ({"ACCELERATE_USE_FSDP": "true"}, {}, "asks for `--use_fsdp`"),
    ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "asks for `--use_megatron_lm`"),
    ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "asks for `--use_parallelism_config`"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Removes the process state of earlier runs and all variables of a launcher of the tests."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    for variable in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("variables, keys, expected", STARTS)
def test_each_setting_of_the_launcher_is_honoured_or_refused(tmp_path, monkeypatch, capsys, variables, keys, expected):
    from improved_ldm.trainer.run import start_run

    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    keys = {"output_dir": tmp_path / "run", "training.trackers": "[]", "training.cpu_threads": 1} | keys
    try:
        run = start_run(parse_config(RunConfig, [f"--{key}={value}" for key, value in keys.items()]))
    except ValueError as error:
        assert expected in str(error) and "\n" not in str(error)
        assert not (tmp_path / "run" / "config.yaml").exists()
        return
    accelerator = run.accelerator
    print("started:", accelerator.mixed_precision, accelerator.gradient_accumulation_steps, run.images_per_step)
    assert expected in capsys.readouterr().out
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["training"]
    assert kept["mixed_precision"] == accelerator.mixed_precision  # what was used, not what was left out


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, expected",
    [
        (["--mixed_precision", "bf16"], "started: bf16 1 32"),
        (["--mixed_precision", "fp16"], "which needs a GPU"),
        (["--dynamo_backend", "inductor"], "asks for `--dynamo_backend`"),
        (["--num_processes", "2"], "asked for several processes but starts one"),
    ],
)
def test_the_launcher_itself(tmp_path, options, expected):
    (tmp_path / "start.py").write_text(START, encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", *options]
    result = subprocess.run(
        [*command, tmp_path / "start.py", f"--output_dir={tmp_path / 'run'}", "--training.trackers=[]"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert expected in result.stdout + result.stderr


def test_a_folder_that_was_begun_before_the_default_was_the_launchers_goes_on(arguments, tmp_path, monkeypatch):
    script = load_script("train_t2i")
    script.main(arguments(**{"training.steps": 2}))
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))["training"]
    assert (kept["mixed_precision"], kept["gradient_accumulation_steps"]) == ("no", 1)
    script.main(arguments(**{"training.steps": 4}))
    monkeypatch.setenv(PRECISION, "bf16")
    with pytest.raises(ValueError, match=r"`training\.mixed_precision` was 'no' and is 'bf16'"):
        script.main(arguments(**{"training.steps": 6}))


def test_a_wrong_value_of_the_launcher_is_named_as_the_launcher_sets_it(monkeypatch):
    monkeypatch.setenv(PRECISION, "int4")
    with pytest.raises(ConfigError, match=f"{PRECISION} is 'int4'"):
        parse_config(RunConfig, ["--training.steps=3"])
    assert TrainingConfig(mixed_precision="bf16").mixed_precision == "bf16"


@pytest.mark.parametrize(
    "configuration, can_compile",
    [(TrainingConfig(steps=1), True), (LoopConfig(steps=1), False)],
    ids=["denoiser", "network"],
)
def test_only_a_training_that_can_compile_is_told_to(monkeypatch, configuration, can_compile):
    from improved_ldm.trainer.launcher import open_accelerator

    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="which is not supported") as refused:
        open_accelerator(configuration)
    assert ("--training.compile" in str(refused.value)) == can_compile
