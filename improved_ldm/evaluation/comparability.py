"""With which published numbers the scores of an evaluation compare, and which scores compare with each other."""

from collections.abc import Callable, Sequence
from typing import Any

from improved_ldm.evaluation.meaning import is_inception, reference_of

# Keys of `EvaluateConfig` and `ScoreSettings` as the evaluation suite of ADM has them.
ADM_KEYS = {"num_samples": 50_000, "labels": "uniform", "features": "inception", "resizing": "network"}
ADM_SCORES = {"adm": True, "nearest_k": 3}
LEAST_IMAGES = 10_000  # of a reference; the file of ImageNet has as many
UNKNOWN = "not known"
# What must be equal for two numbers to compare, by its name in words.
CONDITIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "features": lambda evaluation: evaluation["features"]["sha256"][:12],
    "resizing": lambda evaluation: evaluation.get("resizing", "network"),
    "reference": lambda evaluation: _hash_of(evaluation, "fid"),
    "images of reference": lambda evaluation: _hash_of(evaluation, "kid"),
    "samples": lambda evaluation: evaluation["samples"]["images"],
    "labels": lambda evaluation: evaluation["samples"].get("labels", UNKNOWN),
}


def adm_comparison(evaluation: dict[str, Any]) -> str:
    """State in one line whether the FID of an evaluation compares with numbers of the ADM suite.

    Args:
        evaluation: Record written by `training/evaluate.py`.

    Source: Dhariwal and Nichol 2021 and their evaluation suite.
    """
    samples, settings = evaluation["samples"], evaluation["score_settings"]
    count, labels = samples["images"], samples.get("labels", UNKNOWN)
    reasons = []
    if not is_inception(evaluation):
        reasons.append(f"features {evaluation['features']['name']}, not inception")
    if evaluation["resizing"] != ADM_KEYS["resizing"]:
        reasons.append("resizing clean, as in clean-fid, not TensorFlow's")
    if count != ADM_KEYS["num_samples"]:
        reasons.append(f"{count:,} samples, not {ADM_KEYS['num_samples']:,}")
    if labels != ADM_KEYS["labels"]:
        reasons.append(f"labels {labels}, not {ADM_KEYS['labels']}")
    if settings["adm"] and settings["nearest_k"] != ADM_SCORES["nearest_k"]:
        reasons.append(f"nearest_k {settings['nearest_k']}, not {ADM_SCORES['nearest_k']}")
    reference = reference_of(evaluation, "fid")
    if (reference["images"] or LEAST_IMAGES) < LEAST_IMAGES:
        reasons.append(f"a reference of {reference['images']:,} images, not {LEAST_IMAGES:,} or more")
    if reasons:
        return f"Does not compare with numbers of the ADM suite: {'; '.join(reasons)}."
    source, network = reference["source"].removeprefix(".../"), evaluation["features"]["name"]
    weights = "" if network == ADM_KEYS["features"] else f", with the weights of {network}"
    return f"FID as the ADM suite computes it: {count:,} samples, labels {labels}, reference {source}{weights}."


def differences(evaluations: Sequence[dict[str, Any]]) -> str | None:
    """Why the scores of several evaluations do not compare with each other; None if they do.

    Args:
        evaluations: Records written by `training/evaluate.py`.

    Source: our choice.
    """
    values = {name: list(dict.fromkeys(map(read, evaluations))) for name, read in CONDITIONS.items()}
    parts = [f"{name} {' and '.join(map(str, found))}" for name, found in values.items() if len(found) > 1]
    return f"These numbers do not compare with each other: {'; '.join(parts)}." if parts else None


def _hash_of(evaluation: dict[str, Any], score: str) -> str:
    reference = reference_of({"reference": None} | evaluation, score)
    return UNKNOWN if reference is None else reference["sha256"][:12]
