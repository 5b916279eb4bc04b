"""The model card of a trained folder, rendered from its configuration and its metrics."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from improved_ldm.pipeline import ImprovedLDMPipeline

TEMPLATE = Path(__file__).parent / "card_template.md"
TAG = "improved_ldm"
EVALUATION_FILE = "evaluation.json"
EVALUATION_PART = re.compile(r"(?<=^## Evaluation\n\n).*?(?=\n\n## |\Z)", re.DOTALL | re.MULTILINE)


def usage_lines(folder: str, pipeline: ImprovedLDMPipeline, prompt: str | int) -> str:
    """Five lines of Python that load a folder and draw."""
    semantic = f"prompt={prompt!r}" if pipeline.takes_text else f"class_labels={prompt}"
    flip = ", flip=True" if "flip" in pipeline.denoiser.control_inputs else ""
    return "\n".join(
        [
            "import improved_ldm",
            "from diffusers import DiffusionPipeline",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}")',
            f"image = pipe({semantic}{flip}).images[0]",
            'image.save("image.png")',
        ]
    )


def write_card(
    folder: Path,
    pipeline: ImprovedLDMPipeline,
    config: dict[str, Any],
    metrics: dict[str, Any],
    prompt: str | int,
    picture: str,
) -> Path:
    """Write the card of a trained folder as its README.md.

    Args:
        folder: the trained folder.
        pipeline: what was trained.
        config: the run's configuration.
        metrics: what `metrics.json` holds; the card claims nothing else.
        prompt: for the lines of use.
        picture: file name of the sample grid.

    Returns:
        The file.
    """
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if pipeline.takes_text else "unconditional-image-generation",
        tags=[TAG, "disentangled-conditioning"],
        model_name=folder.name,
        eval_results=_judged_results(config["data"]["source"], metrics) or None,
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=folder.name,
        semantic="prompt" if pipeline.takes_text else "class",
        picture=picture,
        usage=usage_lines(folder.as_posix(), pipeline, prompt),
        denoiser=type(pipeline.denoiser).__name__,
        size=pipeline.denoiser.summary,
        conditioning=config["denoiser"]["conditioning"],
        parameters=f"{metrics['parameters']:,}",
        source=config["data"]["source"],
        split=config["data"]["split"],
        prediction=config["objective"]["prediction"],
        images=f"{metrics['images_seen']:,}",
        device=metrics["device"],
        command=metrics["command"],
        evaluation=_judged_text(metrics),
        control=pipeline.denoiser.control_inputs,
        lineage=[_lineage_line(record) for record in pipeline.config.lineage or ()],
        side=pipeline.default_size,
    )
    file = folder / "README.md"
    card.save(file)
    return file


def update_card(folder: Path) -> bool:
    """Show what `evaluation.json` of a trained folder holds in the evaluation part of its card, and nowhere else.

    Args:
        folder: the trained folder, as a training script and then `training/evaluate.py` leave it.

    Returns:
        Whether there was a card of `write_card` to update.
    """
    file = folder / "README.md"
    if not file.exists():
        return False
    card = ModelCard.load(file)
    if TAG not in (card.data.tags or ()) or EVALUATION_PART.search(card.text) is None:
        return False
    evaluation = json.loads((folder / EVALUATION_FILE).read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    judged = _judged(evaluation) if evaluation.get("obedience") else metrics
    card.data.eval_results = _judged_results(config["data"]["source"], judged) + _evaluation_results(evaluation)
    text = _evaluation_text(evaluation)
    if judged["obedience"]:
        text += f"\n\n{_judged_text(judged)}"
    card.text = EVALUATION_PART.sub(lambda _: text, card.text, count=1)
    card.save(file)
    return True


def _judged(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What the judge found in an evaluation, as `metrics.json` of a training run has it."""
    samples = evaluation["samples"]
    return {
        "obedience": evaluation["obedience"] | evaluation["disentanglement"],
        "scheduler": samples["sampler"],
        "num_inference_steps": samples["num_inference_steps"],
        "guidance_scale": samples["guidance_scale"],
        "seed": samples["seeds"][0],
        "dtype": samples["dtype"],
    }


def _judged_results(source: str, metrics: dict[str, Any]) -> list[EvalResult]:
    """What the judge found in the model's samples; what it says of real images is not of the model."""
    return [
        _eval_result(name, value, source, "test")
        for name, value in metrics["obedience"].items()
        if isinstance(value, float) and not name.startswith("real_")
    ]


def _evaluation_results(evaluation: dict[str, Any]) -> list[EvalResult]:
    reference = evaluation["reference"]
    height, width = reference["resolution"]
    subset = {
        "dataset_config": f"{reference['images']} images at {height}x{width}",
        "dataset_args": {"sha256": reference["sha256"], "conditions": _conditions(evaluation)},
    }
    return [
        _eval_result(name, value, reference["source"], reference["split"], **subset)
        for name, value in evaluation["scores"].items()
    ]


def _eval_result(name: str, value: float, source: str, split: str, **subset: Any) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type=source.removeprefix("embedded:"),
        dataset_name=source.removeprefix("embedded:"),
        dataset_split=split,
        metric_type=name,
        metric_name=name.replace("_", " "),
        metric_value=value,
        **subset,
    )


def _evaluation_text(evaluation: dict[str, Any]) -> str:
    return f"{_table(evaluation['scores'])}\n\n{_conditions(evaluation)}"


def _conditions(evaluation: dict[str, Any]) -> str:
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


def _judged_text(metrics: dict[str, Any]) -> str:
    obedience = metrics["obedience"]
    if not obedience:
        return "Not measured."
    note = (
        f"\n\n{metrics['scheduler']}, {metrics['num_inference_steps']} steps, guidance {metrics['guidance_scale']}, "
        f"seed {metrics['seed']}, {metrics['dtype']}. Classes, orientation and features are those of the judge that "
        "ships with the package; rows that begin with `real` are what it says of real test images."
    )
    return _table(obedience) + note


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {_format(value)} |" for name, value in values.items()]
    return "\n".join(["| measure | value |", "| --- | --- |", *rows])


def _lineage_line(record: dict[str, Any]) -> str:
    """What a record of the lineage says, in words."""
    source, details = record["source"] or "a model in memory", {**record}
    details.pop("source")
    if "resolution" in details:
        low, high = details.pop("resolution")
        details = {"pixels": f"{low} to {high}", **details}
    return ", ".join([f"`{source}`", *(f"{name} {value}" for name, value in details.items())])


def _format(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
