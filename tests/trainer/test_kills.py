"""Runs that are killed at any moment resume to the weights, images and history of an uninterrupted run."""

import contextlib
import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from improved_ldm.trainer.meter import MEASURED
from tests.data.test_indexed import write_folder
from tests.scripts import ScriptProcess, launch
from tests.trainer.conftest import OPTIONS, load_script

TIMEOUT = 240


@dataclass(frozen=True)
class Scenario:
    """A run and the moment when it is killed.

    Args:
        moment: Glob pattern in the run's folder; the run is killed when a new file matches.
        script: Script of training/.
        settings: Settings of the run.
        kills: Number of kills.
        processes: Number of processes.
    """

    moment: str
    script: str = "train_t2i"
    settings: dict[str, Any] = field(default_factory=dict)
    kills: int = 1
    processes: int = 2


SAVING, IN_A_STEP = "checkpoints/unfinished-*/model.safetensors", "checkpoints/step-*[4-9]"
STREAMED, CACHED = {"cache.passes": 0}, {"cache.passes": 1}
MIXED = {
    "data.sources": "[{source: %s, weight: 3}, {source: %s}]",
    "transform.resolution": 32,
    "transform.buckets": "true",
    "transform.bucket_step": 8,
}
STAGES = "[{resolution: 16, steps: 5}, {resolution: 32, steps: %d, batch_size: 4}]"
SCENARIOS = {
    "cached-saving": Scenario(SAVING, settings=CACHED),
    "cached-saving-alone": Scenario(SAVING, settings=CACHED, processes=1),
    "streamed-stepping": Scenario(IN_A_STEP, settings=STREAMED),
    "streamed-stepping-alone": Scenario(IN_A_STEP, settings=STREAMED, processes=1),
    "encoding": Scenario("cache/*.unfinished-by-*", settings=CACHED),
    "workers-saving": Scenario(SAVING, settings=STREAMED | {"data.num_workers": 2}),
    "accumulation-stepping": Scenario(
        IN_A_STEP, settings=STREAMED | {"training.batch_size": 4, "training.gradient_accumulation_steps": 2}
    ),
    "unet-saving": Scenario(SAVING, settings=CACHED | {"denoiser.name": "unet"}, processes=1),
    "mdt-stepping": Scenario(IN_A_STEP, settings=CACHED | {"denoiser.name": "mdt"}, processes=1),
    "classes-saving": Scenario(SAVING, "train_class_conditional", STREAMED, processes=1),
    "lora-stepping": Scenario(IN_A_STEP, "train_lora", CACHED, processes=1),
    "between-stages": Scenario("stage-1-16/metrics.json", settings=STREAMED | {"stages": STAGES}),
    "second-stage-saving": Scenario(SAVING, settings=STREAMED | {"stages": STAGES}),
    "buckets-stepping": Scenario(IN_A_STEP, settings=STREAMED | MIXED),
    "buckets-saving": Scenario(SAVING, settings=CACHED | MIXED | {"data.num_workers": 2}),
    "killed-twice": Scenario(IN_A_STEP, settings=STREAMED, kills=2),
}


@pytest.fixture(scope="module")
def base(images, tmp_path_factory) -> Path:
    """A small pipeline for adapters."""
    folder = tmp_path_factory.mktemp("base")
    settings = ["--training.steps=1", "--training.batch_size=4", "--training.trackers=[]", "--training.cpu_threads=1"]
    settings += ["--cache.passes=0", "--evaluation.judge=null", "--sampling.num_inference_steps=1"]
    settings += [f"--data.source={images / 'train.parquet'}", f"--denoiser.options={{{OPTIONS['dit']}}}"]
    load_script("train_t2i").main([*settings, f"--output_dir={folder}"])
    return folder


@pytest.fixture(scope="module")
def sets(images, tmp_path_factory) -> tuple[Path, Path]:
    """A set of images of several sizes, and one of equal sizes."""
    return write_folder(tmp_path_factory.mktemp("sizes") / "set", 37), images / "train.parquet"


@pytest.fixture
def argv(arguments, base, sets) -> Callable[[Scenario, str, int], list[str]]:
    """The arguments of a scenario's run with an output folder and a number of steps."""

    def make(scenario: Scenario, output: str, steps: int) -> list[str]:
        settings = {"training.log_every": 3, "training.steps": steps} | scenario.settings
        if "stages" in settings:
            settings["stages"] %= settings.pop("training.steps")
        words = arguments(output, **settings)
        if "data.sources" in settings:
            given = f"--data.sources={settings['data.sources'] % sets}"
            words = [given, *(word for word in words if not word.startswith("--data.source"))]
        if scenario.script == "train_lora":
            words = [word for word in words if not word.startswith(("--denoiser", "--sampling"))]
            words += [f"--base={base}", "--lora.rank=2"]
        return words

    return make


def kill(process: ScriptProcess):
    """Kill a process and its children, workers first, because the launcher would terminate them gracefully."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    for one in (*everyone, process):
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


def kill_at(moment: str, folder: Path, words: list[str], script: str, processes: int):
    """Start a run and kill all its processes when a new file matches in its folder."""
    known = set(folder.glob(moment))
    process = launch(words, script, processes)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not set(folder.glob(moment)) - known:
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{moment} did not appear"
            time.sleep(0.002)
    finally:
        kill(process)
    process.communicate()


def run(words: list[str], script: str, processes: int):
    """Run to the end, in this process if a single process is enough."""
    if processes == 1:
        return load_script(script).main(words)
    process = launch(words, script, processes)
    try:
        output = process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, output


def history(folder: Path) -> list[dict[str, float]]:
    """The records of a run without values that depend on the time."""
    lines = (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def assert_same_run(one: Path, other: Path):
    """Check that all weights, images and records are equal."""
    weights = [
        {file.relative_to(folder): load_file(file) for file in sorted(folder.glob(pattern))}
        for folder in (one, other)
        for pattern in ("*/diffusion_pytorch_model.safetensors", "*.safetensors")
    ]
    for mine, theirs in zip(weights[:2], weights[2:], strict=True):
        assert mine.keys() == theirs.keys()
        for name, tensors in mine.items():
            assert all(tensor.equal(theirs[name][key]) for key, tensor in tensors.items()), name
    assert (one / "samples.png").read_bytes() == (other / "samples.png").read_bytes()
    assert history(one) == history(other)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_run_ends_as_an_unbroken_one(argv, tmp_path, name):
    scenario = SCENARIOS[name]
    for _ in range(scenario.kills):
        words = argv(scenario, "killed", 100_000)
        kill_at(scenario.moment, tmp_path / "killed", words, scenario.script, scenario.processes)
    reached = max((int(path.name[5:]) for path in tmp_path.glob("killed/checkpoints/step-*")), default=0)
    for output in ("killed", "whole"):
        run(argv(scenario, output, reached + 4), scenario.script, scenario.processes)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    if "stages" in scenario.settings:
        assert_same_run(tmp_path / "killed" / "stage-1-16", tmp_path / "whole" / "stage-1-16")
    leftovers = [*tmp_path.glob("killed/**/*unfinished*"), *tmp_path.glob("killed/**/run.lock*")]
    assert not leftovers
