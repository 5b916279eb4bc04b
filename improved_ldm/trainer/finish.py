"""The end of a run: the pipeline's folder with its samples, metrics, loss curve and card."""

import itertools
import json
import resource
import time
from functools import partial
from pathlib import Path

from improved_ldm.evaluation.obedience import evaluate_obedience, open_judged
from improved_ldm.hub.adapter_card import adapter_usage_lines, write_adapter_card
from improved_ldm.hub.card import forget_evaluation, usage_lines, write_card
from improved_ldm.hub.export import export_code
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.provenance import device_name, launch_command, library_versions, write_json
from improved_ldm.trainer.grids import draw_control, draw_grid
from improved_ldm.trainer.reports import plot_loss, read_history
from improved_ldm.trainer.run import Run


def finish(run: Run, pipeline: ImprovedLDMPipeline, grid_rows: list, started: float):
    """Save the pipeline and everything that describes it, on the main process, and say how to use it.

    Args:
        run: configuration, folder and processes.
        pipeline: with the averaged denoiser; of one with an adapter, that alone is saved.
        grid_rows: prompts or class labels of the sample grid.
        started: `time.perf_counter()` when the script began.
    """
    if not run.accelerator.is_main_process:
        return
    folder, config = run.folder, run.config.model_dump(mode="json")
    forget_evaluation(folder)
    save_trained(pipeline, folder)
    history = read_history(folder / "history.jsonl")
    if history:
        plot_loss(history, folder / "loss.png")
    run.say("drawing samples")
    draw_grid(pipeline, grid_rows, run.config.seed, folder / "samples.png")
    adapter = bool(pipeline.get_list_adapters())
    control = None if adapter else draw_control(pipeline, grid_rows[0], run.config.seed, folder / "control.png")
    judged = open_judged(run.config.evaluation.judge, run.config.data.source, pipeline.default_size, run.say)
    obedience = {}
    if judged is not None:
        run.say("judging samples")
        obedience = evaluate_obedience(pipeline, *judged, **run.config.evaluation.counts, seed=run.config.seed)
    metrics = {
        "command": launch_command(),
        "loss": history[-1]["loss"] if history else None,
        "images_seen": run.config.training.steps * run.images_per_step,
        "parameters": _trained_parameters(pipeline),
        "guidance_scale": pipeline.config.default_guidance_scale,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "seed": run.config.seed,
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
        "device": device_name(run.accelerator.device),
        "libraries": library_versions(),
        "obedience": obedience,
    }
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    metrics["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)  # KiB on Linux
    write = write_adapter_card if adapter else partial(write_card, control_picture=control and control.name)
    write(folder, pipeline, config, metrics, grid_rows[0], "samples.png")
    write_json(folder / "metrics.json", metrics)  # last: with it the run is finished
    run.say(json.dumps({key: metrics[key] for key in ("loss", "obedience", "seconds", "peak_memory_gb")}, indent=2))
    what = "adapter" if adapter else "pipeline"
    run.say(f"\n{folder}/ holds the {what}, samples.png, metrics.json, loss.png and README.md. To use it:\n")
    usage = partial(adapter_usage_lines, config["base"]) if adapter else usage_lines
    run.say(usage(folder.as_posix(), pipeline, grid_rows[0]))


def save_trained(pipeline: ImprovedLDMPipeline, folder: Path):
    """Save what a run trained: an adapter alone, or the whole pipeline with the code that loads it."""
    if pipeline.get_list_adapters():
        pipeline.save_lora_weights(folder, **pipeline.lora_layers())
    else:
        pipeline.save_pretrained(folder)
        export_code(folder)


def _trained_parameters(pipeline: ImprovedLDMPipeline) -> int:
    """Parameters of the denoiser, or of the adapter alone."""
    adapted = [getattr(pipeline, component) for component in pipeline.get_list_adapters()]
    if not adapted:
        return sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    named = itertools.chain.from_iterable(model.named_parameters() for model in adapted)
    return sum(parameter.numel() for name, parameter in named if ".lora_" in name)
