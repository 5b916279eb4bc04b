"""Trained pipelines and what was measured of them, kept so that no run is made twice."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.provenance import write_json
from improved_ldm.trainer.components import build_objective
from improved_ldm.trainer.config import RunConfig
from reproduction.measures import MEASURES, Scorer

# What does not change the weights of a run, or says only where things go.
KEYS_WITHOUT_EFFECT_ON_WEIGHTS = {
    **dict.fromkeys(("output_dir", "sampling", "evaluation", "hub"), True),
    "cache": {"folder"},
}
FORMER_KEYS = {"after": None}  # of earlier versions, whose runs keep their names and settings


def run_folder(output: Path, trainer: str, config: RunConfig) -> Path:
    """The folder of a run, named by what its weights depend on."""
    values = config.model_dump(mode="json", exclude=KEYS_WITHOUT_EFFECT_ON_WEIGHTS) | FORMER_KEYS
    digest = hashlib.sha256(json.dumps([trainer, values], sort_keys=True).encode()).hexdigest()
    return output / "runs" / f"{trainer.removeprefix('train_')}-{digest[:12]}"


def train_if_missing(output: Path, trainer: str, config: RunConfig, train: Callable[[RunConfig], None]) -> Path:
    """The folder of a trained pipeline; it is trained, or its training resumes, if it is not finished.

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
        config = config.model_copy(update=update)
        if len(config.stages) > 1:
            _share_first_stage(output, trainer, config, train)
        train(config)
        for part in ("logs",) if config.stages else ("checkpoints", "logs"):  # `curve` reads those of stages
            shutil.rmtree(folder / part, ignore_errors=True)
    return folder


def _share_first_stage(output: Path, trainer: str, config: RunConfig, train: Callable[[RunConfig], None]):
    """Train the first stage of a run in a folder of its own and link to it; runs with the same first stage share it.

    The trainer finds the stage finished and begins the next one from its checkpoint.
    """
    first = config.of_stage(0)
    link, shared = Path(first.output_dir), run_folder(output, trainer, first)
    if not (shared / "metrics.json").exists():
        train(first.model_copy(update={"output_dir": shared.as_posix()}))
    if not link.exists():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path("..", shared.name), target_is_directory=True)


def measure_if_missing(
    folder: Path, names: tuple[str, ...], call: dict[str, Any], seed: int, scorer: Scorer, config: RunConfig
) -> dict[str, float | None]:
    """What measures say of a trained pipeline; each is made once and kept beside it.

    Args:
        folder: of the pipeline.
        names: of the measures.
        call: arguments of the pipeline.
        seed: of the run.
        scorer: what the measures compare with.
        config: of the run; a sampler in it takes the place of the pipeline's.

    Returns:
        A number a measure, or None where the model does not read what it is about.
    """
    file = folder / "measures.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    sampler = {
        name: value
        for name, value in config.sampling.model_dump(include={"sampler", "timestep_spacing"}).items()
        if value is not None
    }
    entry = kept.setdefault(json.dumps({"call": call, **sampler, **scorer.settings(set(names))}, sort_keys=True), {})
    missing = [name for name in names if name not in entry]
    if missing:
        pipeline = ImprovedLDMPipeline.from_pretrained(folder).to(scorer.device)
        pipeline.set_progress_bar_config(disable=True)
        if sampler:
            pipeline.scheduler = build_objective(config).sampling_scheduler(**sampler)
        samples = scorer.samples(pipeline, call, seed)
        read = pipeline.denoiser.control_inputs
        for name in missing:
            measure = MEASURES[name]
            entry[name] = measure.of(samples) if measure.reads is None or measure.reads in read else None
        write_json(file, kept)
    return {name: entry[name] for name in names}
