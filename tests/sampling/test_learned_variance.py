"""Ancestral sampling with a variance that the denoiser predicts, and the guidance options of the published models."""

import math

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from improved_ldm.conditioning.control import control_tensor, null_control
from improved_ldm.conditioning.guidance import GuidanceOptions
from improved_ldm.diffusion.objectives import make_objective

STEPS = 5


def learned(**options):
    objective = make_objective("epsilon", beta_schedule="linear", learned_variance=True)
    return objective.sampling_scheduler(**options)


@pytest.fixture
def pipe(class_pipeline):
    return class_pipeline(learned(), out_channels=8)


def sample(pipe, seed=0, **call):
    call = {"class_labels": [0, 1], "num_inference_steps": STEPS, "output_type": "latent"} | call
    return pipe(generator=torch.Generator().manual_seed(seed), **call).images


def expected(pipe, scale, options, labels=(0, 1), seed=0):
    """The latents of ancestral steps in float64, with the variance and the guidance by their formulas."""
    denoiser, generator = pipe.denoiser, torch.Generator().manual_seed(seed)
    latents = torch.randn(len(labels), 4, 4, 4, generator=generator).double()
    alphas = (1 - pipe.scheduler.betas.double()).cumprod(0)
    timesteps = torch.linspace(999, 0, STEPS).round().long().tolist()
    labels, null = torch.tensor(labels), torch.full((len(labels),), denoiser.config.num_classes)
    control = pipe.make_controls(len(labels), 8, 8)
    for t, before in zip(timesteps, [*timesteps[1:], None], strict=True):
        with torch.no_grad():
            one, other = (
                denoiser(latents.float(), torch.tensor(t), class_labels=label, control=part).sample.double()
                for label, part in ((labels, control_tensor(control)), (null, null_control(len(labels))))
            )
        guided = options.channels or 4
        scale_now = options.scale_at(scale, t)
        epsilon = torch.cat([(other + scale_now * (one - other))[:, :guided], one[:, guided:4]], dim=1)
        share = (one[:, 4:] + 1) / 2
        alpha, alpha_before = alphas[t], alphas[before] if before is not None else torch.tensor(1.0).double()
        beta = 1 - alpha / alpha_before
        start = (latents - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        of_start, of_noisy = alpha_before.sqrt() * beta, (1 - beta).sqrt() * (1 - alpha_before)
        latents = (of_start * start + of_noisy * latents) / (1 - alpha)
        if before is not None:
            least = (beta * (1 - alpha_before) / (1 - alpha)).log()
            log_variance = share * beta.log() + (1 - share) * least
            noise = torch.randn(latents.shape, generator=generator).double()
            latents = latents + (log_variance / 2).exp() * noise
    return latents.float()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": 3},
        {"channels": 3, "schedule": "power_cosine", "power": 4.0},
        {"schedule": "interval", "interval": [200, 800]},
    ],
)
def test_ancestral_steps_follow_their_formulas(pipe, options):
    found = sample(pipe, guidance_scale=3.0, guidance_options=options)
    assert_close(found, expected(pipe, 3.0, GuidanceOptions.read(options)), rtol=1e-4, atol=1e-4)


def test_the_options_are_saved_with_the_pipeline_and_those_of_a_call_replace_them(class_pipeline, tmp_path):
    pipe = class_pipeline(learned(), out_channels=8)
    pipe.register_to_config(guidance_options={"channels": 3})
    first = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.scheduler, DDPMScheduler) and loaded.scheduler.config.variance_type == "learned_range"
    assert_close(sample(loaded), first, rtol=0, atol=0)
    again = type(pipe)(**loaded.components)
    assert_close(sample(again), first, rtol=0, atol=0)
    assert not torch.allclose(sample(loaded, guidance_options={}), first)


def test_outside_the_interval_the_unconditional_prediction_is_not_evaluated(pipe):
    sizes, forward = [], pipe.denoiser.forward
    pipe.denoiser.forward = lambda hidden_states, *args, **kwargs: (
        sizes.append(len(hidden_states)) or forward(hidden_states, *args, **kwargs)
    )
    options = {"schedule": "interval", "interval": [200, 800]}
    sample(pipe, guidance_scale=3.0, guidance_options=options)
    assert sizes == [2, 4, 4, 4, 2]


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_schedulers_without_a_variance_step_with_the_latent_channels(pipe, kind):
    """Made from the config of the ancestral scheduler, they keep its `variance_type`."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    found = sample(pipe)
    assert found.shape == (2, 4, 4, 4) and found.isfinite().all()
    pipe.scheduler = kind.from_config({**pipe.scheduler.config, "variance_type": None})
    assert_close(sample(pipe), found, rtol=0, atol=0)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
def test_a_spacing_that_adds_noise_in_the_last_step_is_refused(pipe, spacing):
    offset = int(spacing == "leading")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing, steps_offset=offset)
    with pytest.raises(ValueError, match=f"'{spacing}' adds learned noise in the last step.*linspace"):
        sample(pipe)
    with pytest.raises(ValueError, match=f"`timestep_spacing` is '{spacing}'.*must be 'linspace'"):
        learned(timestep_spacing=spacing)


def test_timesteps_that_end_above_0_are_refused(pipe):
    assert sample(pipe, num_inference_steps=None, timesteps=[999, 500, 0]).isfinite().all()
    with pytest.raises(ValueError, match=r"`timesteps` is .*the last timestep must be 0"):
        sample(pipe, num_inference_steps=None, timesteps=[999, 500, 100])


def test_one_step_without_noise_is_refused(pipe):
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 1; .*'linspace'.*starts at timestep 0"):
        sample(pipe, num_inference_steps=1)


def test_a_learned_variance_needs_a_denoiser_that_predicts_it(class_pipeline):
    pipe = class_pipeline(learned())
    with pytest.raises(ValueError, match="'learned_range', but the denoiser has no channels for a variance"):
        sample(pipe)


def test_more_channels_than_the_latents_have_are_not_guided(pipe):
    with pytest.raises(ValueError, match=r"`guidance_options\.channels` is 5; it must be at most 4"):
        sample(pipe, guidance_options={"channels": 5})


@pytest.mark.parametrize(
    "prediction, asked, message",
    [
        ("epsilon", {"sampler": "euler"}, "`sampler` is 'euler'; for the prediction 'epsilon' it must be one of"),
        ("flow", {"sampler": "ddim"}, "`sampler` is 'ddim'; for a flow it must be one of euler, dpm_solver"),
        ("flow", {"timestep_spacing": "leading"}, "`timestep_spacing` is 'leading'; for a flow"),
    ],
)
def test_samplers_of_another_objective_are_refused(prediction, asked, message):
    with pytest.raises(ValueError, match=message):
        make_objective(prediction).sampling_scheduler(**asked)


@pytest.mark.parametrize("options", [None, {"channels": 3}])
def test_near_a_scale_of_0_or_a_control_scale_of_0_nothing_jumps(pipe, options):
    for name in ("guidance_scale", "control_guidance_scale"):
        at, near = (
            sample(pipe, guidance_options=options, **{"guidance_scale": 2.0, "flip": True} | {name: value})
            for value in (0.0, 1e-6)
        )
        assert_close(at, near, rtol=1e-3, atol=1e-2)


def test_options_are_stored_as_plain_values(class_pipeline, tmp_path):
    options = {"channels": np.int64(3), "schedule": "interval", "interval": np.array([100, 800])}
    pipe = type(class_pipeline())(**class_pipeline(learned(), out_channels=8).components, guidance_options=options)
    assert pipe.config.guidance_options == {"channels": 3, "schedule": "interval", "interval": [100.0, 800.0]}
    pipe.save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path).config.guidance_options == pipe.config.guidance_options


@pytest.mark.parametrize("options, message", [({"bad": 1}, "`guidance_options` is"), ({"channels": 9}, "at most 4")])
def test_options_that_do_not_exist_make_no_pipeline(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        type(pipe)(**pipe.components, guidance_options=options)


def test_steps_beyond_the_training_are_refused(class_pipeline):
    pipe = class_pipeline(make_objective("epsilon").sampling_scheduler("ddim", "leading"))
    with pytest.raises(ValueError, match=r"`num_inference_steps` is 1000; .*'leading'.* starts at timestep 1000"):
        sample(pipe, num_inference_steps=1000)


def test_a_variance_of_another_kind_is_refused(pipe):
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned")
    with pytest.raises(ValueError, match=r"its `variance_type` is 'learned'.*learned_range"):
        sample(pipe)


def test_the_advice_for_another_schedule_is_not_that_of_stable_diffusion(pipe):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.raises(ValueError, match=r"A DDIMScheduler fits with .*clip_sample=False"):
        sample(pipe)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm_solver"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_every_sampler_draws_from_the_model(class_pipeline, prediction, name):
    scheduler = make_objective(prediction, beta_schedule="cosine").sampling_scheduler(name)
    assert sample(class_pipeline(scheduler)).isfinite().all()


@pytest.mark.parametrize("name", ["euler", "dpm_solver"])
def test_every_sampler_of_a_flow_draws_from_the_model(class_pipeline, name):
    scheduler = make_objective("flow", shift=3.0).sampling_scheduler(name)
    assert sample(class_pipeline(scheduler)).isfinite().all()


def test_leading_steps_are_those_of_latent_diffusion():
    scheduler = make_objective("epsilon").sampling_scheduler("ddim", "leading")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert math.isclose(scheduler.final_alpha_cumprod, scheduler.alphas_cumprod[0])
