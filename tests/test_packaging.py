"""Contents of the wheel and the sdist, and training from an installed wheel without a clone."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("improved_ldm", "training", "tests", "model_cards")
FILES = ("setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE", "CONTRIBUTING.md")
TINY = {
    "training.steps": 1,
    "training.batch_size": 4,
    "training.trackers": "[]",
    "training.cpu_threads": 1,
    "cache.passes": 0,
    "denoiser.options": "{hidden_size: 48, num_layers: 2, num_attention_heads: 2}",
    "sampling.num_inference_steps": 1,
    "evaluation.judge": "null",
}


def run(*command: str, folder: Path, **environment: str) -> str:
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the files of the clone, so that nothing is built in the clone."""
    folder = tmp_path_factory.mktemp("source")
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture(scope="module")
def installed(source, tmp_path_factory) -> Path:
    """A folder with the installed wheel, without its dependencies."""
    folder = tmp_path_factory.mktemp("installed")
    options = ("--no-deps", "--no-build-isolation", "-q")
    run(sys.executable, "-m", "pip", "wheel", ".", *options, "-w", "dist", folder=source)
    (wheel,) = (source / "dist").glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "-q", "--target", str(folder), str(wheel), folder=source)
    return folder


@pytest.mark.slow
def test_a_wheel_trains_without_a_clone(installed, tmp_path):
    environment = {"PYTHONPATH": str(installed), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    options = [f"--{key}={value}" for key, value in TINY.items()]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "-m"]
    script, output = "improved_ldm.training.train_t2i", tmp_path / "launched"
    run(*launch, script, *options, f"--output_dir={output}", folder=tmp_path, **environment)
    command = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["command"]
    assert command.startswith(f"accelerate launch -m {script} --training.steps=1")

    output, entry = tmp_path / "entered", str(installed / "bin" / "improved-ldm")
    run(sys.executable, entry, "train_t2i", *options, f"--output_dir={output}", folder=tmp_path, **environment)
    command = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["command"]
    assert command.startswith(f"python -m {script} --training.steps=1")


@pytest.mark.slow
def test_the_wheel_names_its_scripts(installed, tmp_path):
    command = [sys.executable, "-m", "improved_ldm", "train"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(installed)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "improved-ldm train: the first argument must be one of evaluate, look_at_data, publish, train_autoencoder, "
        "train_class_conditional, train_clip, train_judge, train_lora, train_t2i."
    )


@pytest.mark.slow
def test_the_sdist_can_be_tested(source):
    build = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    run(sys.executable, "-c", build, folder=source)
    (file,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()}
    for part in ("tests", "training"):
        held = {path.relative_to(source).as_posix() for path in (source / part).rglob("*") if path.is_file()}
        assert held <= names | {name for name in held if "__pycache__" in name}
    assert {"tests/conftest.py", "tests/hub/conftest.py", "training/train_t2i.py", "setup.py"} <= names
