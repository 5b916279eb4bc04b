"""Train a text-to-image model.

Usage: accelerate launch training/train_t2i.py [--config FILE] [--section.key value …]

Without arguments it trains the quickstart on the images that ship with the package.
"""

import sys
import time
from pathlib import Path

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.autoencoder import spatial_factor
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.sources import open_rows
from improved_ldm.trainer.batches import open_batches, survey
from improved_ldm.trainer.components import (
    build_denoiser,
    build_objective,
    load_autoencoder,
    load_text_encoder,
    text_dims,
)
from improved_ldm.trainer.config import RunConfig, parse_config_or_exit
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import diverse_prompts, grid_drawer
from improved_ldm.trainer.loop import train
from improved_ldm.trainer.pushes import pipeline_pusher
from improved_ldm.trainer.run import start_run
from improved_ldm.trainer.stages import begun_stages, check_stages, stages_of

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"
GRID_ROWS = 8


def train_stages(config: RunConfig):
    """Train every stage of a configuration; each leaves a pipeline, its samples, metrics and card in its folder."""
    started = time.perf_counter()
    stages = stages_of(config)

    # The data: opened and looked at before anything else is done.
    data = [
        open_rows(part.source, part.split, part.name, part.image_column, part.caption_column)
        for part in (stage.config.data for stage in stages)
    ]
    looks = [survey(rows) for rows in data]
    first_run = start_run(stages[0].config)
    device = first_run.accelerator.device

    # The models: autoencoder and text encoder stay as they are, the denoiser starts afresh.
    vae = load_autoencoder(config.autoencoder).to(device)
    tokenizer, text_encoder = load_text_encoder(config.text)
    encoder = SampleEncoder(vae, tokenizer, text_encoder.to(device), config.text.max_tokens)
    objective = build_objective(config)
    denoiser = build_denoiser(stages[0].config, vae, **text_dims(config.denoiser, encoder))
    check_stages(stages, denoiser, spatial_factor(vae))

    # The training: one stage after the other, each in the loop that all scripts share.
    for stage, run, start in begun_stages(stages, first_run, denoiser, objective, config):
        rows, first_rows = data[stage.number], looks[stage.number]
        pipeline = ImprovedLDMPipeline(
            vae,
            start.objective.sampling_scheduler(),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_padding=config.text.padding,
            text_noise_scale=config.text.noise_scale,
            max_text_tokens=config.text.max_tokens,
            default_original_size=first_rows.original_side,
            default_guidance_scale=config.sampling.guidance_scale,
            default_num_inference_steps=config.sampling.num_inference_steps,
            lineage=list(stage.lineage) or None,
        )
        push = pipeline_pusher(run, pipeline)  # before the data is encoded, which can take hours
        prompts = list(config.sampling.prompts or ()) or diverse_prompts(
            first_rows.captions, encoder.text(first_rows.captions).pooled, GRID_ROWS
        )
        batches = open_batches(run, rows, encoder)
        draw_samples = grid_drawer(pipeline, prompts, run.config.seed, run.folder / "samples")
        pipeline.denoiser = train(
            run, start.denoiser, start.objective, batches, draw_samples, start.averaged, start.optimizer_state, push
        )
        finish(run, pipeline, prompts, started)
        started = time.perf_counter()
    first_run.accelerator.end_training()


def main(argv: list[str]):
    train_stages(parse_config_or_exit(RunConfig, argv, QUICKSTART))


if __name__ == "__main__":
    main(sys.argv[1:])
