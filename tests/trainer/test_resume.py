"""What can change between the parts of a run, and what a run reports about itself."""

import json
import shutil

import datasets
import pytest
import yaml

from improved_ldm.manifest import find_damage, write_manifest
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.reports import Progress
from improved_ldm.trainer.run import start_run
from tests.scripts import launch
from tests.trainer.conftest import load_script
from tests.trainer.test_kills import assert_same_run, history
from tests.trainer.test_stages import STAGES, staged

STREAMED = {"cache.passes": 0, "training.log_every": 3}


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("first", [1, 3, 4])
def test_the_history_of_parts_is_that_of_the_whole(arguments, tmp_path, first, passes):
    settings = STREAMED | {"cache.passes": passes, "training.steps": 7}
    script = load_script("train_t2i")
    script.main(arguments("whole", **settings))
    script.main(arguments("parts", **settings | {"training.steps": first}))
    script.main(arguments("parts", **settings))
    assert [record["step"] for record in history(tmp_path / "whole")] == [3, 6, 7]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    again = history(tmp_path / "parts")
    script.main(arguments("parts", **settings))  # nothing is left to do
    assert history(tmp_path / "parts") == again


def test_a_finished_run_counts_what_its_weights_have_seen(arguments, tmp_path, capsys):
    script = load_script("train_t2i")
    script.main(arguments(**STREAMED | {"training.steps": 4}))
    assert "1 process × batch 8 × accumulation 1 = 8 images per step" in capsys.readouterr().out
    script.main(arguments(**STREAMED | {"training.steps": 2}))
    assert "step 4 of 2 is done; no step is left to train" in capsys.readouterr().out
    assert metrics(tmp_path / "run")["images_seen"] == 32


@pytest.mark.parametrize("earlier", [1000.0, None], ids=["counted", "of an earlier version"])
def test_the_seconds_of_a_resumed_run_are_those_of_all_its_parts(arguments, tmp_path, earlier):
    script, checkpoint = load_script("train_t2i"), tmp_path / "run" / "checkpoints" / "step-00000002"
    script.main(arguments(**STREAMED | {"training.steps": 2}))
    file = checkpoint / "progress-rank0.json"
    progress = json.loads(file.read_text(encoding="utf-8"))
    assert 0 < progress.pop("seconds") < metrics(tmp_path / "run")["seconds"] + 0.1
    file.write_text(json.dumps(progress if earlier is None else progress | {"seconds": earlier}), encoding="utf-8")
    write_manifest(checkpoint)
    script.main(arguments(**STREAMED | {"training.steps": 4}))
    seconds = metrics(tmp_path / "run")["seconds"]
    assert 0 < seconds - (earlier or 0) < 1000


@pytest.mark.parametrize(
    ("tail", "said"),
    [
        ('{"step": 4, "im', "line 2 is left out"),
        ('\n{"step": 4}\n\x00\x00\x00', "line 4 is left out"),
        ("[1, 2]\n", "line 2 is left out"),
        ('{"step": 2, "note": "\u2028\u0085"}\n', None),
    ],
)
def test_a_line_of_the_history_that_was_cut_is_left_out(tmp_path, capsys, tail, said):
    run = start_run(RunConfig.model_validate({"output_dir": str(tmp_path), "training": {"trackers": [], "steps": 4}}))
    file = tmp_path / "history.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n' + tail, encoding="utf-8")
    Progress(run, 2)
    output = capsys.readouterr().out
    assert output.count("left out") == (said is not None)
    assert said is None or said in output
    lines = file.read_bytes().decode().split("\n")
    assert all(json.loads(line)["step"] <= 2 for line in lines[:-1]) and lines[-1] == ""


def test_data_that_has_changed_is_refused_or_said(arguments, images, tmp_path, capsys):
    data = shutil.copytree(images, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    script, settings = load_script("train_t2i"), STREAMED | {"data.source": data, "training.steps": 2}
    script.main(arguments(**settings))
    longer = settings | {"training.steps": 3}
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    script.main(arguments("copy", **longer))  # it also resumes in another folder
    rows = datasets.Dataset.from_parquet(str(data / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    rows.select(range(48)).to_parquet(data / "train.parquet")
    with pytest.raises(
        ValueError, match=r"has changed since .*: 1 file changed \(train.parquet\).*accept_changes true"
    ):
        script.main(arguments(**longer))
    capsys.readouterr()
    script.main(arguments(**longer | {"data.accept_changes": "true"}))
    assert "1 file changed (train.parquet); training resumes with the changed data" in capsys.readouterr().out
    script.main(arguments(**longer | {"training.steps": 4}))  # the accepted data is the data of the run from then on
    assert metrics(tmp_path / "run")["images_seen"] == 32


@pytest.mark.parametrize(
    ("key", "value"), [("data.shuffle_window", 16), ("training.batch_size", 4), ("data.num_workers", 1), ("seed", 3)]
)
def test_another_key_is_named(arguments, key, value):
    script = load_script("train_t2i")
    script.main(arguments(**STREAMED | {"training.steps": 1}))
    with pytest.raises(ValueError, match=rf"`{key}` was .* and is {value}\. Choose another"):
        script.main(arguments(**STREAMED | {"training.steps": 2, key: value}))


@pytest.mark.parametrize("recorded", [True, False])
def test_another_number_of_processes_is_one_line(arguments, tmp_path, recorded):
    script, settings = load_script("train_t2i"), STREAMED | {"training.steps": 1}
    script.main(arguments(**settings))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    record = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
    assert record == {"step": 1, "images": 8, "images_per_step": 8, "num_processes": 1}
    if recorded:
        (checkpoint / "checkpoint.json").write_text(json.dumps(record | {"num_processes": 2}), encoding="utf-8")
        write_manifest(checkpoint)
    else:  # like checkpoints without this record
        for name in ("checkpoint.json", "manifest.json"):
            (checkpoint / name).unlink()
        shutil.copyfile(checkpoint / "data-rank0.json", checkpoint / "data-rank1.json")
    with pytest.raises(
        ValueError, match=r"run of 2 processes, but this run has 1: launch it with `--num_processes 2`"
    ):
        script.main(arguments(**settings | {"training.steps": 2}))


@pytest.mark.slow
def test_one_process_more_is_one_line(arguments, tmp_path):
    load_script("train_t2i").main(arguments(**STREAMED | {"training.steps": 1}))
    process = launch(arguments(**STREAMED | {"training.steps": 2}), processes=2)
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0
    assert "holds a run of 1 process, but this run has 2: launch it with `--num_processes 1`" in output
    assert f'File "{load_script("train_t2i").__file__}"' not in output  # no traceback of the script's own


def test_a_staged_run_says_where_it_is_and_counts_all_images(arguments, tmp_path, capsys):
    script = load_script("train_t2i")
    script.main(staged(arguments, **STREAMED))
    said = capsys.readouterr().out
    assert "stage 1 of 2: 16 pixels, 4 steps" in said and "stage 2 of 2: 32 pixels, 4 steps" in said
    assert metrics(tmp_path / "run")["images_seen"] == 4 * 8 + 4 * 4
    assert [stage["images_seen"] for stage in metrics(tmp_path / "run")["stages"]] == [32, 16]
    assert metrics(tmp_path / "run" / "stage-1-16")["images_seen"] == 32
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "| images seen | 48, of them 32 at 16 pixels, 16 at 32 pixels |" in card
    script.main(staged(arguments, **STREAMED))
    said = capsys.readouterr().out
    assert "stage 1 of 2 is finished" in said and "step 4 of 4, stage 2 of 2 is done; no step is left" in said
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    script.main(staged(arguments, "moved", **STREAMED, stages=STAGES.replace("32, steps: 4", "32, steps: 5")))
    assert metrics(moved)["images_seen"] == 4 * 8 + 5 * 4


@pytest.mark.slow
def test_a_stage_whose_end_is_damaged_is_trained_to_its_end_again(arguments, tmp_path, capsys):
    script = load_script("train_t2i")
    script.main(staged(arguments, "whole", **STREAMED))
    script.main(staged(arguments, "run", **STREAMED))
    for path in (tmp_path / "run").iterdir():  # as if the second stage had not begun
        if path.name not in ("stage-1-16", "stages.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    end = tmp_path / "run" / "stage-1-16" / "checkpoints" / "step-00000004"
    (end / "ema.safetensors").write_bytes(b"")
    script.main(staged(arguments, "run", **STREAMED))
    said = capsys.readouterr().out
    assert (
        "step-00000004: ema.safetensors has 0 of" in said and "Step 2, the newest intact checkpoint, is used" in said
    )
    assert find_damage(end) is None
    for part in ("", "stage-1-16"):
        assert_same_run(tmp_path / "run" / part, tmp_path / "whole" / part)


@pytest.mark.parametrize(
    "stages",
    [
        STAGES.replace("}]", "}, {resolution: 64, steps: 2}]"),
        "[{resolution: 32, steps: 4}]",
        STAGES.replace("16", "8"),
        "[]",
    ],
    ids=["longer", "shorter", "other", "none"],
)
def test_another_list_of_stages_is_refused(arguments, tmp_path, stages):
    script = load_script("train_t2i")
    script.main(staged(arguments, **STREAMED))
    kept = yaml.safe_load((tmp_path / "run" / "stages.yaml").read_text(encoding="utf-8"))["stages"]
    with pytest.raises(
        ValueError, match=r"`stages` are .*, but .* holds a run of 2 at 16, 32 pixels, 2 of them started"
    ):
        script.main(staged(arguments, **STREAMED, stages=stages))
    assert yaml.safe_load((tmp_path / "run" / "stages.yaml").read_text(encoding="utf-8"))["stages"] == kept


def test_stages_are_not_put_before_a_run_without_them(arguments):
    script = load_script("train_t2i")
    script.main(arguments(**STREAMED | {"training.steps": 1}))
    with pytest.raises(ValueError, match=r"`stages` are 2 at 16, 32 pixels, but .* holds a run of 1 at 32 pixels"):
        script.main(staged(arguments, **STREAMED))
