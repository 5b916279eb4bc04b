"""The published numbers next to the measured ones, what differs between the two, and what measuring costs."""

import json
import math
from pathlib import Path
from typing import Any

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.evaluation.request import EvaluateConfig
from improved_ldm.models.cost import multiply_adds
from improved_ldm.places import shareable_place
from improved_ldm.trainer.components import build_objective
from publications.entries import Published
from publications.weights import ORIGIN

ASSUMED_FLOPS = 200e12  # floating-point operations a second of one GPU, for the estimate of its hours
PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z")


def cost_line(pipeline: ImprovedLDMPipeline, config: EvaluateConfig) -> str:
    """The floating-point operations of the samples, and about how long they take."""
    settings = pipeline.config
    scale = settings.default_guidance_scale if config.guidance_scale is None else config.guidance_scale
    steps = config.num_inference_steps or settings.default_num_inference_steps
    evaluations = steps * (1 if scale == 1 else 2)
    one = 2 * multiply_adds(pipeline.denoiser)
    total = one * evaluations * config.num_samples
    hours = total / ASSUMED_FLOPS / 3600
    about = f"about {hours:,.2g}" if hours > 0.01 else "less than 0.01"
    return (
        f"{prefixed(one)}FLOP per evaluation, {evaluations} evaluations per image, {config.num_samples:,} images: "
        f"{prefixed(total)}FLOP, {about} GPU hours at an assumed {prefixed(ASSUMED_FLOPS)}FLOP/s"
    )


def prefixed(value: float) -> str:
    """A number with three digits and a prefix of units: 119 G."""
    prefix = min(int(math.log10(value) / 3), len(PREFIXES) - 1)
    return f"{value / 1000**prefix:.3g} {PREFIXES[prefix]}"


def comparison(
    name: str, entry: Published, pipeline: ImprovedLDMPipeline, place: str, record: dict[str, Any]
) -> dict[str, Any]:
    """What is published, what is measured, and what differs between the two settings."""
    run, used = entry.run_config(None), record["samples"]
    settings = {
        "steps": (run.sampling.num_inference_steps, used["num_inference_steps"]),
        "guidance scale": (run.sampling.guidance_scale, used["guidance_scale"]),
        "guidance options": (run.sampling.guidance_options, dict(pipeline.config.guidance_options or {})),
        "scheduler": (
            type(build_objective(run).sampling_scheduler(run.sampling.sampler)).__name__,
            type(pipeline.scheduler).__name__,
        ),
    }
    origin = Path(pipeline.name_or_path) / ORIGIN
    if origin.exists():
        converted = json.loads(origin.read_text(encoding="utf-8"))
        settings["autoencoder"] = (run.autoencoder.pretrained, converted["autoencoder"])
        settings["constructor's arguments"] = (entry.config, converted["config"])
    return {
        "published": {"name": name, "origin": entry.origin, "scores": entry.numbers},
        "measured": {
            "model": shareable_place(place),
            "parameters": pipeline.denoiser.num_parameters(),
            "images": used["images"],
            "scores": {score: record["scores"].get(score) for score in entry.numbers},
            "notes": {score: record["notes"][score] for score in entry.numbers if score in record["notes"]},
        },
        "differences": {
            what: {"published": stated, "measured": ours}
            for what, (stated, ours) in settings.items()
            if stated != ours
        },
        "adm": record["comparison"],
    }


def table(found: dict[str, Any]) -> str:
    """Published, measured and difference, one score per line, and with what the numbers compare."""
    published, measured = found["published"], found["measured"]
    rows = [("", "published", "measured", "difference", "")]
    for score, stated in published["scores"].items():
        value, note = measured["scores"][score], measured["notes"].get(score, "")
        if value is None:
            rows.append((score.replace("_", " "), f"{stated:.2f}", "–", "–", "the feature network has no such score"))
        else:
            difference = "–" if note else f"{value - stated:+.2f}"
            note = note and f"not meaningful: {note}"
            rows.append((score.replace("_", " "), f"{stated:.2f}", f"{value:.2f}", difference, note))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    differing = [f"- {what}: {one['measured']}, not {one['published']}" for what, one in found["differences"].items()]
    return "\n".join(
        (
            f"published: {published['name']} ({published['origin']})",
            f"measured:  {measured['model']}, {measured['parameters']:,} parameters, {measured['images']:,} images",
            *lines,
            *(["Settings that differ from the published ones:"] if differing else []),
            *differing,
            found["adm"],
        )
    )
