"""The end of a run: the pipeline's folder with its samples, metrics, loss curve and card."""

import json
import resource
import time
from collections.abc import Callable
from typing import Any

from improved_ldm.data.sources import open_rows
from improved_ldm.embedded import resolve
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import RealImages, evaluate_obedience, load_real_images
from improved_ldm.hub.card import usage_lines, write_card
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.provenance import device_name, launch_command, library_versions, write_json
from improved_ldm.trainer.config import EvaluationConfig
from improved_ldm.trainer.grids import draw_grid
from improved_ldm.trainer.reports import plot_loss, read_history
from improved_ldm.trainer.run import Run

NUM_REAL_IMAGES = 2000


def finish(run: Run, pipeline: ImprovedLDMPipeline, grid_rows: list, started: float):
    """Save the pipeline and everything that describes it, on the main process, and say how to use it.

    Args:
        run: configuration, folder and processes.
        pipeline: with the averaged denoiser.
        grid_rows: prompts or class labels of the sample grid.
        started: `time.perf_counter()` when the script began.
    """
    if not run.accelerator.is_main_process:
        return
    folder, config = run.folder, run.config.model_dump(mode="json")
    pipeline.save_pretrained(folder)
    history = read_history(folder / "history.jsonl")
    if history:
        plot_loss(history, folder / "loss.png")
    run.say("drawing samples")
    draw_grid(pipeline, grid_rows, run.config.seed, folder / "samples.png")
    judged = open_judged(run.config.evaluation.judge, run.config.data.source, pipeline.default_size, run.say)
    if judged is not None:
        run.say("judging samples")
    metrics = {
        "command": launch_command(),
        "loss": history[-1]["loss"] if history else None,
        "images_seen": run.config.training.steps * run.images_per_step,
        "parameters": sum(parameter.numel() for parameter in pipeline.denoiser.parameters()),
        "guidance_scale": pipeline.config.default_guidance_scale,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": run.config.seed,
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
        "device": device_name(run.accelerator.device),
        "libraries": library_versions(),
        "obedience": measure_obedience(pipeline, judged, run.config.evaluation, run.config.seed),
    }
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    metrics["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # KiB on Linux
    write_card(folder, pipeline, config, metrics, grid_rows[0], "samples.png")
    write_json(folder / "metrics.json", metrics)  # last: with it the run is finished
    run.say(json.dumps({key: metrics[key] for key in ("loss", "obedience", "seconds", "peak_memory_gb")}, indent=2))
    run.say(f"\n{folder}/ holds the pipeline, samples.png, metrics.json, loss.png and README.md. To use it:\n")
    run.say(usage_lines(folder.as_posix(), pipeline, grid_rows[0]))


def open_judged(
    place: str | None, source: str, side: int, say: Callable[[str], None]
) -> tuple[Judge, RealImages] | None:
    """A judge and real images, where the judge knows the data.

    Args:
        place: `embedded:judge` or a folder of a `Judge`; None judges nothing.
        source: the data set, as `open_rows` takes it.
        side: pixels a side of the samples.
        say: told what is done.
    """
    if place is None:
        return None
    judge = Judge.from_pretrained(resolve(place)).eval()
    if judge.config.data_source != source or judge.config.sample_size != side:
        say(f"not judged: {place} knows {judge.config.data_source} at {judge.config.sample_size} pixels")
        return None
    return judge, load_real_images(open_rows(source, "test", label_column="label"), side, NUM_REAL_IMAGES)


def measure_obedience(
    pipeline: ImprovedLDMPipeline, judged: tuple[Judge, RealImages] | None, config: EvaluationConfig, seed: int
) -> dict[str, Any]:
    """The judge's findings; none without a judge."""
    if judged is None:
        return {}
    counts = config.num_samples, config.num_coverage_samples, config.num_detail_samples
    return evaluate_obedience(pipeline, *judged, *counts, seed=seed)
