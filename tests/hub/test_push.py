"""Runs that read their data from the Hub and push to it during training."""

import json

import numpy as np
import pytest

from improved_ldm.hub.card import EVALUATION_FILE
from improved_ldm.hub.eval_results import EVAL_RESULTS
from improved_ldm.settings import ConfigError, parse_config
from improved_ldm.trainer.config import RunConfig
from tests.hub.conftest import STRANGERS_TOKEN
from tests.hub.minihub import Fault
from tests.trainer.conftest import ROOT, arguments, images, load_script  # noqa: F401  fixtures

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
PUSHING = {"hub.repo": "user/model", "hub.push_every": 2}


def test_a_run_streams_a_dataset_and_pushes_its_average(hub, clients, arguments, images, tmp_path):  # noqa: F811
    clients.call("push_dataset", parquet=str(images / "train.parquet"), name="user/data")
    hub.faults = [Fault("POST", "/model/commit/", 403)]
    options = {"data.source": "user/data", "cache.passes": 0, **PUSHING}
    output = clients.run(ROOT / "training" / "train_t2i.py", *arguments(**options))
    assert "step 2 was not pushed, training continues: the access token cannot write to user/model" in output
    history = hub.repository("user/model").history("training")
    assert [commit.title for commit in history] == ["run: step 6", "run: step 4", "initial commit"]
    assert hub.file("user/model", "training", WEIGHTS) == (tmp_path / "run" / WEIGHTS).read_bytes()
    assert hub.file("user/model", history[1].id, WEIGHTS) != (tmp_path / "run" / WEIGHTS).read_bytes()
    assert hub.repository("user/model").branches["main"] == history[-1].id
    assert len(hub.uploads()) == len(set(hub.uploads()))
    pushed, _ = clients.drawing("user/model", revision="training")
    np.testing.assert_array_equal(pushed, clients.drawing(tmp_path / "run")[0])


def test_a_run_trains_on_a_finished_cache_from_the_hub(hub, clients, arguments, images, tmp_path):  # noqa: F811
    script = ROOT / "training" / "train_t2i.py"
    clients.run(script, *arguments("made"))
    (cache,) = (tmp_path / "made" / "cache").iterdir()
    clients.call("push_folder", folder=str(cache), name="user/cache")
    clients.run(script, *arguments("taken", **{"cache.passes": 0, "cache.pretrained": "user/cache"}))
    assert not (tmp_path / "taken" / "cache").exists()
    assert (tmp_path / "taken" / WEIGHTS).read_bytes() == (tmp_path / "made" / WEIGHTS).read_bytes()


def test_a_run_that_has_no_place_to_push_to_does_not_begin():
    with pytest.raises(ConfigError, match="`push_every` needs a `repo` to push to"):
        parse_config(RunConfig, ["--hub.push_every", "5"])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("repo", "model", "it must be `user/name`"),
        ("repo", "user/a/b", "it must be `user/name`"),
        ("repo", "runs/../x", "it must be `user/name`"),
        ("branch", "main", "it holds published versions"),
    ],
)
def test_a_place_that_cannot_be_pushed_to_is_refused(key, value, message):
    with pytest.raises(ConfigError, match=f"`hub.{key}` is '{value}'.*{message}"):
        parse_config(RunConfig, [f"--hub.{key}", value])


@pytest.mark.parametrize("value", ["1.0", "0.10", "2024-01-01", "1e3", "007", "true"])
def test_a_text_that_reads_like_a_number_keeps_its_letters(value):
    assert parse_config(RunConfig, ["--hub.branch", value]).hub.branch == value


@pytest.mark.parametrize(("value", "meant"), [("'1.0'", "1.0"), ("null", None), ("user/x", "user/x")])
def test_other_texts_are_read_as_yaml(value, meant):
    assert parse_config(RunConfig, ["--data.name", value]).data.name == meant


@pytest.mark.parametrize("script", ["train_t2i", "train_class_conditional"])
def test_a_token_that_may_not_write_stops_a_run_before_anything_is_encoded(
    hub,
    clients,
    arguments,  # noqa: F811
    tmp_path,
    script,
):
    output = clients.run(ROOT / "training" / f"{script}.py", *arguments(**PUSHING), token=STRANGERS_TOKEN, code=1)
    assert "the access token cannot write to user/model" in output
    assert not (tmp_path / "run" / "cache").exists()


def test_a_run_that_goes_on_forgets_what_was_measured_of_its_earlier_weights(arguments, tmp_path):  # noqa: F811
    script, folder = load_script("train_t2i"), tmp_path / "run"
    script.main(arguments(**{"training.steps": 2}))
    (folder / EVALUATION_FILE).write_text(json.dumps({"scores": {"fid": 1.0}}), encoding="utf-8")
    (folder / EVAL_RESULTS).mkdir()
    (folder / EVAL_RESULTS / "scores.yaml").write_text("[]", encoding="utf-8")
    script.main(arguments(**{"training.steps": 4}))
    assert (folder / "metrics.json").is_file()
    assert not (folder / EVALUATION_FILE).exists() and not (folder / EVAL_RESULTS).exists()
