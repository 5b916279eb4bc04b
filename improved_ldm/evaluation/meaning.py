"""Decide which numbers are meaningful, from the number of images and the quality of the samples.

A number that is not meaningful stays in the records, with a note that explains why, and is not published. The model
card marks numbers that were measured on too few images and leaves out numbers that noise would reach too.
"""

from typing import Any

SHARE_IMAGES = 50  # minimum for a share or a mean, so that its standard error is at most 0.07
SET_IMAGES = 500  # minimum for both compared sets; with fewer images, coverage depends mostly on their number
INCEPTION_IMAGES = 2048  # minimum for FID and sFID: the number of features, or else the covariance is singular
DISTANCES = ("fid", "sfid")  # scores that reference statistics are enough for
CLASS_SHARE = 0.5  # share of the judge's accuracy on real images that samples must reach before control is judged
# Numbers that look good even if the samples are not recognisable: the class of noise stays the same for any control.
NEEDS_CLASSES = (
    "orientation_accuracy",
    "detail_class_kept",
    "detail_class_kept_by_size",
    "original_size_distance",
    "crop_distance",
    "flip_distance",
)
# Scores that look good even if few real images have a sample nearby: noise can fall where real images are far apart.
NEEDS_COVERAGE = ("precision", "recall", "density", "adm_precision", "adm_recall")
COVERAGE_SHARE = 0.1  # share of the coverage of equal sets; noise reaches at most 0.03 with the judge's features
# Prefixes of the judge's numbers → the fields with the numbers of images that they depend on, and the minimum.
COUNTS = {
    ("class_", "orientation_"): (("num_samples",), SHARE_IMAGES),
    ("detail_class_", "crop_", "original_size_", "flip_"): (("num_detail_samples",), SHARE_IMAGES),
    ("coverage", "judge_fid"): (("num_coverage_samples", "num_real_images"), SET_IMAGES),
}


def judged_notes(judged: dict[str, Any]) -> dict[str, str]:
    """Explain which numbers of `evaluate_obedience` and `control_distances` are not meaningful.

    Args:
        judged: The judge's numbers by name.

    Returns:
        The reasons by name of the number. Meaningful numbers are not listed.

    Source: our choice.
    """
    notes = {}
    for prefixes, (_, least) in COUNTS.items():
        images = least if (counted := judged_images(judged, prefixes[0])) is None else counted
        if images < least:
            notes |= dict.fromkeys((name for name in judged if name.startswith(prefixes)), _too_few(images, least))
    return notes | judged_noise(judged)


def judged_images(judged: dict[str, Any], name: str) -> int | None:
    """Number of images that a number of the judge depends on; None if it is not known."""
    fields = next((fields for prefixes, (fields, _) in COUNTS.items() if name.startswith(prefixes)), ())
    return min((judged[field] for field in fields if field in judged), default=None)


def judged_noise(judged: dict[str, Any]) -> dict[str, str]:
    """Explain which numbers of the judge are not meaningful because the samples are not recognisable.

    Args:
        judged: The judge's numbers by name.

    Returns:
        The reasons by name of the number.

    Source: our choice.
    """
    accuracy, real = judged.get("class_accuracy"), judged.get("real_class_accuracy")
    if accuracy is None or real is None or accuracy >= CLASS_SHARE * real:
        return {}
    reason = f"the class accuracy is {accuracy:.3f}, on real images {real:.3f}: the samples are not recognisable"
    return {name: reason for name in NEEDS_CLASSES if name in judged}


def score_notes(evaluation: dict[str, Any]) -> dict[str, str]:
    """Explain which scores of an evaluation are not meaningful.

    Args:
        evaluation: Record written by `training/evaluate.py`.

    Returns:
        The reasons by name of the score. Meaningful scores are not listed.

    Source: our choice.
    """
    notes = {}
    for name in evaluation["scores"]:
        least = INCEPTION_IMAGES if name in DISTANCES and is_inception(evaluation) else SET_IMAGES
        if name == "clip_score":
            least = SHARE_IMAGES
        images = score_images(evaluation, name)
        if images < least:
            notes[name] = _too_few(images, least)
    return notes | score_noise(evaluation)


def score_images(evaluation: dict[str, Any], name: str) -> int:
    """Number of images in the smaller of the two sets that a score compares; the CLIP score uses only the samples.

    Reference statistics that do not state their number of images are taken to be of enough images.
    """
    samples, real = evaluation["samples"]["images"], reference_of(evaluation, name)["images"]
    return samples if name == "clip_score" or real is None else min(samples, real)


def reference_of(evaluation: dict[str, Any], name: str) -> dict[str, Any]:
    """Record of what a score compares the samples with: reference statistics or reference images."""
    statistics, images = evaluation.get("reference_statistics"), evaluation["reference"]
    return statistics if statistics and (name in DISTANCES or images is None) else images


def score_noise(evaluation: dict[str, Any]) -> dict[str, str]:
    """Explain which scores are not meaningful because most real images have no sample nearby.

    Args:
        evaluation: Record written by `training/evaluate.py`.

    Returns:
        The reasons by name of the score.

    Source: our choice; the coverage of two equal sets is from Naeem et al. 2020, Sec. 3.3, for large sets.
    """
    scores = evaluation["scores"]
    coverage = scores.get("coverage")
    if coverage is None:
        return {}
    samples, real = evaluation["samples"]["images"], evaluation["reference"]["images"]
    nearest = evaluation.get("score_settings", {}).get("nearest_k", 5)
    equal = 1 - (real / (real + samples)) ** nearest
    if coverage >= COVERAGE_SHARE * equal:
        return {}
    reason = f"the coverage is {coverage:.3f}, for equal sets {equal:.3f}: few real images have a sample nearby"
    return {name: reason for name in NEEDS_COVERAGE if name in scores}


def is_inception(evaluation: dict[str, Any]) -> bool:
    """Whether the features of an evaluation come from Inception, whose Fréchet distance is the FID."""
    return evaluation["features"]["name"].partition(":")[0] == "inception"


def _too_few(images: int, least: int) -> str:
    return f"measured on {images} images, needs at least {least}"
