"""Evaluation results in the two formats that the Hub reads: the `model-index` of a card, and `.eval_results/`."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from improved_ldm.evaluation.meaning import DISTANCES, judged_notes, reference_of, score_notes
from improved_ldm.evaluation.measures import Measure, judged_measure, score_measure
from improved_ldm.places import is_hub_id

EVAL_RESULTS = ".eval_results"  # the Hub's name for the folder


def judged_results(task: str, source: str, judged: dict[str, Any], judge: str) -> list[EvalResult]:
    """The judge's results for the model's samples, without its results for real images.

    Results with a note of `judged_notes` are not meaningful and are left out.

    Args:
        task: Task name on the Hub, such as `text-to-image`.
        source: Data set of the judge.
        judged: The judge's numbers by name.
        judge: Name of the judge.
    """
    notes = judged_notes(judged)
    return [
        _result(task, judged_measure(judged, judge, name), value, source, "test")
        for name, value in judged.items()
        if isinstance(value, float) and not name.startswith("real_") and name not in notes
    ]


def score_results(task: str, evaluation: dict[str, Any]) -> list[EvalResult]:
    """The meaningful scores of an evaluation, each with everything that it depends on.

    Args:
        task: Task name on the Hub.
        evaluation: Record written by `training/evaluate.py`.
    """
    results = []
    for name, value in _meant(evaluation).items():
        reference = reference_of(evaluation, name)
        subset = {
            "dataset_config": _extent(reference),
            "dataset_args": {"sha256": reference["sha256"], "conditions": conditions(evaluation)},
        }
        place = (reference["source"], reference.get("split"))
        results.append(_result(task, score_measure(evaluation, name), value, *place, **subset))
    return results


def _extent(reference: dict[str, Any]) -> str:
    """Number and size of the images of a reference, as far as they are known."""
    images = "statistics" if reference["images"] is None else f"{reference['images']} images"
    return images + (" at {}x{}".format(*reference["resolution"]) if "resolution" in reference else "")


def _meant(evaluation: dict[str, Any]) -> dict[str, float]:
    """The scores without a note."""
    notes = score_notes(evaluation)
    return {name: value for name, value in evaluation["scores"].items() if name not in notes}


def write_entries(folder: Path, evaluation: dict[str, Any]) -> Path | None:
    """Write the meaningful scores of an evaluation as Hub entries, replacing earlier entries.

    An entry belongs to a dataset on the Hub. Scores against a local or an embedded set are only in the card. No
    benchmark on the Hub defines a task for these scores, so the name of a score is its task.

    Args:
        folder: Folder of the model.
        evaluation: Record written by `training/evaluate.py`.

    Returns:
        The file; None if there is nothing to write.

    Source: the Hub's format; one task per score is our choice.
    """
    file, notes = folder / EVAL_RESULTS / "scores.yaml", conditions(evaluation)
    entries = [
        EvalResultEntry(dataset, score_measure(evaluation, name).kind, value, notes=notes)
        for name, value in _meant(evaluation).items()
        if is_hub_id(dataset := reference_of(evaluation, name)["source"])
    ]
    if not entries:
        file.unlink(missing_ok=True)
        return None
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )
    return file


def conditions(evaluation: dict[str, Any]) -> str:
    """Everything that the scores of an evaluation depend on, in one line."""
    samples = evaluation["samples"]
    first, last = samples["seeds"]
    networks = [
        f"{what} {network['name']} ({network['sha256'][:12]})"
        for what, network in (
            ("Features", evaluation["features"]),
            ("CLIP", evaluation["clip"]),
            ("CMMD", evaluation.get("cmmd")),
        )
        if network is not None
    ]
    parts = [
        *networks,
        *(["clean resizing"] if evaluation.get("resizing") == "clean" else []),
        *_references(evaluation),
        f"{samples['images']} samples, {samples['labels']}",
        f"{samples['sampler']}, {samples['num_inference_steps']} steps",
        f"guidance {samples['guidance_scale']}, control guidance {samples['control_guidance_scale']}",
        *([f"control {samples['control']}"] if samples["control"] else []),
        f"seeds {first} to {last}, {samples['dtype']}",
    ]
    return f"{'; '.join(parts)}."


def _references(evaluation: dict[str, Any]) -> list[str]:
    """What the scores compare the samples with, in words. Two different references are for different scores."""
    statistics, images = evaluation.get("reference_statistics"), evaluation["reference"]
    parts = []
    if statistics:
        of_all = (
            ""
            if images is None
            else f" for {' and '.join(name for name in DISTANCES if name in evaluation['scores'])}"
        )
        known = "" if statistics["images"] is None else f" of {statistics['images']} images"
        parts.append(f"statistics `{statistics['source']}`{known} ({statistics['sha256'][:12]}){of_all}")
    if images:
        others = ", for the other scores, which do not compare with them" if statistics else ""
        parts.append(
            f"reference `{images['source']}` {images['split']}, {images['images']} images "
            f"({images['sha256'][:12]}){others}"
        )
    return parts


def _result(task: str, measure: Measure, value: float, source: str, split: str | None, **subset: Any) -> EvalResult:
    dataset = dataset_name(source)
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=measure.kind,
        metric_name=measure.full_name,
        metric_value=value,
        **subset,
    )


def dataset_name(source: str) -> str:
    """Name of a data set: its Hub id, or the name of a local or embedded set without its folders."""
    if is_hub_id(source):
        return source
    name = re.sub(r"[^\w.-]+", "-", Path(source.removeprefix("embedded:")).name).strip("-.")
    return name or "images"
