"""Folders and repositories that include the code of their pipeline and load without the package."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import improved_ldm
from improved_ldm.hub.export import bundle, export_code
from improved_ldm.models.family import DENOISERS
from tests.hub.conftest import TOKEN

CALLS = {"class": {"class_labels": [0, 2]}, "text": {"prompt": ["a red coat", ""]}}
PROGRAM = """
import importlib.util, json, sys
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from safetensors.torch import save_file

assert importlib.util.find_spec("improved_ldm") is None
jobs, file, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # sums in another order are other sums
images = {}
for name, (source, call, upload) in json.loads(jobs).items():
    options = {}
    if upload:
        HfApi().create_repo(source)
        HfApi().upload_folder(repo_id=source, folder_path=upload)
        HfApi().create_tag(source, tag="v0.1")
        options["revision"] = "v0.1"
    pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline="pipeline", trust_remote_code=True, **options)
    assert type(pipe).__module__.startswith("diffusers_modules"), type(pipe)
    images[name] = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images
assert "improved_ldm" not in sys.modules
save_file(images, file)
"""

OF_DIFFUSERS = ("huggingface_hub", "numpy", "safetensors")  # files that are saved with it


def sample(pipe, call):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images


@pytest.fixture
def draw_without_package(hub, tmp_path):
    """Samples in an environment with the same libraries but without the package, and can push a folder."""
    folder = tmp_path / "clean"
    venv.create(folder / "venv", symlinks=True)
    (site_packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(path).iterdir():
            if "improved_ldm" not in entry.name and not (site_packages / entry.name).exists():
                (site_packages / entry.name).symlink_to(entry)

    def draw(jobs: dict[str, tuple[str, dict, str | None]]) -> dict[str, torch.Tensor]:
        file = folder / "images.safetensors"
        kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
        client = {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        python = [folder / "venv" / "bin" / "python", "-I"]  # -I: neither PYTHONPATH nor the working directory
        done = subprocess.run(
            [*python, "-c", PROGRAM, json.dumps(jobs), file, str(torch.get_num_threads())],
            env={**kept, **client},
            cwd=folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return load_file(file)

    return draw


@pytest.fixture
def saved(class_pipeline, text_pipeline, tmp_path):
    """Saves a tiny pipeline with its code, and returns its folder and an image sampled from it."""

    def save(name: str, kind: str) -> tuple[Path, torch.Tensor]:
        pipe = class_pipeline(name=name) if kind == "class" else text_pipeline(name=name, text_dim=96)
        pipe.save_pretrained(tmp_path / f"{name}_{kind}")
        export_code(tmp_path / f"{name}_{kind}")
        return tmp_path / f"{name}_{kind}", sample(pipe, CALLS[kind])

    return save


def test_every_backbone_draws_bit_equal_without_the_package(saved, draw_without_package):
    jobs, expected = {}, {}
    for name in DENOISERS:
        for kind, call in CALLS.items():
            folder, expected[f"{name}_{kind}"] = saved(name, kind)
            jobs[f"{name}_{kind}"] = (str(folder), call, None)
    jobs["repository"], expected["repository"] = ("user/model", call, str(folder)), expected[f"{name}_{kind}"]
    drawn = draw_without_package(jobs)
    assert drawn.keys() == expected.keys()
    for key, images in expected.items():
        assert images.isfinite().all() and images.std() > 0
        torch.testing.assert_close(drawn[key], images, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", ["dit", "unet"])
def test_the_code_changes_nothing_where_the_package_is_imported(saved, name):
    folder, expected = saved(name, "text")
    for loaded in (
        DiffusionPipeline.from_pretrained(folder),
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
    ):
        assert type(loaded) is improved_ldm.ImprovedLDMPipeline
        assert type(loaded.denoiser) is DENOISERS[name]
        torch.testing.assert_close(sample(loaded, CALLS["text"]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", improved_ldm.__all__)
def test_the_code_is_valid_and_stands_alone(name, tmp_path):
    file = tmp_path / "code.py"
    file.write_text(bundle(getattr(improved_ldm, name)), encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E9,F", "--target-version", "py311"]
    checked = subprocess.run([*command, file], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    tree = ast.parse(file.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    allowed = {"diffusers", "packaging", "peft", "torch", "transformers", *OF_DIFFUSERS, *sys.stdlib_module_names}
    assert {module.partition(".")[0] for module in imported} <= allowed
    optional = {node.module for part in tree.body if isinstance(part, ast.Try) for node in part.body}
    assert optional == {module for module in imported if module.partition(".")[0] == "peft"}


def test_the_files_say_what_they_are_and_are_the_same_each_time(saved):
    folder, _ = saved("unet", "class")
    files = [folder / "pipeline.py", folder / "unet" / "improved_ldm.py"]
    first = [file.read_bytes() for file in files]
    assert export_code(folder) == files
    assert [file.read_bytes() for file in files] == first
    for file in files:
        licence, title = file.read_text(encoding="utf-8").splitlines()[:2]
        assert licence == "# SPDX-License-Identifier: Apache-2.0"
        assert f"of improved_ldm {improved_ldm.__version__} in one file" in title
    assert b"class DiTDenoiser" not in b"".join(first) and b"class UNetDenoiser" in first[1]
    assert b"class UNetDenoiser" not in first[0]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from improved_ldm.models.layers import Attention\nNORM_EPS = 1e-5", "`NORM_EPS` is both"),
        ("from improved_ldm.models.layers import Attention\nfrom math import pi as Attention", "`Attention` is both"),
        ("from improved_ldm.models.layers import Attention as A", "line 3: .* without renaming"),
        ("import improved_ldm.models.layers", "line 3: "),
        ("from improved_ldm import DiTDenoiser", "line 3: "),
        ("def later():\n    from improved_ldm.models.layers import Attention", "line 4: "),
    ],
)
def test_modules_that_cannot_become_one_file_are_an_error(monkeypatch, tmp_path, source, problem):
    monkeypatch.setattr(improved_ldm, "__path__", [*improved_ldm.__path__, str(tmp_path)])
    (tmp_path / "addition.py").write_text(f'"""An addition."""\n\n{source}\n', encoding="utf-8")
    root = type("Addition", (), {"__module__": "improved_ldm.addition"})
    with pytest.raises(ValueError, match=problem):
        bundle(root)


def test_another_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"it must contain the model_index\.json of an ImprovedLDMPipeline"):
        export_code(tmp_path)
