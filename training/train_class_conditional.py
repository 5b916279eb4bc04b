"""Train a class-conditional model.

Usage: accelerate launch training/train_class_conditional.py [--config FILE] [--section.key value …]

Without arguments it trains on the ten classes of the images that ship with the package.
"""

import sys
import time
from pathlib import Path

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.sources import open_rows
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.trainer.batches import open_batches, survey
from improved_ldm.trainer.components import build_denoiser, load_autoencoder
from improved_ldm.trainer.config import RunConfig, parse_config_or_exit
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import draw_grid
from improved_ldm.trainer.loop import train
from improved_ldm.trainer.run import start_run

DEFAULT = Path(__file__).parent / "configs" / "fashion_classes.yaml"
GRID_ROWS = 10


def main(argv: list[str]):
    started = time.perf_counter()
    config = parse_config_or_exit(RunConfig, argv, DEFAULT)

    # The data: opened and looked at before anything else is done.
    data = config.data
    rows = open_rows(data.source, data.split, data.name, data.image_column, None, data.label_column)
    first_rows = survey(rows)
    num_classes = len(rows.class_names or ()) or data.num_classes
    if num_classes is None:
        raise ValueError(f"column {data.label_column!r} does not name its classes: give `--data.num_classes`.")
    run = start_run(config)

    # The models: the autoencoder stays as it is, the denoiser starts afresh.
    vae = load_autoencoder(config.autoencoder).to(run.accelerator.device)
    objective = make_objective(**config.objective.model_dump())
    denoiser = build_denoiser(config, vae, num_classes=num_classes)
    pipeline = ImprovedLDMPipeline(
        vae,
        objective.sampling_scheduler(),
        default_original_size=first_rows.original_side,
        default_guidance_scale=config.sampling.guidance_scale,
        default_num_inference_steps=config.sampling.num_inference_steps,
        class_names=rows.class_names,
    )
    labels = list(range(min(GRID_ROWS, num_classes)))

    # The training: cache or stream, then the loop that all scripts share.
    def draw_samples(averaged, step: int):
        pipeline.denoiser = averaged
        draw_grid(pipeline, labels, config.seed, run.folder / "samples" / f"step-{step:07d}.png")

    batches = open_batches(run, rows, SampleEncoder(vae))
    averaged = train(run, denoiser, objective, batches, draw_samples)

    # What is left: the pipeline with its samples, metrics and card.
    pipeline.denoiser = averaged
    finish(run, pipeline, labels, started)


if __name__ == "__main__":
    main(sys.argv[1:])
