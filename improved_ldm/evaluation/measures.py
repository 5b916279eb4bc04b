"""How numbers are presented: name, measuring network, number of images, and whether higher or lower is better."""

import re
from dataclasses import dataclass
from typing import Any

from improved_ldm.evaluation.meaning import is_inception, judged_images, score_images

WORDS = {"fid": "Fréchet distance", "judge_fid": "Fréchet distance", "kid": "kernel distance"}
CLIP_SCORES = {"clip_score": "clip", "cmmd": "cmmd"}  # the score → its network in the record
SPREAD = "_std"  # suffix of a standard deviation, which is neither good nor bad
HIGHER, LOWER = "higher", "lower"
LOWER_IS_BETTER = ("fid", "sfid", "kid", "cmmd", "judge_fid", "flip_distance")
HIGHER_IS_BETTER = (
    *("precision", "recall", "density", "coverage", "inception_score", "clip_score"),
    *("adm_precision", "adm_recall", "adm_inception_score"),
    *("class_accuracy", "orientation_accuracy", "crop_accuracy", "detail_class_kept", "detail_class_kept_by_size"),
)


@dataclass(frozen=True)
class Measure:
    """How a number is presented.

    Args:
        kind: Identifier for the Hub.
        name: Name in words.
        network: Name of the measuring network.
        images: Number of images that it depends on; None if it is not known.
        better: `higher`, `lower`, or "" if neither is better.
        qualifier: Name of the network, if the label must include it.
    """

    kind: str
    name: str
    network: str
    images: int | None
    better: str
    qualifier: str = ""

    @property
    def label(self) -> str:
        """Name in words, for a table."""
        return f"{self.name}, {self.qualifier}" if self.qualifier else self.name

    @property
    def full_name(self) -> str:
        """Name in words, with the network and the number of images."""
        images = "" if self.images is None else f", {self.images} images"
        return f"{self.name} ({self.network}{images})"


def score_measure(evaluation: dict[str, Any], name: str) -> Measure:
    """Present a score from a record of `training/evaluate.py`. Only Inception's distance is called FID."""
    images, better = score_images(evaluation, name), _better(name)
    if name in CLIP_SCORES:
        network = (evaluation[CLIP_SCORES[name]] or {}).get("name", "CLIP")
        return Measure(name, name.replace("_", " "), network, images, better)
    network = evaluation["features"]["name"]
    if is_inception(evaluation):
        return Measure(name, name.replace("_", " "), network, images, better)
    words = _in_words(name)
    return Measure(_identifier(f"{words} {network}"), words, network, images, better, qualifier=network)


def judged_measure(judged: dict[str, Any], judge: str, name: str) -> Measure:
    """Present a number measured by the judge called `judge`."""
    images, better = judged_images(judged, name), _better(name)
    if name == "judge_fid":
        return Measure("judge_frechet_distance", _in_words(name), judge, images, better, qualifier="judge")
    return Measure(name, name.replace("_", " "), judge, images, better)


def _in_words(name: str) -> str:
    stem = name.removesuffix(SPREAD)
    return WORDS.get(stem, stem.replace("_", " ")) + " std" * name.endswith(SPREAD)


def _identifier(text: str) -> str:
    return re.sub(r"\W+", "_", text.lower().replace("é", "e")).strip("_")


def _better(name: str) -> str:
    return LOWER if name in LOWER_IS_BETTER else HIGHER * (name in HIGHER_IS_BETTER)
