"""What was measured of a model in the two forms that the Hub reads: a card's `model-index`, and `.eval_results/`."""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from improved_ldm.data.sources import is_hub_id

EVAL_RESULTS = ".eval_results"  # the Hub's name for the folder


def judged_results(task: str, source: str, judged: dict[str, Any]) -> list[EvalResult]:
    """What the judge found in the model's samples; what it says of real images is not of the model.

    Args:
        task: of the Hub: `text-to-image`, …
        source: the data set that the judge knows.
        judged: what the judge found, by name.
    """
    return [
        _result(task, name, value, source, "test")
        for name, value in judged.items()
        if isinstance(value, float) and not name.startswith("real_")
    ]


def score_results(task: str, evaluation: dict[str, Any]) -> list[EvalResult]:
    """The scores of an evaluation, each with all that it depends on.

    Args:
        task: of the Hub.
        evaluation: the record that `training/evaluate.py` writes.
    """
    reference = evaluation["reference"]
    height, width = reference["resolution"]
    subset = {
        "dataset_config": f"{reference['images']} images at {height}x{width}",
        "dataset_args": {"sha256": reference["sha256"], "conditions": conditions(evaluation)},
    }
    return [
        _result(task, name, value, reference["source"], reference["split"], **subset)
        for name, value in evaluation["scores"].items()
    ]


def write_entries(folder: Path, evaluation: dict[str, Any]) -> Path | None:
    """Write the scores of an evaluation as entries of the Hub, in place of those of an earlier one.

    An entry belongs to a dataset of the Hub. Scores against a local or an embedded set stand in the card alone. No
    benchmark of the Hub defines a task for these scores, so a score's name is its task.

    Args:
        folder: of the model.
        evaluation: the record that `training/evaluate.py` writes.

    Returns:
        The file; None where there is nothing to write.

    Source: the Hub's format; one task a score is our choice.
    """
    file, dataset = folder / EVAL_RESULTS / "scores.yaml", evaluation["reference"]["source"]
    if not is_hub_id(dataset):
        file.unlink(missing_ok=True)
        return None
    notes = conditions(evaluation)
    entries = [EvalResultEntry(dataset, name, value, notes=notes) for name, value in evaluation["scores"].items()]
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True))
    return file


def conditions(evaluation: dict[str, Any]) -> str:
    """What the scores of an evaluation depend on, in one line."""
    reference, samples = evaluation["reference"], evaluation["samples"]
    first, last = samples["seeds"]
    networks = [
        f"{what} {network['name']} ({network['sha256'][:12]})"
        for what, network in (("Features", evaluation["features"]), ("CLIP", evaluation["clip"]))
        if network is not None
    ]
    parts = [
        *networks,
        f"reference `{reference['source']}` {reference['split']}, {reference['images']} images "
        f"({reference['sha256'][:12]})",
        f"{samples['images']} samples, {samples['labels']}",
        f"{samples['sampler']}, {samples['num_inference_steps']} steps",
        f"guidance {samples['guidance_scale']}, control guidance {samples['control_guidance_scale']}",
        *([f"control {samples['control']}"] if samples["control"] else []),
        f"seeds {first} to {last}, {samples['dtype']}",
    ]
    return f"{'; '.join(parts)}."


def _result(task: str, name: str, value: float, source: str, split: str, **subset: Any) -> EvalResult:
    dataset = source.removeprefix("embedded:")
    return EvalResult(
        task_type=task,
        dataset_type=dataset,
        dataset_name=dataset,
        dataset_split=split,
        metric_type=name,
        metric_name=name.replace("_", " "),
        metric_value=value,
        **subset,
    )
