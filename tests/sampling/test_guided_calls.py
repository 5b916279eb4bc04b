"""Custom schedules, the scale of adapters in a call, and rescaled guidance."""

import copy
import logging

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)
from peft import LoraConfig

from improved_ldm.diffusion.schedules import flow_scheduler, variance_preserving_scheduler
from improved_ldm.lora import attention_projections
from improved_ldm.models.adapters import add_text_adapter
from improved_ldm.models.family import DENOISERS

BETAS = variance_preserving_scheduler("epsilon").config


def draw(pipe, **call):
    generator = torch.Generator().manual_seed(0)
    return pipe(**{"output_type": "latent", "generator": generator, **call}).images


def steps_of(pipe):
    seen = []
    pipe.denoiser.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    return seen


# schedules


@pytest.mark.parametrize(
    ("scheduler", "timesteps"),
    [
        (DDPMScheduler.from_config(BETAS), [900, 500, 20]),
        (DPMSolverMultistepScheduler.from_config(BETAS), torch.tensor([900, 500, 20])),
        (EulerDiscreteScheduler.from_config(BETAS), (900.0, 500.0, 20.0)),
        (flow_scheduler(1.0), [900.0, 500.5, 20.0]),
    ],
    ids=["ddpm", "dpm", "euler", "flow"],
)
@pytest.mark.parametrize("steps", [None, 3])
def test_timesteps_are_taken_as_they_are(class_pipeline, scheduler, timesteps, steps):
    pipe = class_pipeline(scheduler=scheduler)
    seen = steps_of(pipe)
    assert draw(pipe, class_labels=0, timesteps=timesteps, num_inference_steps=steps).isfinite().all()
    assert seen == [float(timestep) for timestep in timesteps] and pipe.num_timesteps == 3


@pytest.mark.parametrize(
    ("scheduler", "sigmas", "count"),
    [
        (flow_scheduler(1.0), [1.0, 0.5, 0.25], 3),
        (EulerDiscreteScheduler.from_config(BETAS), [14.0, 3, 1, 0], 3),
    ],
    ids=["flow", "euler"],
)
def test_sigmas_are_taken_where_the_scheduler_does(class_pipeline, scheduler, sigmas, count):
    pipe = class_pipeline(scheduler=scheduler)
    seen = steps_of(pipe)
    assert draw(pipe, class_labels=0, sigmas=sigmas, num_inference_steps=count).isfinite().all()
    assert len(seen) == pipe.num_timesteps == count


DDIM, DDPM = (scheduler.from_config(BETAS) for scheduler in (DDIMScheduler, DDPMScheduler))
BAD_SCHEDULES = [
    (DDIM, {"timesteps": [900, 500]}, "`timesteps` is given, but DDIMScheduler takes none"),
    (DDIM, {"sigmas": [1.0, 0.5]}, "`sigmas` is given, but DDIMScheduler takes none"),
    (DDPM, {"sigmas": [1.0, 0.5]}, "`sigmas` is given, but DDPMScheduler takes none"),
    (HeunDiscreteScheduler.from_config(BETAS), {"sigmas": [1.0]}, "`sigmas` is given, but HeunDiscreteScheduler"),
    (DDPM, {"timesteps": [900], "sigmas": [1.0]}, "`timesteps` and `sigmas` are both given"),
    (DDPM, {"timesteps": [500, 900]}, r"`timesteps` is \[500, 900\]; it must be a descending list"),
    (DDPM, {"timesteps": [500, 500]}, "`timesteps`"),
    (DDPM, {"timesteps": []}, r"`timesteps` is \[\]; it must be a list of at least one number"),
    (DDPM, {"timesteps": "900"}, "`timesteps` is '900'"),
    (DDPM, {"timesteps": 900}, "`timesteps` is 900"),
    (DDPM, {"timesteps": [900, -1]}, "`timesteps` is -1"),
    (DDPM, {"timesteps": [float("nan")]}, "`timesteps` is nan"),
    (DDPM, {"timesteps": [2000, 3]}, r"`timesteps` is \[2000, 3\]; DDPMScheduler refuses it"),
    (DDPM, {"timesteps": [900, 500], "num_inference_steps": 3}, "`num_inference_steps` is 3, but `timesteps` has 2"),
    (DDPM, {"num_inference_steps": 1001}, "`num_inference_steps` is 1001; DDPMScheduler refuses it"),
]


@pytest.mark.parametrize(("scheduler", "arguments", "message"), BAD_SCHEDULES, ids=range(len(BAD_SCHEDULES)))
def test_schedules_that_cannot_be_are_refused(class_pipeline, scheduler, arguments, message):
    pipe = class_pipeline(scheduler=scheduler)
    seen = steps_of(pipe)
    with pytest.raises(ValueError, match=message):
        draw(pipe, class_labels=0, **arguments)
    assert not seen


# adapters


@pytest.fixture(params=DENOISERS)
def adapted(request, text_pipeline, randomize):
    """A pipeline with an adapter of weight 0.7 on its denoiser, and a call of the pipeline."""
    pipe = text_pipeline(name=request.param, text_dim=96)
    projections = attention_projections(pipe.denoiser)
    pipe.denoiser.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=projections), "style")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in pipe.denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    pipe.set_adapters("style", 0.7)
    return pipe, {"prompt": "a coat", "num_inference_steps": 2}


@pytest.mark.parametrize("name", ["attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs"])
def test_a_scale_holds_for_one_call(adapted, name):
    pipe, call = adapted
    full = draw(pipe, **call)
    none, half = (draw(pipe, **call, **{name: {"scale": scale}}) for scale in (0, 0.5))
    assert torch.equal(draw(pipe, **call), full)  # bit for bit, even after a scale of 0
    assert torch.equal(draw(pipe, **call, **{name: {"scale": 1.0}}), full)
    pipe.set_adapters("style", 0.35)
    torch.testing.assert_close(draw(pipe, **call), half)
    pipe.disable_lora()
    torch.testing.assert_close(draw(pipe, **call), none)
    assert not torch.equal(none, full) and not torch.equal(half, full)


def test_a_scale_reaches_the_text_encoder(text_pipeline):
    pipe = text_pipeline()
    pipe.text_encoder = copy.deepcopy(pipe.text_encoder)
    call = {"prompt": "a coat", "num_inference_steps": 1}
    plain = draw(pipe, **call)
    add_text_adapter(pipe.text_encoder, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in pipe.text_encoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapted = draw(pipe, **call)
    assert not torch.equal(adapted, plain)
    torch.testing.assert_close(draw(pipe, **call, attention_kwargs={"scale": 0.0}), plain)
    assert torch.equal(draw(pipe, **call), adapted)
    half, full = (pipe.encode_prompt("a coat", lora_scale=scale)[0] for scale in (0.5, 1))
    assert not torch.equal(half, full)
    with pytest.raises(ValueError, match="`lora_scale` is '1'"):
        pipe.encode_prompt("a coat", lora_scale="1")


def test_a_scale_is_undone_after_an_error(adapted):
    pipe, call = adapted
    full = draw(pipe, **call)

    def fail(*args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, **call, attention_kwargs={"scale": 0.3}, callback_on_step_end=fail)
    assert torch.equal(draw(pipe, **call), full)


def test_scales_given_twice_or_without_an_adapter(text_pipeline, caplog):
    pipe, scale = text_pipeline(), {"scale": 0.5}
    with pytest.raises(ValueError, match="`attention_kwargs` and `cross_attention_kwargs` are names of one argument"):
        draw(pipe, prompt="a coat", attention_kwargs=scale, cross_attention_kwargs=scale)
    with caplog.at_level(logging.WARNING):
        draw(pipe, prompt="a coat", attention_kwargs=scale)
    assert caplog.messages == ["`attention_kwargs` has the scale 0.5, but no adapter is loaded."]


# rescaled guidance


def test_rescaled_guidance_has_the_deviation_of_the_conditional_prediction(class_pipeline):
    pipe = class_pipeline()
    call = {"class_labels": [0, 1], "num_inference_steps": 1}
    plain, guided, half, rescaled = (
        draw(pipe, **call, guidance_scale=scale, guidance_rescale=phi)
        for scale, phi in ((1.0, 0.0), (8.0, 0.0), (8.0, 0.5), (8.0, 1.0))
    )
    assert torch.equal(plain, draw(pipe, **call, guidance_scale=1.0, guidance_rescale=1.0))
    torch.testing.assert_close(half, (guided + rescaled) / 2)  # one step is linear in the prediction
    assert not torch.equal(guided, rescaled)
    assert draw(pipe, **call, control_guidance_scale=2.0, guidance_rescale=0.7).isfinite().all()


# the denoiser on its own


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize(
    "labels",
    [True, 1, [0, 1], torch.tensor(1), torch.zeros(2), torch.zeros(2, 1).long(), torch.ones(2).bool()],
)
def test_class_labels_of_another_type_are_refused_by_the_denoiser(tiny_denoiser, name, labels):
    denoiser, latents, timestep = tiny_denoiser(name, num_classes=3), torch.zeros(2, 4, 4, 4), torch.tensor(1)
    with pytest.raises(ValueError, match="`class_labels` is "):
        denoiser(latents, timestep, class_labels=labels)
    assert (
        denoiser(torch.zeros(2, 4, 4, 4), torch.tensor(1), class_labels=torch.tensor([0, 3])).sample.isfinite().all()
    )
