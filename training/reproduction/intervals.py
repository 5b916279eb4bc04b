"""Means over seeds, their intervals, and whether a claim holds."""

import math
from typing import Any

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
DESCRIPTION = f"{CONFIDENCE:.0%} interval of the mean over seeds, Student's t"


def mean_and_interval(values: np.ndarray) -> dict[str, Any]:
    """Mean and its confidence interval over the seeds, which are the rows of (seeds, …); Student's t.

    Raises:
        ValueError: for values that are not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"`values` is {values.tolist()}; a mean needs finite numbers.")
    count, mean = len(values), values.mean(0)
    if count == 1:
        return {"mean": mean.tolist(), "low": None, "high": None}
    width = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(0, ddof=1) / math.sqrt(count)
    return {"mean": mean.tolist(), "low": (mean - width).tolist(), "high": (mean + width).tolist()}


def compare(better: np.ndarray, worse: np.ndarray, lower_is_better: bool) -> dict[str, Any]:
    """Whether one setting is better than another in a measure.

    Args:
        better: (seeds,) of the setting that is claimed to be better.
        worse: (seeds,) of the other one, seed by seed with the same data, noise and prompts.
        lower_is_better: whether small values are good.

    Returns:
        The paired difference `better` − `worse` with its interval, whether the two settings' own intervals lie apart,
        and a verdict: `agrees` or `disagrees` where the interval of the difference leaves out zero, else `unclear`.
    """
    own = [mean_and_interval(values) for values in (better, worse)]
    difference = mean_and_interval(better - worse)
    verdict, apart = "unclear", False
    if difference["low"] is not None:
        apart = own[0]["high"] < own[1]["low"] or own[1]["high"] < own[0]["low"]
        if difference["high"] < 0 or difference["low"] > 0:
            verdict = "agrees" if (difference["mean"] < 0) == lower_is_better else "disagrees"
    return {"difference": difference, "intervals_apart": apart, "verdict": verdict}
