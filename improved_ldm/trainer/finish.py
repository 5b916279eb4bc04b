"""The end of a run: the pipeline's folder with its samples, metrics, loss curve and card."""

import json
import platform
import resource
import shlex
import sys
import time
from importlib.metadata import version

import torch

from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import evaluate_obedience, load_real_images
from improved_ldm.hub.card import usage_lines, write_card
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.components import resolve
from improved_ldm.trainer.grids import draw_grid
from improved_ldm.trainer.reports import plot_loss, read_history
from improved_ldm.trainer.run import Run

NUM_REAL_IMAGES = 2000
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "datasets")


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
    metrics = {
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "loss": history[-1]["loss"] if history else None,
        "images_seen": run.config.training.steps * run.images_per_step,
        "parameters": sum(parameter.numel() for parameter in pipeline.denoiser.parameters()),
        "guidance_scale": pipeline.config.default_guidance_scale,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": run.config.seed,
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
        "device": device_name(run),
        "libraries": {name: version(name) for name in LIBRARIES},
        "obedience": _obedience(run, pipeline),
    }
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    metrics["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # KiB on Linux
    write_card(folder, pipeline, config, metrics, grid_rows[0], "samples.png")
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")  # last: with it the run is finished
    run.say(json.dumps({key: metrics[key] for key in ("loss", "obedience", "seconds", "peak_memory_gb")}, indent=2))
    run.say(f"\n{folder}/ holds the pipeline, samples.png, metrics.json, loss.png and README.md. To use it:\n")
    run.say(usage_lines(folder.as_posix(), pipeline, grid_rows[0]))


def device_name(run: Run) -> str:
    """The name of the device that the run is on."""
    if run.accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(run.accelerator.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _obedience(run: Run, pipeline: ImprovedLDMPipeline) -> dict:
    """The judge's findings, where it knows the data of the run."""
    config = run.config.evaluation
    if config.judge is None:
        return {}
    judge = Judge.from_pretrained(resolve(config.judge)).eval()
    source, side = run.config.data.source, pipeline.default_size
    if judge.config.data_source != source or judge.config.sample_size != side:
        run.say(f"not judged: {config.judge} knows {judge.config.data_source} at {judge.config.sample_size} pixels")
        return {}
    run.say("judging samples")
    real = load_real_images(open_rows(source, "test", label_column="label"), side, NUM_REAL_IMAGES)
    return evaluate_obedience(
        pipeline,
        judge,
        real,
        config.num_samples,
        config.num_coverage_samples,
        config.num_detail_samples,
        seed=run.config.seed,
    )
