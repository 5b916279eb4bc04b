"""Which numbers get a note that they are not meaningful."""

import pytest

from improved_ldm.evaluation.meaning import SET_IMAGES, SHARE_IMAGES, judged_notes, score_notes

FOUND = {
    "class_accuracy": 0.9,
    "real_class_accuracy": 0.92,
    "num_samples": 500,
    "orientation_accuracy": 0.99,
    "detail_class_kept": 0.9,
    "num_detail_samples": 60,
    "crop_accuracy": 0.8,
    "coverage": 0.6,
    "judge_fid": 3.4,
    "num_coverage_samples": 1000,
    "num_real_images": 2000,
}


@pytest.mark.parametrize(
    "changes, marked",
    [
        ({}, set()),
        ({"num_samples": SHARE_IMAGES}, set()),
        ({"num_samples": SHARE_IMAGES - 1}, {"class_accuracy", "orientation_accuracy"}),
        ({"num_detail_samples": 10}, {"detail_class_kept", "crop_accuracy"}),
        ({"num_coverage_samples": SET_IMAGES - 1}, {"coverage", "judge_fid"}),
        ({"num_real_images": 60}, {"coverage", "judge_fid"}),
        ({"class_accuracy": 0.1}, {"detail_class_kept", "orientation_accuracy"}),
        ({"class_accuracy": 0.45}, {"detail_class_kept", "orientation_accuracy"}),
        ({"class_accuracy": 0.47}, set()),
    ],
)
def test_what_a_judge_finds(changes, marked):
    assert judged_notes(FOUND | changes).keys() == marked


def test_numbers_of_unknown_counts_are_left_alone():
    assert judged_notes({}) == {}
    assert judged_notes({"class_accuracy": 0.9, "coverage": 0.5}) == {}


@pytest.mark.parametrize(
    "features, samples, real, marked",
    [
        ("inception", 10_000, 10_000, set()),
        ("inception", 2047, 10_000, {"fid"}),
        ("inception:file.pth", 10_000, 2000, {"fid"}),
        ("embedded:judge", 500, 500, set()),
        ("embedded:judge", 60, 10_000, {"fid", "coverage"}),
        ("embedded:judge", 40, 10_000, {"fid", "coverage", "clip_score"}),
    ],
)
def test_scores(features, samples, real, marked):
    evaluation = {
        "scores": {"fid": 1.0, "coverage": 0.5, "clip_score": 0.3},
        "samples": {"images": samples},
        "reference": {"images": real},
        "features": {"name": features},
    }
    assert score_notes(evaluation).keys() == marked
