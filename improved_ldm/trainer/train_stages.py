"""A whole run: data, models, and every stage from training to its pipeline, samples, metrics and card."""

import time
from dataclasses import replace

from improved_ldm.autoencoder import spatial_factor
from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.data.mixture import Mixture
from improved_ldm.naming import naming_part
from improved_ldm.pipeline import ImprovedLDMPipeline
from improved_ldm.resolution import default_size_of
from improved_ldm.trainer.adapters import set_trained
from improved_ldm.trainer.batches import open_batches
from improved_ldm.trainer.checks import check_models
from improved_ldm.trainer.components import build_denoiser, build_objective, load_autoencoder
from improved_ldm.trainer.config import Condition, RunConfig
from improved_ldm.trainer.data import Survey, open_data, survey
from improved_ldm.trainer.finish import finish
from improved_ldm.trainer.grids import grid_sampler
from improved_ldm.trainer.held_out_data import HeldOut, open_held_out
from improved_ldm.trainer.hub_push import pipeline_pusher
from improved_ldm.trainer.loop import Hook, train
from improved_ldm.trainer.run import start_run
from improved_ldm.trainer.semantic import SEMANTICS, Semantic, load_encoders, use_encoder
from improved_ldm.trainer.stages import Stage, check_stages, iterate_stages, list_stages
from improved_ldm.trainer.suitability import check_networks, show_reconstructions
from improved_ldm.trainer.switch import list_switches
from improved_ldm.trainer.validation import open_validation


def train_stages(config: RunConfig, condition: Condition):
    """Train every stage of a configuration; each writes its pipeline, samples, metrics and card to its folder.

    Args:
        config: configuration of the whole run.
        condition: what images are conditioned on, `class` or `text`; a stage can have another condition.
    """
    started = time.perf_counter()
    stages = list_stages(config, condition)

    # The data: opened and checked before anything else.
    check_models([stage.config for stage in stages], [stage.condition for stage in stages])
    data, looks, semantics, held_out = zip(*map(_look_at_data, stages), strict=True)
    first_run = start_run(stages[0].config)

    # The models: autoencoder and text encoder stay frozen, the denoiser is trained.
    vae = load_autoencoder(config.autoencoder).to(first_run.accelerator.device)
    encoders = load_encoders(semantics, vae)
    objective = build_objective(config)
    denoiser = build_denoiser(stages[0].config, vae, **semantics[0].conditions(encoders[0]))
    switches = list_switches(semantics, encoders, config.seed)
    stages = [replace(stage, conditions=switch) for stage, switch in zip(stages, switches, strict=True)]
    factor = spatial_factor(vae)
    check_stages(stages, denoiser, factor)
    reconstructions = check_networks(first_run, [stage.config for stage in stages], data, encoders)

    # The training: one stage after the other, each in the loop that all scripts share.
    for stage, run, start in iterate_stages(stages, first_run, denoiser, objective, config, factor):
        look, semantic = looks[stage.number], semantics[stage.number]
        encoder = use_encoder(encoders, stage.number, vae.device)
        pipeline = ImprovedLDMPipeline(
            vae,
            start.objective.sampling_scheduler(config.sampling.sampler, config.sampling.timestep_spacing),
            **semantic.pipeline_parts(encoder),
            default_original_size=look.original_side,
            default_size=default_size_of(stage.config.transform.resolution),
            default_guidance_scale=stage.config.sampling.guidance_scale,
            default_num_inference_steps=config.sampling.num_inference_steps,
            guidance_options=config.sampling.guidance_options or None,
            lineage=list(stage.lineage) or None,
        )
        pipeline.set_progress_bar_config(disable=True)  # samples have a bar of their own
        show_reconstructions(run, reconstructions[stage.number])
        seen = ControlRanges(stage.control_seen())
        push = pipeline_pusher(run, pipeline, seen)  # before the data is encoded, which can take hours
        grid_rows = semantic.grid_rows(encoder, look)
        validation = open_validation(run, held_out[stage.number], start, encoder, pipeline)
        batches = open_batches(run, data[stage.number], encoder, start.model.control_inputs, seen)
        sample = grid_sampler(run, pipeline, grid_rows, seen)
        hooks = [Hook(run.config.sampling.every, sample), Hook(run.config.hub.push_every, push)]
        set_trained(pipeline, train(run, start, batches, hooks, validation), seen)
        finish(run, pipeline, grid_rows, started)
        started = time.perf_counter()
    first_run.accelerator.end_training()


def _look_at_data(stage: Stage) -> tuple[Mixture, Survey, Semantic, HeldOut | None]:
    """The opened sets of a stage, its first rows, what is sampled, and its held-out images."""
    with naming_part(stage.name):
        mixture = open_data(stage.config.data, stage.condition == "text")
        semantic = SEMANTICS[stage.condition](stage.config, mixture)
        return mixture, survey(mixture), semantic, open_held_out(stage.config, mixture)
