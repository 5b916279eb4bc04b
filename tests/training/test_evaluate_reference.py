"""Evaluation with reference statistics, CMMD, and the settings of published evaluations."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from improved_ldm.evaluation.reference_npz import open_statistics
from improved_ldm.evaluation.request import STATISTICS_KEYS, EvaluateConfig, check_keys, complete
from improved_ldm.settings import parse_config
from training import evaluate

FEW = {
    "features": "embedded:judge",
    "batch_size": 4,
    "num_samples": 10,
    "scores": "{kid_subset_size: 8, kid_subsets: 5, inception_splits: 2, nearest_k: 3}",
    "obedience.judge": "null",
    "cpu_threads": 1,
}
DATA = {"data": "embedded:fashion-mnist", "num_reference_images": 40}
NEED_IMAGES = {"kid", "kid_std", "precision", "recall", "density", "coverage"}


@pytest.fixture
def classes(class_pipeline, tmp_path) -> Path:
    """The folder of a pipeline with 10 classes and 32 x 32 images."""
    class_pipeline(sample_size=16, num_classes=10).save_pretrained(tmp_path / "classes")
    return tmp_path / "classes"


@pytest.fixture
def measured(classes, tmp_path):
    """Evaluates the pipeline into a folder of `tmp_path` and returns the record."""

    def run(name: str, **values) -> dict:
        given = FEW | {"pipeline": classes, "output_dir": tmp_path / name} | values
        arguments = [f"--{key}={value}" for key, value in given.items() if value is not None]
        evaluate.main(parse_config(EvaluateConfig, arguments))
        return json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8"))

    return run


def test_written_statistics_replace_the_images(measured, tmp_path, capsys):
    file = tmp_path / "reference.npz"
    whole = measured("whole", **DATA, write_statistics=file)
    assert f"{file} holds the statistics of " in capsys.readouterr().out
    alone = measured("alone", reference_statistics=file)
    assert alone["scores"].keys() == whole["scores"].keys() - NEED_IMAGES
    assert alone["scores"]["fid"] == pytest.approx(whole["scores"]["fid"], rel=1e-6)
    printed = capsys.readouterr().out
    left_out = f"kid, precision, recall, density, coverage are left out: {file} has statistics only, no images"
    assert printed.count(left_out) == 1
    assert alone["reference"] is None
    statistics = alone["reference_statistics"]
    assert (statistics["images"], statistics["reference"]) == (40, whole["reference"]["sha256"])
    assert statistics["source"] == ".../reference.npz"
    assert alone["notes"]["fid"] == "measured on 10 images, needs at least 500"


def test_distances_to_statistics_and_other_scores_to_images(measured, tmp_path):
    """As in the suite of ADM, whose files have the statistics of many images and a few of the images."""
    measured("many", **DATA | {"num_reference_images": 60}, write_statistics=tmp_path / "many.npz")
    few = measured("few", **DATA)
    both = measured("both", **DATA, reference_statistics=tmp_path / "many.npz")
    assert both["scores"]["fid"] != few["scores"]["fid"]
    same = NEED_IMAGES | {"inception_score"}
    assert {name: both["scores"][name] for name in same} == {name: few["scores"][name] for name in same}
    assert both["reference"] == few["reference"]


def test_the_images_of_a_batch_file_are_the_reference(measured, tmp_path):
    from_data = measured("data", **DATA, write_statistics=tmp_path / "own.npz")
    images = [np.asarray(Image.open(file)) for file in sorted((tmp_path / "data" / "samples").glob("*.png"))]
    with np.load(tmp_path / "own.npz") as arrays:
        np.savez(tmp_path / "batch.npz", arr_0=np.stack(images), mu=arrays["mu"], sigma=arrays["sigma"])
    record = measured("batch", reference_statistics=tmp_path / "batch.npz")
    assert record["scores"]["fid"] == pytest.approx(from_data["scores"]["fid"], rel=1e-6)
    assert record["scores"]["precision"] == record["scores"]["coverage"] == 1
    assert (record["reference"]["images"], record["reference"]["split"]) == (10, "arr_0")


def test_cmmd_and_the_scores_of_adm(measured, capsys):
    record = measured("out", **DATA, cmmd="embedded:clip", **{"scores.adm": "true", "scores": None})
    assert record["scores"]["cmmd"] > 0
    assert record["scores"].keys() >= {"adm_precision", "adm_recall", "adm_inception_score"}
    assert "sfid" not in record["scores"]
    assert "sfid is left out: embedded:judge has no spatial features" in capsys.readouterr().out
    assert record["cmmd"]["name"] == "embedded:clip" and len(record["cmmd"]["sha256"]) == 64


def test_uniform_labels_are_drawn_of_all_classes(measured, tmp_path):
    record = measured("out", **DATA, labels="uniform", num_samples=60)
    assert record["samples"]["labels"] == "uniform"
    lines = (tmp_path / "out" / "samples" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert set(labels) <= set(range(10)) and len(set(labels)) >= 8
    assert labels != [number % 10 for number in range(60)]


def test_like_adm_sets_what_is_not_given():
    config = complete(EvaluateConfig(pipeline="x", data="y", like="adm"))
    assert (config.num_samples, config.labels, config.features, config.resizing) == (
        50_000,
        "uniform",
        "inception",
        "network",
    )
    assert (config.scores.adm, config.scores.nearest_k) == (True, 3)
    given = complete(
        EvaluateConfig(pipeline="x", data="y", like="adm", num_samples=9, scores={"nearest_k": 5, "kid_subsets": 2})
    )
    assert (given.num_samples, given.labels, given.scores.nearest_k) == (9, "uniform", 5)
    assert (given.scores.adm, given.scores.kid_subsets) == (True, 2)
    of_folder = complete(EvaluateConfig(samples="x", data="y", like="adm"))
    assert (of_folder.num_samples, of_folder.scores.nearest_k) == (10_000, 3)


def test_keys_beside_like_adm_are_said_to_make_the_numbers_incomparable(measured, capsys):
    record = measured("out", **DATA, like="adm")
    line = (
        "Does not compare with numbers of the ADM suite: features embedded:judge, not inception; "
        "10 samples, not 50,000; a reference of 40 images, not 10,000 or more."
    )
    assert record["comparison"] == line
    assert capsys.readouterr().out.count(line) == 1
    assert record["samples"]["labels"] == "uniform"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give `data`, the reference images, or `reference_statistics`; neither was given"),
        ({"reference_statistics": "none.npz"}, r"`reference_statistics` is none\.npz; there is no such file"),
        ({"reference_statistics": "{file}"}, r"its `mu` has 5 features, but embedded:judge has 128"),
        ({"reference_statistics": "{file}", "split": "test"}, "`split` is given, but there is no `data`"),
        ({"reference_statistics": "{file}", "write_statistics": "a.npz"}, "`write_statistics` is given, but there is"),
        ({"reference_statistics": "{right}", "labels": "drawn"}, "`data` is not given; the labels of the samples"),
        ({"reference_statistics": "{right}", "cmmd": "embedded:clip"}, "`cmmd` is embedded:clip; it needs images"),
        ({"reference_statistics": "{right}", "reference_hash": "0a"}, "`reference_hash` is for a set of images, but"),
        ({"reference_statistics": "{images}"}, "its images have 8 x 8 pixels, but the samples 32 x 32"),
        (DATA | {"write_statistics": "a.pkl"}, r"`write_statistics` is a\.pkl; its name must end in \.npz"),
        (DATA | {"resizing": "clean"}, "`resizing` is 'clean'; it is for Inception only"),
    ],
)
def test_bad_input_stops_before_anything_is_drawn(measured, tmp_path, values, message):
    right = {"mu": np.zeros(128), "sigma": np.eye(128)}
    np.savez(tmp_path / "file.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "right.npz", **right)
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8), **right)
    names = {name: tmp_path / f"{name}.npz" for name in ("file", "right", "images")}
    values = {key: value.format(**names) if isinstance(value, str) else value for key, value in values.items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        measured("out", **values)
    assert not (tmp_path / "out").exists()


def test_numbers_of_one_folder_are_of_one_file_of_statistics(measured, tmp_path):
    measured("first", **DATA, write_statistics=tmp_path / "one.npz")
    measured("second", **DATA | {"num_reference_images": 30}, write_statistics=tmp_path / "other.npz")
    measured("out", reference_statistics=tmp_path / "one.npz")
    sha256 = open_statistics(tmp_path / "one.npz").sha256
    with pytest.raises(ValueError, match=f"metrics.json is for the reference set {sha256}"):
        measured("out", reference_statistics=tmp_path / "other.npz")


def test_statistics_alone_are_those_of_an_evaluation(measured, tmp_path, capsys):
    measured("out", **DATA, write_statistics=tmp_path / "with.npz")
    values = {key: value for key, value in (FEW | DATA).items() if key in STATISTICS_KEYS}
    values |= {"write_statistics": tmp_path / "alone.npz", "resolution": 32}
    evaluate.main(parse_config(EvaluateConfig, [f"--{key}={value}" for key, value in values.items()]))
    one, other = (np.load(tmp_path / name, allow_pickle=False) for name in ("with.npz", "alone.npz"))
    assert one.files == other.files and all(np.array_equal(one[key], other[key]) for key in one.files)
    assert "alone.npz holds the statistics of 40 reference images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 32}, "`resolution` is given, but the pipeline or the samples decide it"),
        ({"pipeline": None}, "To write statistics alone, give `write_statistics` and `resolution`"),
        ({"pipeline": None, "write_statistics": "a.npz"}, "give `write_statistics` and `resolution`"),
        (
            {"pipeline": None, "write_statistics": "a.npz", "resolution": 32, "num_samples": 9},
            "`num_samples` is given, but statistics of `data` alone do not depend on it",
        ),
    ],
)
def test_statistics_alone_take_no_other_keys(values, message):
    values = {"pipeline": "x", "data": "embedded:fashion-mnist"} | values
    config = EvaluateConfig(**{key: value for key, value in values.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        check_keys(config)
