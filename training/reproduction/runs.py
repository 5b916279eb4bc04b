"""Trained pipelines and what was measured of them, kept so that no run is made twice."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.provenance import write_json
from improved_ldm.trainer.config import RunConfig
from reproduction.measures import MEASURES, Evaluator

# What does not change the weights of a run, or says only where things go.
NOT_OF_THE_WEIGHTS = {"output_dir": True, "sampling": True, "evaluation": True, "hub": True, "cache": {"folder"}}


def run_folder(output: Path, trainer: str, config: RunConfig) -> Path:
    """The folder of a run, named by what its weights depend on."""
    values = config.model_dump(mode="json", exclude=NOT_OF_THE_WEIGHTS)
    digest = hashlib.sha256(json.dumps([trainer, values], sort_keys=True).encode()).hexdigest()
    return output / "runs" / f"{trainer.removeprefix('train_')}-{digest[:12]}"


def trained(output: Path, trainer: str, config: RunConfig, train: Callable[[RunConfig], None]) -> Path:
    """The folder of a trained pipeline; it is trained, or its training goes on, where it is not finished.

    Args:
        output: where runs are kept.
        trainer: name of the script.
        config: of the run; its folders are set here.
        train: trains a configuration and leaves the pipeline in its `output_dir`.
    """
    folder = run_folder(output, trainer, config)
    if not (folder / "metrics.json").exists():
        update = {
            "output_dir": folder.as_posix(),
            "cache": config.cache.model_copy(update={"folder": (output / "cache").as_posix()}),
            "evaluation": config.evaluation.model_copy(update={"judge": None}),  # the tables measure by themselves
        }
        train(config.model_copy(update=update))
        for part in ("checkpoints", "logs"):
            shutil.rmtree(folder / part, ignore_errors=True)
    return folder


def measured(
    folder: Path, names: tuple[str, ...], call: dict[str, Any], seed: int, evaluator: Evaluator
) -> dict[str, float | None]:
    """What measures say of a trained pipeline; each is made once and kept beside it.

    Args:
        folder: of the pipeline.
        names: of the measures.
        call: arguments of the pipeline.
        seed: of the run.
        evaluator: what the measures compare with.

    Returns:
        A number a measure, or None where the model does not read what it is about.
    """
    file = folder / "measures.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    entry = kept.setdefault(json.dumps({"call": call, **evaluator.settings}, sort_keys=True), {})
    missing = [name for name in names if name not in entry]
    if missing:
        pipeline = ImprovedLDMPipeline.from_pretrained(folder).to(evaluator.device)
        pipeline.set_progress_bar_config(disable=True)
        samples = evaluator.samples(pipeline, call, seed)
        read = pipeline.denoiser.control_inputs
        for name in missing:
            measure = MEASURES[name]
            entry[name] = measure.of(samples) if measure.reads is None or measure.reads in read else None
        write_json(file, kept)
    return {name: entry[name] for name in names}
