"""A whole run: data, models, and every stage from training to its pipeline, samples, metrics and card."""

import time

from improved_ldm.autoencoder import spatial_factor
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.trainer.batches import open_batches, open_data, survey
from improved_ldm.trainer.checks import check_models
from improved_ldm.trainer.components import build_denoiser, build_objective, load_autoencoder
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import grid_sampler
from improved_ldm.trainer.hub_push import pipeline_pusher
from improved_ldm.trainer.loop import Hook, train
from improved_ldm.trainer.run import start_run
from improved_ldm.trainer.semantic import Semantic
from improved_ldm.trainer.stages import check_stages, iterate_stages, list_stages


def train_stages(config: RunConfig, semantic_type: type[Semantic]):
    """Train every stage of a configuration; each writes its pipeline, samples, metrics and card to its folder.

    Args:
        config: configuration of the whole run.
        semantic_type: `TextSemantic` for prompts, `ClassSemantic` for classes.
    """
    started = time.perf_counter()
    stages = list_stages(config)

    # The data: opened and checked before anything else.
    check_models([stage.config for stage in stages], semantic_type.takes_text)
    data = [open_data(stage.config.data, semantic_type.takes_text) for stage in stages]
    looks = [survey(rows) for rows in data]
    semantic = semantic_type(config, data)
    first_run = start_run(stages[0].config)

    # The models: autoencoder and text encoder stay frozen, the denoiser is trained.
    vae = load_autoencoder(config.autoencoder).to(first_run.accelerator.device)
    encoder = semantic.load_encoder(vae)
    objective = build_objective(config)
    denoiser = build_denoiser(stages[0].config, vae, **semantic.conditions(encoder))
    check_stages(stages, denoiser, spatial_factor(vae))

    # The training: one stage after the other, each in the loop that all scripts share.
    for stage, run, start in iterate_stages(stages, first_run, denoiser, objective, config):
        look = looks[stage.number]
        pipeline = ImprovedLDMPipeline(
            vae,
            start.objective.sampling_scheduler(config.sampling.sampler, config.sampling.timestep_spacing),
            **semantic.pipeline_parts(encoder),
            default_original_size=look.original_side,
            default_guidance_scale=stage.config.sampling.guidance_scale,
            default_num_inference_steps=config.sampling.num_inference_steps,
            guidance_options=config.sampling.guidance_options or None,
            lineage=list(stage.lineage) or None,
        )
        push = pipeline_pusher(run, pipeline)  # before the data is encoded, which can take hours
        grid_rows = semantic.grid_rows(encoder, look)
        batches = open_batches(run, data[stage.number], encoder, start.denoiser.control_inputs)
        sample = grid_sampler(pipeline, grid_rows, run.config.seed, run.folder / "samples")
        hooks = [Hook(run.config.sampling.every, sample), Hook(run.config.hub.push_every, push)]
        pipeline.denoiser = train(run, start, batches, hooks)
        finish(run, pipeline, grid_rows, started)
        started = time.perf_counter()
    first_run.accelerator.end_training()
