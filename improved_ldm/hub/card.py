"""The model card of a trained folder, rendered from its configuration and its metrics."""

from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from improved_ldm.pipeline import ImprovedLDMPipeline

TEMPLATE = Path(__file__).parent / "card_template.md"


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
    obedience = metrics["obedience"]
    scores = {  # of the model; what the judge says of real images is not
        name: value for name, value in obedience.items() if isinstance(value, float) and not name.startswith("real_")
    }
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image" if pipeline.takes_text else "unconditional-image-generation",
        tags=["improved_ldm", "disentangled-conditioning"],
        model_name=folder.name,
        eval_results=[_eval_result(name, value, config["data"]["source"]) for name, value in scores.items()] or None,
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
        evaluation=_evaluation_table(metrics),
        control=pipeline.denoiser.control_inputs,
        lineage=[_lineage_line(record) for record in pipeline.config.lineage or ()],
        side=pipeline.default_size,
    )
    file = folder / "README.md"
    card.save(file)
    return file


def _eval_result(name: str, value: float, source: str) -> EvalResult:
    return EvalResult(
        task_type="text-to-image",
        dataset_type=source.removeprefix("embedded:"),
        dataset_name=source.removeprefix("embedded:"),
        dataset_split="test",
        metric_type=name,
        metric_name=name.replace("_", " "),
        metric_value=value,
    )


def _evaluation_table(metrics: dict[str, Any]) -> str:
    obedience = metrics["obedience"]
    if not obedience:
        return "Not measured."
    rows = [f"| {name.replace('_', ' ')} | {_format(value)} |" for name, value in obedience.items()]
    note = (
        f"\n\n{metrics['scheduler']}, {metrics['num_inference_steps']} steps, guidance {metrics['guidance_scale']}, "
        f"seed {metrics['seed']}, {metrics['dtype']}. Classes, orientation and features are those of the judge that "
        "ships with the package; rows that begin with `real` are what it says of real test images."
    )
    return "\n".join(["| measure | value |", "| --- | --- |", *rows]) + note


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
