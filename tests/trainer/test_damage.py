"""Damaged files: the newest intact checkpoint is used, and the damage of newer ones is reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from improved_ldm.manifest import MANIFEST, find_damage, write_manifest
from improved_ldm.trainer.checkpoints import checkpoint_steps, newest_whole
from tests.trainer.conftest import load_script
from tests.trainer.test_kills import assert_same_run

EVERY_STEP = {"training.log_every": 3, "training.checkpoint_every": 1, "training.keep_checkpoints": 3}
CACHED = {"cache.passes": 1, "training.steps": 2}


def flip(file: Path):
    """Flip one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path):
    """Keep only the first half of a file."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path):
    file.write_bytes(b"")


def grow(file: Path):
    with file.open("ab") as content:
        content.write(b"\x00")


def delete(file: Path):
    file.unlink()


DAMAGES = [
    *[(name, flip) for name in ("model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_0.pkl")],
    *[(name, cut) for name in ("model.safetensors", "ema.safetensors", "optimizer.bin", "random_states_1.pkl")],
    *[(name, empty) for name in ("model.safetensors", "data-rank0.json", "config.yaml", MANIFEST)],
    *[(name, delete) for name in ("ema.safetensors", "data-rank1.json", "checkpoint.json", MANIFEST)],
    *[(name, flip) for name in ("data-rank1.json", "progress-rank1.json", "history.jsonl", MANIFEST)],
    *[("optimizer.bin", grow), (MANIFEST, cut), ("data.json", flip)],
]


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory) -> Path:
    """The folder of a run with checkpoints of its last three steps, 4 to 6, to copy."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    load_script("train_t2i").main(words(images, folder))
    return folder


@pytest.fixture(scope="module")
def longer(images, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run with one more step."""
    folder = tmp_path_factory.mktemp("longer") / "run"
    load_script("train_t2i").main(words(images, folder, **{"training.steps": 7}))
    return folder


@pytest.fixture(scope="module")
def cached(images, tmp_path_factory) -> Path:
    """The folder of a run with a cache of latents."""
    folder = tmp_path_factory.mktemp("cached") / "run"
    load_script("train_t2i").main(words(images, folder, **CACHED))
    return folder


def words(images: Path, folder: Path, **overrides) -> list[str]:
    values = {
        "output_dir": folder,
        "data.source": images / "train.parquet",
        "cache.passes": 0,
        "training.steps": 6,
        "training.batch_size": 4,
        "training.trackers": "[]",
        "training.cpu_threads": 1,
        "denoiser.options": "{hidden_size: 48, num_layers: 1, num_attention_heads: 2}",
        "sampling.num_inference_steps": 1,
        "evaluation.judge": "null",
        **EVERY_STEP,
    } | overrides
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def two_ranks(trained, tmp_path) -> Path:
    """The checkpoints of the run, with the files of a second rank."""
    folder = shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints")
    for path in folder.iterdir():
        for file in list(path.glob("*-rank0.json")) + list(path.glob("*_0.pkl")):
            shutil.copyfile(file, file.with_name(file.name.replace("rank0", "rank1").replace("_0", "_1")))
        write_manifest(path)
    return folder


@pytest.mark.parametrize(("name", "damage"), DAMAGES, ids=lambda part: getattr(part, "__name__", part))
def test_the_checkpoint_before_a_damaged_one_is_taken(two_ranks, name, damage):
    damage(two_ranks / "step-00000006" / name)
    said = []
    assert newest_whole(two_ranks, said.append) == 5
    (line,) = said
    assert "step-00000006: " in line and "Step 5, the newest intact checkpoint, is used" in line
    assert (
        name in line or name == MANIFEST
    )  # a changed name or checksum in the manifest is reported as damage of its file


def test_several_damaged_ones_are_passed_over_and_none_is_an_error(two_ranks):
    said = []
    for step, damage in ((6, flip), (5, cut)):
        damage(two_ranks / f"step-{step:08d}" / "model.safetensors")
    assert newest_whole(two_ranks, said.append) == 4
    assert len(said) == 1 and "step-00000006: model" in said[0] and "step-00000005: model" in said[0]
    shutil.rmtree(two_ranks / "step-00000004")
    (two_ranks / "step-00000004").mkdir()
    with pytest.raises(
        ValueError, match=r"checkpoints holds no intact checkpoint: .*step-00000004: ema.safetensors is"
    ):
        newest_whole(two_ranks, print)


def test_checkpoints_without_manifests_are_taken_as_they_are(two_ranks):
    for path in two_ranks.iterdir():
        for name in (MANIFEST, "checkpoint.json", "history.jsonl", "data.json", "config.yaml", "progress-rank0.json"):
            (path / name).unlink()
    said = []
    assert newest_whole(two_ranks, said.append) == 6
    assert len(said) == 1 and "has no manifest.json" in said[0]
    empty(two_ranks / "step-00000006" / "ema.safetensors")
    assert newest_whole(two_ranks, print) == 5
    write_manifest(two_ranks / "step-00000004")
    assert newest_whole(two_ranks, print) == 4  # the later checkpoints were not finished


def test_files_that_nobody_recorded_do_not_count(two_ranks):
    (two_ranks / "step-00000006" / ".DS_Store").write_bytes(b"")
    assert newest_whole(two_ranks, print) == 6


@pytest.mark.parametrize(("name", "damage"), [("model.safetensors", flip), ("optimizer.bin", cut), (MANIFEST, delete)])
def test_a_run_goes_on_from_the_whole_one_and_writes_the_damaged_one_anew(
    images, trained, tmp_path, capsys, name, damage
):
    folder = shutil.copytree(trained, tmp_path / "run")
    damage(folder / "checkpoints" / "step-00000006" / name)
    load_script("train_t2i").main(words(images, folder))
    assert "Step 5, the newest intact checkpoint, is used" in capsys.readouterr().out
    assert_same_run(folder, trained)
    assert checkpoint_steps(folder / "checkpoints") == [4, 5, 6]
    assert all(find_damage(path) is None for path in (folder / "checkpoints").iterdir())


def test_the_last_whole_checkpoint_is_kept_while_damaged_ones_are_newer(images, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    for step in (5, 6):
        flip(folder / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    load_script("train_t2i").main(words(images, folder, **{"training.keep_checkpoints": 1, "training.steps": 5}))
    checkpoints = folder / "checkpoints"
    assert checkpoint_steps(checkpoints) == [5, 6]
    assert find_damage(checkpoints / "step-00000005") is None
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["images_seen"] == 5 * 4


def test_a_run_without_a_whole_checkpoint_is_an_error(images, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        cut(path / "ema.safetensors")
    with pytest.raises(ValueError, match=r"run/checkpoints holds no intact checkpoint: .*ema\.safetensors has"):
        load_script("train_t2i").main(words(images, folder))
    assert checkpoint_steps(folder / "checkpoints") == [4, 5, 6]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("config.yaml", empty),
        ("config.yaml", cut),
        ("config.yaml", delete),
        ("history.jsonl", empty),
        ("history.jsonl", flip),
        ("history.jsonl", cut),
    ],
)
def test_a_damaged_file_beside_the_checkpoints_does_not_end_a_run(images, trained, longer, tmp_path, name, damage):
    folder = shutil.copytree(trained, tmp_path / "run")
    damage(folder / name)
    load_script("train_t2i").main(words(images, folder, **{"training.steps": 7}))
    assert_same_run(folder, longer)
    with pytest.raises(ValueError, match="`seed` was 0 and is 1"):
        load_script("train_t2i").main(words(images, folder, seed=1))


@pytest.mark.parametrize("content", ["", "a: [1", "- 1"])
def test_an_unreadable_configuration_without_a_copy_is_named(images, trained, tmp_path, content):
    folder = shutil.copytree(trained, tmp_path / "run")
    for path in (folder / "checkpoints").iterdir():
        (path / "config.yaml").unlink()
    (folder / "config.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml holds no configuration, and no checkpoint holds a copy"):
        load_script("train_t2i").main(words(images, folder))


def damage_of_cache(damage: Callable[[Path], None], pattern: str) -> Callable[[Path], None]:
    return lambda folder: damage(next(folder.glob(pattern)))


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (damage_of_cache(flip, "*.safetensors"), "differs from its checksum"),
        (damage_of_cache(cut, "*.safetensors"), "bytes"),
        (damage_of_cache(delete, "*.safetensors"), "is missing"),
        (damage_of_cache(cut, MANIFEST), "cannot be read"),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "it holds no shards"),
    ],
    ids=["flipped", "cut", "deleted", "manifest", "emptied"],
)
def test_a_damaged_cache_is_named_and_written_anew(images, cached, tmp_path, capsys, damage, what):
    caches = shutil.copytree(cached / "cache", tmp_path / "cache")
    (cache,) = caches.iterdir()
    damage(cache)
    run = tmp_path / "run"
    load_script("train_t2i").main(words(images, run, **CACHED, **{"cache.folder": caches}))
    said = capsys.readouterr().out
    assert f"the cache {cache} is damaged: " in said and what in said and "it is written again" in said
    assert find_damage(cache) is None
    assert_same_run(run, cached)
