"""The end of a run: the pipeline's folder with its samples, metrics, loss curve and card."""

import itertools
from functools import partial
from pathlib import Path

from improved_ldm.evaluation.meaning import judged_notes
from improved_ldm.evaluation.obedience import evaluate_obedience, open_judged
from improved_ldm.hub.adapter_card import adapter_usage_lines, write_adapter_card
from improved_ldm.hub.card import forget_evaluation, usage_lines, write_card
from improved_ldm.hub.export import export_code
from improved_ldm.pipeline import ImprovedLDMPipeline, NonFiniteLatentsError
from improved_ldm.places import shareable_place
from improved_ldm.provenance import write_json
from improved_ldm.trainer.bars import sampling_bar
from improved_ldm.trainer.checkpoints import HISTORY
from improved_ldm.trainer.grids import sample_control_grid, sample_grid
from improved_ldm.trainer.loss_plot import PICTURE, plot_loss
from improved_ldm.trainer.reports import read_history
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.run_record import run_record, say_what_was_skipped, time_and_memory
from improved_ldm.trainer.summary import judged_rows, summary_lines
from improved_ldm.trainer.validation import held_out_at, read_validation

SAMPLES, CONTROL = "samples.png", "control.png"


def finish(run: Run, pipeline: ImprovedLDMPipeline, grid_rows: list, started: float):
    """Save the pipeline and everything that describes it, on the main process, and print how to use it.

    Args:
        run: configuration, folder and processes.
        pipeline: pipeline with the averaged denoiser; if it has an adapter, only the adapter is saved.
        grid_rows: prompts or class labels of the sample grid.
        started: `time.perf_counter()` when the script started; the time before a resume is added.
    """
    if not run.accelerator.is_main_process:
        return
    folder, config = run.folder, run.config.model_dump(mode="json")
    forget_evaluation(folder)
    save_trained(pipeline, folder)
    history, measured = read_history(folder / HISTORY, run.say), read_validation(folder, run.say)
    if history:
        plot_loss(history, measured, folder / PICTURE)
    picture, control, obedience = _look(run, pipeline, grid_rows)
    metrics = {
        **run_record(run, history),
        "held_out": held_out_at(measured, history[-1]["step"]) if history else None,
        "parameters": _trained_parameters(pipeline),
        "guidance_scale": pipeline.config.default_guidance_scale,
        "num_inference_steps": pipeline.config.default_num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "dtype": str(pipeline.denoiser.dtype).removeprefix("torch."),
        "judge": shareable_place(run.config.evaluation.judge) if obedience else None,
        "obedience": obedience,
        "notes": judged_notes(obedience),
    }
    metrics |= time_and_memory(run, started)
    adapter = bool(pipeline.get_list_adapters())
    write = write_adapter_card if adapter else partial(write_card, control_picture=control and control.name)
    write(folder, pipeline, config, metrics, grid_rows[0], picture and picture.name)
    write_json(folder / "metrics.json", metrics)  # last, because it marks the run as finished
    say_what_was_skipped(run, metrics)
    run.say("\n".join(["", *summary_lines(metrics, history, judged_rows(metrics))]))
    what = "adapter" if adapter else "pipeline"
    samples = f"{SAMPLES}, " * bool(picture)
    run.say(f"\n{folder}/ holds the {what}, {samples}metrics.json, {PICTURE} and README.md. To use it:\n")
    usage = partial(adapter_usage_lines, config["base"]) if adapter else usage_lines
    run.say(usage(folder.as_posix(), pipeline, grid_rows[0]))


def _look(run: Run, pipeline: ImprovedLDMPipeline, grid_rows: list) -> tuple[Path | None, Path | None, dict]:
    """Save the grids of samples and of the control, and evaluate samples with the judge.

    Returns:
        The files of the two grids and the judge's numbers. If sampling fails they are None or empty, and the reason
        is printed.
    """
    picture = control = None
    for name in (SAMPLES, CONTROL):  # grids of earlier weights
        (run.folder / name).unlink(missing_ok=True)
    try:
        with sampling_bar(pipeline, run.say, "sampling pictures"):
            picture = sample_grid(pipeline, grid_rows, run.config.seed, run.folder / SAMPLES)
            if not pipeline.get_list_adapters():
                control = sample_control_grid(pipeline, grid_rows[0], run.config.seed, run.folder / CONTROL)
        judged = open_judged(
            run.config.evaluation.judge, ", ".join(run.config.data.places), pipeline.default_size, run.say
        )
        if judged is None:
            return picture, control, {}
        counts = run.config.evaluation.counts
        with sampling_bar(pipeline, run.say, "sampling for the judge"):
            return picture, control, evaluate_obedience(pipeline, *judged, **counts, seed=run.config.seed)
    except NonFiniteLatentsError as error:
        run.say(f"sampling failed: {error} The weights are saved.")
        return picture, control, {}


def save_trained(pipeline: ImprovedLDMPipeline, folder: Path):
    """Save what a run trained: an adapter alone, or the whole pipeline with the code that loads it."""
    if pipeline.get_list_adapters():
        pipeline.save_lora_weights(folder, **pipeline.lora_layers())
    else:
        pipeline.save_pretrained(folder)
        export_code(folder)


def _trained_parameters(pipeline: ImprovedLDMPipeline) -> int:
    """Number of parameters of the denoiser, or of the adapter alone."""
    adapted = [getattr(pipeline, component) for component in pipeline.get_list_adapters()]
    if not adapted:
        return sum(parameter.numel() for parameter in pipeline.denoiser.parameters())
    named = itertools.chain.from_iterable(model.named_parameters() for model in adapted)
    return sum(parameter.numel() for name, parameter in named if ".lora_" in name)
