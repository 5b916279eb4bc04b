"""Runs on several sets and on aspect-ratio buckets."""

import json
from collections import Counter

import pytest
import yaml
from safetensors.torch import load_file

from improved_ldm.data.stream import RowStream
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.data import open_data
from tests.data.test_indexed import write_folder
from tests.trainer.conftest import load_script

BUCKETS = {"transform.resolution": 32, "transform.buckets": "true", "transform.bucket_step": 8}


@pytest.fixture
def sets(tmp_path):
    """Two sets of images of several sizes."""
    return write_folder(tmp_path / "a", 40), write_folder(tmp_path / "b", 15)


def sources(sets, **more):
    first, second = ({"source": str(folder)} for folder in sets)
    return yaml.safe_dump([first | {"weight": 3}, second | more], default_flow_style=True).strip()


def train(words):
    load_script("train_t2i").main(words)


@pytest.mark.parametrize("passes", [0, 2])
def test_two_sources_in_buckets_train_by_weight_and_the_card_says_it(arguments, sets, tmp_path, capsys, passes):
    settings = BUCKETS | {"cache.passes": passes, "data.sources": sources(sets), "training.steps": 20}
    words = [word for word in arguments(**settings) if not word.startswith("--data.source=")]
    train(words)
    said = capsys.readouterr().out
    assert ".../a, 75.0% of the samples" in said
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))
    first, second = metrics["images_by_source"]
    assert abs(first - 3 * second) <= 40 and 100 < first + second <= 160
    assert f"images seen by source: .../a {first:,}, .../b {second:,}" in said
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert f"`.../a`, split `train`, 75.0 % of the samples, {first:,} images seen" in card
    assert "images per bucket (height x width)" in said and "beyond `transform.max_aspect` 2" in said


@pytest.mark.parametrize("passes", [0, 1])
def test_a_run_in_parts_sees_the_images_of_the_whole(arguments, sets, tmp_path, passes):
    settings = BUCKETS | {"cache.passes": passes, "data.sources": sources(sets)}

    def words(output, steps):
        made = arguments(output, **settings, **{"training.steps": steps})
        return [word for word in made if not word.startswith("--data.source=")]

    for output, steps in (("parts", 3), ("parts", 8), ("whole", 8)):
        train(words(output, steps))
    one, other = (
        load_file(tmp_path / output / "transformer" / "diffusion_pytorch_model.safetensors")
        for output in ("parts", "whole")
    )
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("passes", [0, 1])
def test_batches_that_are_prepared_ahead_train_the_same_model(arguments, sets, tmp_path, passes):
    settings = BUCKETS | {"cache.passes": passes, "data.source": sets[0]}
    for ahead in (0, 2):
        train(arguments(f"ahead-{ahead}", **settings, **{"training.prefetch": ahead}))
    one, other = (
        load_file(tmp_path / f"ahead-{ahead}" / "transformer" / "diffusion_pytorch_model.safetensors")
        for ahead in (0, 2)
    )
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_stages_keep_their_buckets(arguments, sets, tmp_path, capsys):
    stages = "[{resolution: 32, steps: 3}, {resolution: 64, steps: 3}]"
    settings = BUCKETS | {"cache.passes": 0, "data.source": sets[0], "stages": stages}
    del settings["transform.resolution"]
    train(arguments(**settings))
    said = capsys.readouterr().out
    assert "40x24: " in said and "88x48: " in said


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"transform.max_aspect": 0.5}, "greater than or equal to 1"),
        ({"transform.bucket_step": 12}, "`transform.bucket_step` is 12; it must divide `transform.resolution`"),
        ({"transform.bucket_step": 4}, "`transform.bucket_step` is 4; it must be a multiple of 8 pixels"),
        (
            {"transform.bucket_step": "null"},
            "`transform.bucket_step` is 2 by default; it must be a multiple of 8 pixels",
        ),
        ({"transform.bucket_step": 32}, "leave no other size than the square"),
        ({"transform.resolution": "[32, 48]"}, "must be one number"),
        ({"data.min_size": 500}, r"no image that can be read and is used \(\d+: shorter side below 500 pixels\)"),
        ({"data.caption_pattern": "("}, "no regular expression"),
        ({"data.sources": "[{source: missing}]"}, r"`data.sources\[0\].source` is 'missing'"),
    ],
)
def test_wrong_settings_are_refused_before_training(arguments, sets, tmp_path, settings, message, capsys):
    words = arguments(**BUCKETS | {"cache.passes": 0, "data.source": sets[0]} | settings)
    if "data.sources" in settings:
        words = [word for word in words if not word.startswith("--data.source=")]
    with pytest.raises((ValueError, FileNotFoundError, SystemExit), match=message) as caught:
        train(words)
    assert not (tmp_path / "run" / "checkpoints").exists(), caught


@pytest.mark.parametrize("weight", [0, -1, "nan", "inf", "x"])
def test_a_wrong_weight_is_refused(sets, weight):
    with pytest.raises(ValueError, match="weight"):
        RunConfig(data={"sources": [{"source": str(sets[0]), "weight": float(weight) if weight != "x" else weight}]})


def test_an_empty_source_is_refused_by_name(arguments, sets, tmp_path):
    (tmp_path / "empty").mkdir()
    made = arguments(**{"data.sources": sources((sets[0], tmp_path / "empty"))})
    with pytest.raises(ValueError, match=r"`data.sources\[1\].source` is .*empty; it must hold"):
        train([word for word in made if not word.startswith("--data.source=")])


def test_source_and_sources_together_are_refused(sets):
    with pytest.raises(ValueError, match="give one of the two"):
        RunConfig(data={"source": str(sets[0]), "sources": [{"source": str(sets[1])}]})


def test_captions_have_their_prefix_and_classes_their_union(tmp_path, sets):
    first, second = map(str, sets)
    config = RunConfig(data={"sources": [{"source": first, "caption_prefix": "no. "}, {"source": second}]})
    first, second = open_data(config.data, takes_text=True).rows
    assert next(iter(RowStream(first, shuffle_window=0))).caption == "no. 0"
    assert next(iter(RowStream(second, shuffle_window=0))).caption == "0"
    for name, classes in (("c", ("cat", "dog")), ("d", ("ant", "cat"))):
        for one in classes:
            (tmp_path / name).mkdir(exist_ok=True)
            write_folder(tmp_path / name / one, 4)
            (tmp_path / name / one / "metadata.jsonl").unlink()
    config = RunConfig(data={"sources": [{"source": str(tmp_path / "c")}, {"source": str(tmp_path / "d")}]})
    mixture = open_data(config.data, takes_text=False)
    assert mixture.class_names == ["cat", "dog", "ant"]
    labels = [Counter(row.label for row in RowStream(rows, repeat=False)) for rows in mixture.rows]
    assert labels == [{0: 4, 1: 4}, {2: 4, 0: 4}]
