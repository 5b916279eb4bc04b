import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import reproduce
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.trainer.components import build_denoiser, load_autoencoder, load_text_encoder, text_dims
from improved_ldm.trainer.config import AutoencoderConfig, TextConfig
from reproduction.curves import images_to_reach
from reproduction.intervals import compare, mean_and_interval
from reproduction.report import markdown
from reproduction.summary import ABOUT, write_summary
from reproduction.tables import RECIPE, SCALES, load_tables

RESULTS = Path(reproduce.__file__).parent / "results"
TABLES = load_tables()
RECORDS = sorted(file for name in TABLES for file in (RESULTS / name).glob("?pu.json"))
TINY = {
    "training.steps": 3,
    "training.batch_size": 8,
    "training.cpu_threads": 1,
    "denoiser.options": "{hidden_size: 24, num_layers: 1, num_attention_heads: 2}",
    "sampling.num_inference_steps": 2,
    "evaluation.num_coverage_samples": 20,
    "evaluation.num_detail_samples": 4,
}


@pytest.fixture
def reproduce_tiny(tmp_path, few_images):
    """Runs a table on a few real images and returns its record."""

    def run(name, *settings, seeds=("0",), **changes):
        values = {"data.source": few_images, **TINY, **changes}
        folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        options = [f"--{key}={value}" for key, value in values.items()]
        reproduce.main([name, *folders, "--seeds", *seeds, "--settings", *settings, *options])
        return json.loads((tmp_path / "results" / name / "cpu.json").read_text(encoding="utf-8"))

    return run


def runs_in(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("runs/cpu/runs/*/metrics.json")}


@pytest.mark.slow
def test_a_table_goes_on_where_it_stopped_and_shares_its_runs(reproduce_tiny, tmp_path):
    reproduce_tiny("control_parametrisation", "constant", "cosine")
    first = runs_in(tmp_path)
    assert len(first) == 2
    record = reproduce_tiny("control_parametrisation", "constant", "cosine", seeds=("0", "1"))
    second = runs_in(tmp_path)
    assert len(second) == 4 and first.items() <= second.items()
    assert record["seeds"] == [0, 1] and record["scale"] == "cpu" and record["command"].startswith("python ")
    assert record["measured_with"]["features"]["name"] == "embedded:judge"
    assert len(record["measured_with"]["features"]["sha256"]) == 64
    written = tmp_path / "results" / "control_parametrisation"
    assert (written / "cpu.md").read_text(encoding="utf-8") == markdown(record, "cpu.png")
    with Image.open(written / "cpu.png") as image:
        assert min(image.size) > 200
    for setting in record["settings"].values():
        assert len(setting["fid"]["seeds"]) == 2
        assert setting["fid"]["low"] < setting["fid"]["mean"] == np.mean(setting["fid"]["seeds"])

    shared = reproduce_tiny("control_parts", "none", "all", seeds=("0", "1"))  # all parts, cosine: measured above
    third = runs_in(tmp_path)
    assert len(third) == 6 and second.items() <= third.items()
    assert shared["settings"]["all"]["fid"] == record["settings"]["cosine"]["fid"]

    at_inference = reproduce_tiny("size_at_inference", "14 px", "28 px", seeds=("0", "1"))
    assert runs_in(tmp_path) == third
    assert at_inference["settings"]["28 px"]["fid"]["seeds"] == record["settings"]["cosine"]["fid"]["seeds"]
    assert len(at_inference["settings"]["14 px"]["fid"]["seeds"]) == 2
    calls = [
        set(json.loads(file.read_text(encoding="utf-8"))) for file in tmp_path.glob("runs/cpu/runs/*/measures.json")
    ]
    assert sorted(map(len, calls)) == [1, 1, 1, 1, 3, 3]  # the two runs that were also measured at two sizes


def test_measures_of_what_a_model_does_not_read_are_left_out(reproduce_tiny):
    settings = ("constant", "cosine")
    record = reproduce_tiny("control_parametrisation", *settings, **{"denoiser.control_parts": "[flip]"})
    assert [record["settings"][setting]["size_distance"] for setting in settings] == [None, None]
    assert record["settings"]["cosine"]["fid"]["mean"] > 0
    assert record["expectations"] == []


def test_classes_are_measured_without_text(reproduce_tiny):
    record = reproduce_tiny("class_route", "adaptive norm", "attention")
    assert set(record["settings"]) == {"adaptive norm", "attention"}
    assert all(0 <= setting["class_accuracy"]["mean"] <= 1 for setting in record["settings"].values())


@pytest.fixture
def transfer_tiny(tmp_path, few_images):
    """Measures settings of the table of the switch, in stages of a few steps, and returns its record."""
    table = TABLES["transfer"]
    short = {
        name: {"stages": [{**stage, "steps": 4} for stage in values["stages"]]}
        for name, values in table.settings.items()
    }

    def run(*settings):
        values = {key: value for key, value in TINY.items() if key != "training.steps"}
        values |= {"data.source": few_images, "training.checkpoint_every": 2}
        folders = {"output": tmp_path / "runs", "results": tmp_path / "results"}
        options = argparse.Namespace(**folders, scale="cpu", seeds=[0], settings=list(settings))
        further = [f"--{key}={value}" for key, value in values.items()]
        reproduce.reproduce_table("transfer", table.model_copy(update={"settings": short}), options, further)
        return json.loads((tmp_path / "results" / "transfer" / "cpu.json").read_text(encoding="utf-8"))

    return run


def test_runs_that_begin_alike_share_their_first_stage_and_are_measured_from_the_switch(transfer_tiny, tmp_path):
    transfer_tiny("nothing")
    first = runs_in(tmp_path)
    assert len(first) == 2  # the stage and the run
    record = transfer_tiny("nothing", "both", "crops, both")
    second = runs_in(tmp_path)
    assert len(second) == 5 and first.items() <= second.items()  # two runs more, and a stage of crops
    assert len({stage.resolve() for stage in tmp_path.glob("runs/cpu/runs/*/stage-1-16")}) == 2

    assert record["images"] == [0, 16, 32]
    for row in record["settings"].values():
        (curve,) = row["curve"]["seeds"]
        assert len(set(curve)) == 3 and curve[-1] == row["fid"]["mean"]
    starts = [row["curve"]["mean"][0] for row in record["settings"].values()]
    assert len(set(starts)) == 3
    written = tmp_path / "results" / "transfer"
    assert "Images until the mean FID reaches the last one of nothing" in (written / "cpu.md").read_text(
        encoding="utf-8"
    )
    with Image.open(written / "cpu.png") as image:
        assert min(image.size) > 300


@pytest.mark.parametrize(("target", "expected"), [(9, 0), (4, 150), (1, 300), (0.5, None)])
def test_images_to_reach_a_target_lie_between_points(target, expected):
    assert images_to_reach([0, 100, 200, 300], [8.0, 5.0, 3.0, 1.0], target) == expected


def test_an_unknown_setting_is_named(reproduce_tiny):
    with pytest.raises(ValueError, match=r"--settings .*'sine'.*'cosine'"):
        reproduce_tiny("control_parametrisation", "sine")


def test_a_seed_that_is_there_twice_is_refused(reproduce_tiny):
    with pytest.raises(ValueError, match=r"--seeds \[0, 0\]"):
        reproduce_tiny("control_parametrisation", "cosine", seeds=("0", "0"))


def test_a_table_without_a_small_scale_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no settings at scale 'cpu'.*--scale gpu"):
        reproduce.main(["adam_betas", "--output", str(tmp_path)])


def flat(values, prefix=""):
    """Flattens a nested dict to dotted keys."""
    rows = {}
    for key, value in values.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return rows


@pytest.fixture(scope="module")
def models():
    """The autoencoder and the encoder that the tables train with."""
    vae, text = load_autoencoder(AutoencoderConfig()), TextConfig(max_tokens=16)
    return vae, SampleEncoder(vae, *load_text_encoder(text), text.max_tokens)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", TABLES)
def test_every_setting_of_every_table_is_a_run(name, scale, models):
    table = TABLES[name]
    configs = [table.run_config(setting, scale, []) for setting in table.settings]
    calls = [table.call(setting, config) for setting, config in zip(table.settings, configs, strict=True)]
    distinct = {
        json.dumps([config.model_dump(mode="json"), call]) for config, call in zip(configs, calls, strict=True)
    }
    assert len(distinct) == len(table.settings)
    plain = flat(table.model_copy(update={"settings": {"plain": {}}}).run_config("plain", scale, []).model_dump())
    for setting, config in zip(table.settings, configs, strict=True):
        if RECIPE in table.settings[setting]:  # it starts from another file
            continue
        values = flat(config.model_dump())
        changed = {key for key in values.keys() | plain.keys() if values.get(key) != plain.get(key)}
        assert all(key.startswith(tuple(table.settings[setting])) for key in changed), (setting, changed)
    vae, encoder = models
    for setting, config in zip(table.settings, configs, strict=True):
        first = config.of_stage(0) if config.stages else config
        text = table.trainer_of(setting) == "train_t2i"
        conditions = text_dims(config.denoiser, encoder) if text else {"num_classes": 10}
        denoiser = build_denoiser(first, vae, **conditions)
        assert denoiser.config.sample_size == first.transform.resolution // 4


def test_interval_of_three_seeds_is_students():
    result = mean_and_interval(np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]))
    assert result["mean"] == [2, 5]
    assert result["high"] == pytest.approx([2 + 4.302653 / 3**0.5, 5])
    assert result["low"] == pytest.approx([2 - 4.302653 / 3**0.5, 5])


@pytest.mark.parametrize(
    ("better", "worse", "lower_is_better", "verdict", "apart"),
    [
        ([1.0, 1.1, 1.2], [3.0, 3.1, 3.3], True, "agrees", True),
        ([1.0, 1.1, 1.2], [3.0, 3.1, 3.3], False, "disagrees", True),
        (
            [1.0, 2.0, 3.0],
            [1.2, 2.2, 3.3],
            True,
            "agrees",
            False,
        ),  # paired differences are more precise than the two means
        ([1.0, 2.0, 3.0], [2.0, 1.0, 3.5], True, "unclear", False),
    ],
)
def test_a_claim_holds_where_the_interval_of_the_pairs_leaves_out_zero(better, worse, lower_is_better, verdict, apart):
    result = compare(np.array(better), np.array(worse), lower_is_better)
    assert (result["verdict"], result["intervals_apart"]) == (verdict, apart)


def test_a_value_that_is_no_number_decides_nothing():
    with pytest.raises(ValueError, match="finite"):
        compare(np.array([1.0, np.nan]), np.array([2.0, 3.0]), True)


def test_one_seed_decides_nothing():
    assert compare(np.array([1.0]), np.array([2.0]), True)["verdict"] == "unclear"


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_committed_tables_say_what_their_records_say(file):
    record = json.loads(file.read_text(encoding="utf-8"))
    assert len(record["seeds"]) >= 3
    assert file.with_suffix(".md").read_text(encoding="utf-8") == markdown(record, f"{file.stem}.png")
    assert file.with_suffix(".png").exists()


def test_the_committed_summary_is_up_to_date(tmp_path):
    for name in TABLES:
        (tmp_path / name).mkdir()
        for file in (RESULTS / name).glob("*.json"):
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / ABOUT).write_bytes((RESULTS / ABOUT).read_bytes())
    write_summary(TABLES, tmp_path)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (RESULTS / "README.md").read_text(encoding="utf-8")
