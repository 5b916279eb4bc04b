"""Train a class-conditional model.

Usage: accelerate launch training/train_class_conditional.py [--config FILE] [--section.key value …]

Without arguments it trains on the ten classes of the images that ship with the package.
"""

import sys
import time
from pathlib import Path

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.autoencoder import spatial_factor
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.sources import open_rows
from improved_ldm.trainer.batches import open_batches, survey
from improved_ldm.trainer.components import build_denoiser, build_objective, load_autoencoder
from improved_ldm.trainer.config import RunConfig, parse_config_or_exit
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import grid_drawer
from improved_ldm.trainer.loop import train
from improved_ldm.trainer.pushes import pipeline_pusher
from improved_ldm.trainer.run import start_run
from improved_ldm.trainer.stages import begun_stages, check_stages, stages_of

DEFAULT = Path(__file__).parent / "configs" / "fashion_classes.yaml"
GRID_ROWS = 10


def train_stages(config: RunConfig):
    """Train every stage of a configuration; each leaves a pipeline, its samples, metrics and card in its folder."""
    started = time.perf_counter()
    stages = stages_of(config)

    # The data: opened and looked at before anything else is done.
    data = [
        open_rows(part.source, part.split, part.name, part.image_column, None, part.label_column, part.num_classes)
        for part in (stage.config.data for stage in stages)
    ]
    looks = [survey(rows) for rows in data]
    counts = {len(rows.class_names or ()) or config.data.num_classes for rows in data}
    if counts == {None}:
        raise ValueError(f"column {config.data.label_column!r} does not name its classes: give `--data.num_classes`.")
    if len(counts) > 1:
        raise ValueError(f"the stages' sets have {', '.join(map(str, counts))} classes; they must have the same.")
    (num_classes,) = counts
    if any(rows.class_names != data[0].class_names for rows in data):
        raise ValueError("the stages' sets name their classes differently; a label must mean the same in all of them.")
    first_run = start_run(stages[0].config)

    # The models: the autoencoder stays as it is, the denoiser starts afresh.
    vae = load_autoencoder(config.autoencoder).to(first_run.accelerator.device)
    objective = build_objective(config)
    denoiser = build_denoiser(stages[0].config, vae, num_classes=num_classes)
    labels = list(range(min(GRID_ROWS, num_classes)))
    check_stages(stages, denoiser, spatial_factor(vae))

    # The training: one stage after the other, each in the loop that all scripts share.
    for stage, run, start in begun_stages(stages, first_run, denoiser, objective, config):
        rows, first_rows = data[stage.number], looks[stage.number]
        pipeline = ImprovedLDMPipeline(
            vae,
            start.objective.sampling_scheduler(),
            default_original_size=first_rows.original_side,
            default_guidance_scale=config.sampling.guidance_scale,
            default_num_inference_steps=config.sampling.num_inference_steps,
            class_names=rows.class_names,
            lineage=list(stage.lineage) or None,
        )
        push = pipeline_pusher(run, pipeline)  # before the data is encoded, which can take hours
        batches = open_batches(run, rows, SampleEncoder(vae))
        draw_samples = grid_drawer(pipeline, labels, run.config.seed, run.folder / "samples")
        pipeline.denoiser = train(
            run, start.denoiser, start.objective, batches, draw_samples, start.averaged, start.optimizer_state, push
        )
        finish(run, pipeline, labels, started)
        started = time.perf_counter()
    first_run.accelerator.end_training()


def main(argv: list[str]):
    train_stages(parse_config_or_exit(RunConfig, argv, DEFAULT))


if __name__ == "__main__":
    main(sys.argv[1:])
