"""Files of a run that can be published name no local folders, and the run still resumes as the same run."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline

from improved_ldm.hub.content import folder_content
from improved_ldm.lineage import stage_folders
from improved_ldm.trainer.checkpoints import CONFIG
from tests.trainer.conftest import ROOT, load_script

STAGES = "[{{resolution: 16, steps: 2}}, {{resolution: 32, steps: 2, source: '{source}'}}]"


def run(name: str, *arguments: str):
    """Runs a script of training/ as a process, so that it records a real command."""
    script = [sys.executable, str(ROOT / "training" / f"{name}.py"), *arguments]
    done = subprocess.run(script, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_names_no_folders(folder: Path, *local: Path):
    named = [
        (name, place)
        for name, file in folder_content(folder).items()
        for place in (*local, Path.home(), Path.cwd(), ROOT)
        if f"{place}".encode() in file.read_bytes()
    ]
    assert named == []


def kept(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_what_is_published_of_a_run_names_no_local_folders(arguments, images, tmp_path):
    run("train_t2i", *arguments("before", **{"transform.resolution": 16, "training.steps": 2}))
    words = arguments(
        stages=STAGES.format(source=images / "train.parquet"),
        **{
            "denoiser.pretrained": tmp_path / "before",
            "denoiser.subfolder": "transformer",
            "text.pretrained": ROOT / "improved_ldm" / "assets" / "clip",
            "cache.folder": tmp_path / "caches",
        },
    )
    run("train_t2i", *words)
    folder = tmp_path / "run"
    (first,) = stage_folders(folder)
    for part in (tmp_path / "before", first, folder):
        assert_names_no_folders(part, tmp_path, images)
        assert f'from_pretrained(".../{part.name}")' in (part / "README.md").read_text(encoding="utf-8")
    low, high = (kept(part / CONFIG) for part in (first, folder))
    assert low["output_dir"] == ".../stage-1-16" == high["after"]["source"]
    assert high["data"]["source"] == kept(folder / "stages.yaml")["stages"][1]["source"] == ".../train.parquet"
    exact = kept(folder / "checkpoints" / "step-00000002" / CONFIG)
    assert exact["data"]["source"] == str(images / "train.parquet") and exact["output_dir"] == str(folder)
    lineage = DiffusionPipeline.from_pretrained(folder).config.lineage
    assert [record["source"] for record in lineage] == [".../before", ".../stage-1-16"]
    run("train_t2i", *words)  # it is recognised as the same run


@pytest.mark.slow
def test_what_is_published_of_an_adapter_names_no_local_folders(arguments, images, tmp_path):
    run("train_t2i", *arguments("base", **{"transform.resolution": 16, "training.steps": 2}))
    words = [word for word in arguments(**{"cache.passes": 0}) if not word.startswith(("--denoiser", "--sampling"))]
    run("train_lora", *words, f"--base={tmp_path / 'base'}", "--lora.text_encoder=true")
    folder = tmp_path / "run"
    assert_names_no_folders(folder, tmp_path, images)
    assert kept(folder / CONFIG)["base"] == ".../base"
    assert "| base | `.../base` |" in (folder / "README.md").read_text(encoding="utf-8")


def test_places_are_compared_exactly(arguments, images, tmp_path):
    """Two sets of the same name in different folders are different sets."""
    script = load_script("train_t2i")
    script.main(arguments(**{"training.steps": 2}))
    (tmp_path / "train.parquet").write_bytes((images / "train.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"`data\.source` was"):
        script.main(arguments(**{"training.steps": 4, "data.source": tmp_path / "train.parquet"}))


@pytest.mark.parametrize("exact", [True, False])
def test_a_run_whose_checkpoints_hold_no_configuration_goes_on(arguments, tmp_path, exact):
    """Only the folder has it, with exact places as written by other versions, or with shareable places."""
    script, folder = load_script("train_t2i"), tmp_path / "run"
    script.main(arguments(**{"training.steps": 2}))
    checkpoint = folder / "checkpoints" / "step-00000002"
    if exact:
        (checkpoint / CONFIG).replace(folder / CONFIG)
    for file in (CONFIG, "manifest.json", "checkpoint.json"):
        (checkpoint / file).unlink(missing_ok=True)
    script.main(arguments(**{"training.steps": 4}))
    assert kept(folder / "checkpoints" / "step-00000004" / CONFIG)["output_dir"] == str(folder)
    assert kept(folder / CONFIG)["output_dir"] == ".../run"
