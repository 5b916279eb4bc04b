"""What a record says about published numbers, and about numbers beside it."""

import pytest

from improved_ldm.evaluation.comparability import adm_comparison, differences

STATISTICS = {"source": ".../VIRTUAL_imagenet256_labeled.npz", "sha256": "ab" * 32, "images": None}
IMAGES = {"source": "user/set", "split": "test", "sha256": "cd" * 32, "images": 10_000}
RECORD = {
    "samples": {"images": 50_000, "labels": "uniform"},
    "reference": None,
    "reference_statistics": STATISTICS,
    "features": {"name": "inception", "sha256": "ef" * 32},
    "resizing": "network",
    "score_settings": {"adm": True, "nearest_k": 3},
}


def test_the_settings_of_the_suite_compare_and_the_line_names_them():
    assert adm_comparison(RECORD) == (
        "FID as the ADM suite computes it: 50,000 samples, labels uniform, reference VIRTUAL_imagenet256_labeled.npz."
    )
    own = RECORD | {"reference_statistics": None, "reference": IMAGES}
    assert adm_comparison(own).endswith("labels uniform, reference user/set.")
    of_file = RECORD | {"features": {"name": "inception:.../weights.pth"}}
    assert adm_comparison(of_file).endswith(", with the weights of inception:.../weights.pth.")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"samples": {"images": 10_000, "labels": "uniform"}}, "10,000 samples, not 50,000."),
        ({"samples": {"images": 50_000, "labels": "balanced"}}, "labels balanced, not uniform."),
        ({"samples": {"images": 50_000}}, "labels not known, not uniform."),
        ({"features": {"name": "embedded:judge"}}, "features embedded:judge, not inception."),
        ({"resizing": "clean"}, "resizing clean, as in clean-fid, not TensorFlow's."),
        ({"score_settings": {"adm": True, "nearest_k": 5}}, "nearest_k 5, not 3."),
        ({"reference_statistics": STATISTICS | {"images": 12}}, "a reference of 12 images, not 10,000 or more."),
    ],
)
def test_any_other_setting_is_named(change, reason):
    line = adm_comparison(RECORD | change)
    assert line == f"Does not compare with numbers of the ADM suite: {reason}"


def test_neighbours_matter_only_where_the_scores_of_the_suite_are_measured():
    assert adm_comparison(RECORD | {"score_settings": {"adm": False, "nearest_k": 5}}).startswith("FID as the ADM")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"score_settings": {}}, None),
        ({"reference": IMAGES}, "images of reference abababababab and cdcdcdcdcdcd."),
        ({"reference_statistics": STATISTICS | {"sha256": "01" * 32}}, "reference abababababab and 010101010101"),
        ({"samples": {"images": 10_000, "labels": "uniform"}}, "samples 50000 and 10000."),
        ({"samples": {"images": 50_000, "labels": "balanced"}}, "labels uniform and balanced."),
        ({"resizing": "clean"}, "resizing network and clean."),
        ({"features": {"name": "inception", "sha256": "23" * 32}}, "features efefefefefef and 232323232323."),
    ],
)
def test_numbers_side_by_side(change, reason):
    found = differences([RECORD, RECORD, RECORD | change])
    if reason is None:
        assert found is None
    else:
        assert found.startswith(f"These numbers do not compare with each other: {reason}")
