"""Model cards, rendered from a run's configuration, its metrics and its lineage."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from improved_ldm.data.sources import is_hub_id
from improved_ldm.hub.eval_results import EVAL_RESULTS, conditions, judged_results, score_results, write_entries
from improved_ldm.pipeline import ImprovedLDMPipeline

TEMPLATE = Path(__file__).parent / "card_template.md"
TAG = "improved_ldm"
EVALUATION_FILE = "evaluation.json"
EVALUATION_PART = re.compile(r"(?<=^## Evaluation\n\n).*?(?=\n\n## |\Z)", re.DOTALL | re.MULTILINE)
# Licences that are known; every other set, autoencoder and text encoder states its own.
LICENCES = {
    "embedded:fashion-mnist": "MIT, Copyright 2017 Zalando SE",
    "embedded:autoencoder": "Apache-2.0",
    "embedded:clip": "Apache-2.0",
}


def usage_lines(folder: str, pipeline: ImprovedLDMPipeline, prompt: str | int) -> str:
    """Five lines of Python that load a folder and draw."""
    semantic = f"prompt={json.dumps(prompt, ensure_ascii=False)}" if pipeline.takes_text else f"class_labels={prompt}"
    flip = ", flip=True" if "flip" in pipeline.denoiser.control_inputs else ""
    return "\n".join(
        [
            "import improved_ldm",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}")',
            f"image = pipe({semantic}{flip}).images[0]",
            'image.save("image.png")',
        ]
    )


def card_data(
    name: str, pipeline: ImprovedLDMPipeline, config: dict[str, Any], tags: list[str], **more: Any
) -> ModelCardData:
    """The front matter of a card: what the Hub sorts models by.

    Args:
        name: of the model.
        pipeline: what was trained.
        config: the run's configuration.
        tags: beside the family's.
        more: further fields.
    """
    source = config["data"]["source"]
    return ModelCardData(
        license=config["hub"]["license"],
        library_name="diffusers",
        pipeline_tag="text-to-image" if pipeline.takes_text else "unconditional-image-generation",
        tags=[TAG, *tags],
        datasets=[source] if is_hub_id(source) else None,
        model_name=name,
        **more,
    )


def card_parts(pipeline: ImprovedLDMPipeline, config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """What the templates of all cards are filled with."""
    return {
        "config": config,
        "metrics": metrics,
        "licences": LICENCES,
        "semantic": "prompt" if pipeline.takes_text else "class",
    }


def render_card(
    address: str,
    pipeline: ImprovedLDMPipeline,
    config: dict[str, Any],
    metrics: dict[str, Any],
    prompt: str | int,
    picture: str | None = None,
    control_picture: str | None = None,
    sizes: Sequence[dict[str, Any]] = (),
) -> ModelCard:
    """The card of a trained model, or of one that could be trained.

    Args:
        address: folder that the lines of use load; its last part is the model's name.
        pipeline: what was trained; no weights are read.
        config: the run's configuration.
        metrics: what `metrics.json` holds; the card claims nothing else. Before training, the `command` alone.
        prompt: for the lines of use, a text or a class label.
        picture: file name of the sample grid; None shows none.
        control_picture: file name of the picture of the control's effect; None shows none.
        sizes: of the family member, each with `size`, `summary`, `parameters` and `multiply_adds`; empty lists none.

    Returns:
        The card.
    """
    name, denoiser = Path(address).name, pipeline.denoiser
    disentangled = denoiser.config.conditioning == "disentangled"
    tags, start = ["disentangled-conditioning"] if disentangled else [], config["denoiser"]["pretrained"]
    data = card_data(name, pipeline, config, tags, base_model=start if is_hub_id(start) else None)
    data.eval_results = judged_results(data.pipeline_tag, config["data"]["source"], metrics.get("obedience", {}))
    data.eval_results = data.eval_results or None
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        **card_parts(pipeline, config, metrics),
        name=name,
        address=address,
        trained="images_seen" in metrics,
        disentangled=disentangled,
        takes_text=pipeline.takes_text,
        usage=usage_lines(address, pipeline, prompt),
        denoiser=f"`{type(denoiser).__name__}`, {denoiser.summary}",
        parameters=denoiser.num_parameters(),
        control=denoiser.control_inputs,
        lineage=[_lineage_line(record) for record in pipeline.config.lineage or ()],
        side=pipeline.default_size,
        evaluation=_judged_text(metrics),
        picture=picture,
        control_picture=control_picture,
        sizes=sizes,
    )


def write_card(
    folder: Path,
    pipeline: ImprovedLDMPipeline,
    config: dict[str, Any],
    metrics: dict[str, Any],
    prompt: str | int,
    picture: str,
    control_picture: str | None = None,
) -> Path:
    """Write the card of a trained folder as its README.md; all else is as in `render_card`.

    Args:
        folder: the trained folder.

    Returns:
        The file.
    """
    file = folder / "README.md"
    render_card(folder.as_posix(), pipeline, config, metrics, prompt, picture, control_picture).save(file)
    return file


def forget_evaluation(folder: Path):
    """Remove what an evaluation left beside the card of a folder, before other weights take the place of its own."""
    (folder / EVALUATION_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / EVAL_RESULTS, ignore_errors=True)


def update_card(folder: Path) -> bool:
    """Show what `evaluation.json` of a trained folder holds in the evaluation part of its card, and nowhere else.

    Beside the card, scores against a dataset of the Hub become the Hub's entries in `.eval_results/`.

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
    source = yaml.safe_load((folder / "config.yaml").read_text())["data"]["source"]
    judged, task = _judged(evaluation) if evaluation.get("obedience") else metrics, card.data.pipeline_tag
    card.data.eval_results = judged_results(task, source, judged["obedience"]) + score_results(task, evaluation)
    text = f"{_table(evaluation['scores'])}\n\n{conditions(evaluation)}"
    if judged["obedience"]:
        text += f"\n\n{_judged_text(judged)}"
    card.text = EVALUATION_PART.sub(lambda _: text, card.text, count=1)
    card.save(file)
    write_entries(folder, evaluation)
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


def _judged_text(metrics: dict[str, Any]) -> str:
    obedience = metrics.get("obedience")
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
