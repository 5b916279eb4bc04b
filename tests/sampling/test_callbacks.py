"""Callbacks at the end of a step and the properties of a call, as documented by diffusers."""

import pytest
import torch
from diffusers.callbacks import (
    MultiPipelineCallbacks,
    SD3CFGCutoffCallback,
    SDCFGCutoffCallback,
    SDXLCFGCutoffCallback,
)

from improved_ldm.models.family import DENOISERS
from improved_ldm.sampling.callbacks import CALLBACK_TENSORS

STEPS = 4
MODES = ("disentangled", "published")
CUTOFFS = (SDCFGCutoffCallback, SDXLCFGCutoffCallback, SD3CFGCutoffCallback)


def draw(pipe, callback=None, **call):
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent", **call}
    return pipe(**call, generator=generator, callback_on_step_end=callback).images


def evaluations(pipe):
    rows = []
    pipe.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    return rows


@pytest.fixture(params=[(name, mode, kind) for name in DENOISERS for mode in MODES for kind in ("class", "text")])
def pipe_and_call(request, class_pipeline, text_pipeline):
    """Every backbone in both modes, with classes and with prompts, and a call that samples two images."""
    name, conditioning, kind = request.param
    if kind == "class":
        return class_pipeline(name=name, conditioning=conditioning), {"class_labels": [0, 1]}
    dims = dict.fromkeys(DENOISERS[name].text_arguments(conditioning), 96)
    return text_pipeline(name=name, conditioning=conditioning, **dims), {"prompt": ["a coat", "a bag"]}


@pytest.mark.parametrize("cutoff", CUTOFFS)
def test_the_official_cutoffs_switch_guidance_off(pipe_and_call, cutoff):
    pipe, call = pipe_and_call
    rows = evaluations(pipe)
    cut = draw(pipe, cutoff(cutoff_step_ratio=0.25), **call)
    assert rows == [4, 4, 2, 2]
    assert pipe.guidance_scale == 0 and not pipe.do_classifier_free_guidance

    def by_hand(pipeline, step, timestep, tensors):
        if step == 1:
            pipeline._guidance_scale = 1.0

    assert torch.equal(cut, draw(pipe, by_hand, **call))
    assert not torch.equal(cut, draw(pipe, **call))


def test_the_documented_cutoff_by_chunks(text_pipeline):
    pipe = text_pipeline()
    rows = evaluations(pipe)

    def disable(pipeline, step, timestep, tensors):
        if step == int(pipeline.num_timesteps * 0.5):
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipeline._guidance_scale = 0.0
        return tensors

    names = ["prompt_embeds"]
    draw(pipe, disable, prompt=["a coat", "a bag"], callback_on_step_end_tensor_inputs=names)
    assert rows == [4, 4, 4, 2]


def test_several_official_callbacks_run_together(text_pipeline):
    pipe = text_pipeline()
    rows = evaluations(pipe)
    draw(pipe, MultiPipelineCallbacks([SD3CFGCutoffCallback(0.25), SDCFGCutoffCallback(None, 2)]), prompt="a coat")
    assert rows == [2, 2, 1, 1]


def test_guidance_follows_what_a_callback_sets(text_pipeline):
    pipe = text_pipeline()
    rows = evaluations(pipe)

    def raised(pipeline, step, timestep, tensors):
        pipeline._guidance_scale += 1.0
        return tensors

    draw(pipe, raised, prompt="a coat", guidance_scale=1.0)
    assert rows == [1, 2, 2, 2]
    assert pipe.guidance_scale == 1.0 + pipe.num_timesteps

    def spoil(pipeline, step, timestep, tensors):
        pipeline._guidance_scale = "3"

    with pytest.raises(ValueError, match="`guidance_scale` is '3'"):
        draw(pipe, spoil, prompt="a coat")


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_every_named_tensor_is_given_and_may_come_back(pipe_and_call, guidance_scale):
    pipe, call = pipe_and_call
    seen = []

    def watch(pipeline, step, timestep, tensors):
        assert list(tensors) == pipeline._callback_tensor_inputs == list(CALLBACK_TENSORS)
        seen.append({name: len(value) for name, value in tensors.items()})
        return {name: value.clone() for name, value in tensors.items()}

    call |= {"guidance_scale": guidance_scale}
    images = draw(pipe, watch, callback_on_step_end_tensor_inputs=CALLBACK_TENSORS, **call)
    assert torch.equal(images, draw(pipe, **call))
    assert len(seen) == STEPS and all(rows["latents"] == 2 for rows in seen)


@pytest.mark.parametrize("way", ["returned", "in place", "half"])
def test_changed_prompts_are_drawn_from_then_on(text_pipeline, way):
    pipe = text_pipeline(text_padding="replicate")
    other = pipe.encode_prompt("a red boot")[0]

    def change(pipeline, step, timestep, tensors):
        if way == "in place":
            tensors["prompt_embeds"][1:] = other
            return None
        embeds = tensors["prompt_embeds"]
        return {"prompt_embeds": other if way == "half" else torch.cat([embeds[:1], other])}

    names = ["prompt_embeds"]
    changed = draw(pipe, change, prompt="a coat", callback_on_step_end_tensor_inputs=names)
    assert not torch.equal(changed, draw(pipe, prompt="a coat"))
    first = draw(pipe, prompt="a coat", num_inference_steps=1)
    assert torch.equal(
        draw(pipe, change, prompt="a coat", num_inference_steps=1, callback_on_step_end_tensor_inputs=names), first
    )


@pytest.mark.parametrize("name", CALLBACK_TENSORS)
@pytest.mark.parametrize("value", [3, None, torch.zeros(7, 1)])
def test_returned_tensors_of_other_shapes_are_refused(text_pipeline, name, value):
    pipe = text_pipeline(name="unet", conditioning="published", text_dim=96, pooled_dim=96)
    with pytest.raises(ValueError, match=f"`{name}`, as `callback_on_step_end` returned it"):
        draw(pipe, lambda *args: {name: value}, prompt="a coat")


def test_an_interrupted_call_skips_the_steps_that_are_left(text_pipeline):
    pipe, steps = text_pipeline(), []
    rows = evaluations(pipe)

    def stop(pipeline, step, timestep, tensors):
        steps.append(step)
        pipeline._interrupt = step == 1
        return tensors

    stopped = draw(pipe, stop, prompt="a coat")
    assert steps == [0, 1] and len(rows) == 2 and pipe.interrupt and stopped.isfinite().all()
    assert torch.equal(draw(pipe, prompt="a coat"), draw(text_pipeline(), prompt="a coat"))
    assert not pipe.interrupt


def test_properties_tell_of_the_call(class_pipeline):
    pipe, seen = class_pipeline(), []
    assert (pipe.guidance_scale, pipe.num_timesteps, pipe.current_timestep, pipe.interrupt) == (None, 0, None, False)
    assert not pipe.do_classifier_free_guidance

    def watch(pipeline, step, timestep, tensors):
        seen.append(int(pipeline.current_timestep) == int(timestep))
        assert pipeline.num_timesteps == STEPS and pipeline.do_classifier_free_guidance
        assert (pipeline.guidance_scale, pipeline.guidance_rescale) == (3.0, 0.5)

    draw(pipe, watch, class_labels=0, guidance_rescale=0.5)
    assert seen == [True] * STEPS and pipe.current_timestep is None
