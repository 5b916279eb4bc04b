"""Model cards, rendered from the configuration, the metrics and the lineage of a run."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from improved_ldm.conditioning.control import INPUTS_OF_PARTS, variables_read
from improved_ldm.evaluation.meaning import judged_noise, judged_notes, score_noise, score_notes
from improved_ldm.evaluation.measures import Measure, judged_measure, score_measure
from improved_ldm.hub.eval_results import EVAL_RESULTS, conditions, judged_results, score_results, write_entries
from improved_ldm.lineage import CHANGES, conditions_lines
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.places import is_hub_id, shareable_place
from improved_ldm.resolution import resolution_of, size_text

TEMPLATE = Path(__file__).parent / "card_template.md"
TAG = "improved_ldm"
JUDGE = "embedded:judge"
EVALUATION_FILE = "evaluation.json"
EVALUATION_PART = re.compile(r"(?<=^## Evaluation\n\n).*?(?=\n\n## |\Z)", re.DOTALL | re.MULTILINE)
# Licences of the embedded data and models. Other data sets, autoencoders and text encoders state their own.
LICENCES = {
    "embedded:fashion-mnist": "MIT, Copyright 2017 Zalando SE",
    "embedded:emoji": "MIT, Copyright Microsoft Corporation, and Apache-2.0, Google",
    "embedded:autoencoder": "Apache-2.0",
    "embedded:clip": "Apache-2.0",
}


def usage_lines(folder: str, pipeline: ImprovedLDMPipeline, prompt: str | int) -> str:
    """Five lines of Python that load a folder and sample an image."""
    semantic = f"{pipeline.semantic_argument}={json.dumps(prompt, ensure_ascii=False)}"
    switches = [row.name for row in pipeline.varied_control() if row.is_switch]
    control = f", {switches[0]}=True" if switches else ""
    return "\n".join(
        [
            "import improved_ldm",
            "from diffusers import DiffusionPipeline",
            "",
            f'pipe = DiffusionPipeline.from_pretrained("{folder}")',
            f"image = pipe({semantic}{control}).images[0]",
            'image.save("image.png")',
        ]
    )


def card_data(
    name: str, pipeline: ImprovedLDMPipeline, config: dict[str, Any], tags: list[str], **more: Any
) -> ModelCardData:
    """The front matter of a card, which the Hub uses to list and filter models.

    Args:
        name: Name of the model.
        pipeline: The trained pipeline.
        config: Configuration of the run.
        tags: Tags besides the one of the model family.
        more: Further fields.
    """
    hub_sets = [source["source"] for source in data_sources(config) if is_hub_id(source["source"])]
    return ModelCardData(
        license=config["hub"]["license"],
        library_name="diffusers",
        pipeline_tag="text-to-image" if pipeline.takes_text else "unconditional-image-generation",
        tags=[TAG, *tags],
        datasets=hub_sets or None,
        model_name=name,
        **more,
    )


def data_sources(config: dict[str, Any], seen: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The sets that a run reads, for the card.

    Args:
        config: Configuration of the run.
        seen: Number of images seen of each set, if they are several and it is known.

    Returns:
        For each set `source`, `split` and, if they are several, `share` of the samples and the number `seen`.
    """
    data = config["data"]
    if not data.get("sources"):
        return [{"source": data["source"], "split": data["split"]}]
    total = sum(source["weight"] for source in data["sources"])
    return [
        {
            "source": source["source"],
            "split": source["split"] or data["split"],
            "share": source["weight"] / total,
            "seen": seen[number] if number < len(seen) else None,
        }
        for number, source in enumerate(data["sources"])
    ]


def card_parts(pipeline: ImprovedLDMPipeline, config: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """The values that all card templates share. Sources are named without local folders."""
    places = {"data": "source", "autoencoder": "pretrained", "text": "pretrained"}
    named = {"base": shareable_place(config["base"])} if "base" in config else {}
    named |= {
        section: {**config[section], key: shareable_place(config[section][key])} for section, key in places.items()
    }
    read, varied = pipeline.denoiser.control_inputs, {row.name for row in pipeline.varied_control()}
    return {
        "config": {**config, **named},
        "sources": [
            {**source, "source": shareable_place(source["source"])}
            for source in data_sources(config, metrics.get("images_by_source", ()))
        ],
        "control": variables_read(read),
        "never_varied": [row.name for row in variables_read(read - varied)],
        "parts": ", ".join(part for part, inputs in INPUTS_OF_PARTS.items() if inputs & read),
        "metrics": metrics,
        "skipped": skipped_text(metrics.get("skipped_rows", {})),
        "licences": LICENCES,
        "semantic": "prompt" if pipeline.takes_text else "class",
    }


def skipped_text(skipped: dict[str, int]) -> str:
    """Numbers of skipped rows with their reasons, in words; "" if no rows were skipped."""
    return ", ".join(f"{count:,} ({reason})" for reason, count in skipped.items())


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
    """Render the card of a model, before or after training.

    Args:
        address: Folder or Hub id that the usage example loads. Its last part is the name of the model.
        pipeline: The pipeline; its weights are not read.
        config: Configuration of the run.
        metrics: Content of `metrics.json`. The card states no other numbers. Before training, only `command`.
        prompt: Prompt or class label of the usage example.
        picture: File name of the sample grid; None shows no picture.
        control_picture: File name of the picture of the control's effect; None shows no picture.
        sizes: Sizes of the family member to list, each with `size`, `summary`, `parameters` and `multiply_adds`.

    Returns:
        The card.
    """
    name, denoiser = Path(address).name, pipeline.denoiser
    disentangled = denoiser.config.conditioning == "disentangled"
    tags, start = ["disentangled-conditioning"] if disentangled else [], config["denoiser"]["pretrained"]
    data = card_data(name, pipeline, config, tags, base_model=start if is_hub_id(start) else None)
    source = shareable_place(config["data"]["source"])
    data.eval_results = judged_results(data.pipeline_tag, source, metrics.get("obedience", {}), _judge(metrics))
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
        lineage=[_lineage_line(record) for record in pipeline.config.lineage or ()],
        size="{}x{}".format(*pipeline.default_size),
        resolution=size_text(resolution_of(*pipeline.default_size)),
        size_text=size_text,
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
    picture: str | None,
    control_picture: str | None = None,
) -> Path:
    """Write the card of a trained folder as its README.md. The other arguments are as for `render_card`.

    Args:
        folder: The trained folder.

    Returns:
        The file of the card.
    """
    file = folder / "README.md"
    address = shareable_place(folder.as_posix())
    render_card(address, pipeline, config, metrics, prompt, picture, control_picture).save(file)
    return file


def forget_evaluation(folder: Path):
    """Remove the evaluation files next to a folder's card, before its weights are replaced."""
    (folder / EVALUATION_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / EVAL_RESULTS, ignore_errors=True)


def update_card(folder: Path) -> bool:
    """Write the results in `evaluation.json` of a trained folder to the evaluation section of its card.

    The rest of the text stays as it is. Scores against a Hub dataset are also written to `.eval_results/` for the Hub.

    Args:
        folder: The trained folder, after a training script and `training/evaluate.py`.

    Returns:
        Whether the folder has a card of `write_card` to update.
    """
    file = folder / "README.md"
    if not file.exists():
        return False
    card = ModelCard.load(file)
    if TAG not in (card.data.tags or ()) or EVALUATION_PART.search(card.text) is None:
        return False
    evaluation = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    source = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]["source"]
    judged, task = _judged(evaluation) if evaluation.get("obedience") else metrics, card.data.pipeline_tag
    results = judged_results(task, source, judged["obedience"], _judge(judged)) + score_results(task, evaluation)
    card.data.eval_results = results or None
    scores = _table(
        evaluation["scores"], partial(score_measure, evaluation), score_notes(evaluation), score_noise(evaluation)
    )
    text = "\n\n".join([scores, conditions(evaluation), *_comparisons(evaluation)])
    if judged["obedience"]:
        text += f"\n\n{_judged_text(judged)}"
    card.text = EVALUATION_PART.sub(lambda _: text, card.text, count=1)
    card.save(file)
    write_entries(folder, evaluation)
    return True


def _comparisons(evaluation: dict[str, Any]) -> list[str]:
    """With what the scores compare, as the record states it. Records of earlier versions do not."""
    lines = [evaluation["comparison"]] if "comparison" in evaluation else []
    judged = evaluation.get("obedience") or {}
    if "judge_fid" in judged and evaluation["features"]["name"] == _judge(evaluation):
        lines.append("The two Fréchet distances are of different samples and real images; they do not compare.")
    return lines


def _judged(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The judge's numbers in an evaluation, in the format of a training run's `metrics.json`."""
    samples = evaluation["samples"]
    return {
        "obedience": evaluation["obedience"] | evaluation["disentanglement"],
        "scheduler": samples["sampler"],
        "num_inference_steps": samples["num_inference_steps"],
        "guidance_scale": samples["guidance_scale"],
        "seed": samples["seeds"][0],
        "judge": evaluation.get("judge", JUDGE),
        "dtype": samples["dtype"],
    }


def _judge(metrics: dict[str, Any]) -> str:
    """Name of the judge. Records of earlier versions do not state it; they come from the embedded judge."""
    return metrics.get("judge", JUDGE)


def _judged_text(metrics: dict[str, Any]) -> str:
    obedience = metrics.get("obedience")
    if not obedience:
        return "Not measured."
    note = (
        f"\n\n{metrics['scheduler']}, {metrics['num_inference_steps']} steps, guidance {metrics['guidance_scale']}, "
        f"seed {metrics['seed']}, {metrics['dtype']}. Classes, orientation and features are determined by the "
        f"judge `{_judge(metrics)}`; rows that begin with `real` are its results for real test images."
    )
    shown = {name: value for name, value in obedience.items() if not name.startswith("num_")}
    return (
        _table(
            shown,
            partial(judged_measure, obedience, _judge(metrics)),
            judged_notes(obedience),
            judged_noise(obedience),
        )
        + note
    )


def _table(
    values: dict[str, Any], measure: Callable[[str], Measure], notes: dict[str, str], noise: dict[str, str]
) -> str:
    """A table of numbers that states which direction is better and the number of images.

    Args:
        values: Numbers by name.
        measure: Maps a name to its `Measure`.
        notes: Why numbers are not meaningful, by name.
        noise: The part of `notes` about numbers that noise would reach too. These are left out and named below.
    """
    rows = []
    for name, value in values.items():
        if name not in noise:
            shown, mark = measure(name), f", not meaningful: {notes[name]}" if name in notes else ""
            rows.append(f"| {shown.label} | {_format(value)}{mark} | {shown.better or '–'} | {shown.images or '–'} |")
    table = "\n".join(["| measure | value | better | images |", "| --- | --- | --- | --- |", *rows])
    reasons = {reason: [measure(name).label for name in noise if noise[name] == reason] for reason in noise.values()}
    left_out = [
        f"Left out because noise would reach them too: {', '.join(names)}; {why}." for why, names in reasons.items()
    ]
    return "\n\n".join([table, *left_out])


def _lineage_line(record: dict[str, Any]) -> str:
    """A record of the lineage in words."""
    source = record["source"] or "a model in memory"
    details = {name: value for name, value in record.items() if name not in ("source", *CHANGES)}
    if "resolution" in details:
        details = {"pixels": " to ".join(map(size_text, details.pop("resolution"))), **details}
    if "data" in details:
        details["data"] = " to ".join(f"`{place}`" for place in details["data"])
    line = ", ".join([f"`{source}`", *(f"{name} {value}" for name, value in details.items())])
    return "; ".join([line, *conditions_lines(record)])


def _format(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
