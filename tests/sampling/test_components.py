"""Pipelines with given components: passed to a loader, taken from another pipeline, replaced or left out."""

import logging

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PixArtTransformer2DModel,
)
from torch.testing import assert_close

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.diffusion.schedules import flow_scheduler
from improved_ldm.models.family import DENOISERS
from improved_ldm.transfer.resolution import transfer

LOADERS = [DiffusionPipeline, ImprovedLDMPipeline]
SETTINGS = {
    "text_padding": "replicate",
    "text_noise_scale": 0.3,
    "max_text_tokens": 12,
    "default_original_size": 64,
    "default_guidance_scale": 3.5,
    "default_num_inference_steps": 3,
    "class_names": ["a", "b"],
    "lineage": [{"step": 1}],
}


def sample(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": ["a red coat", ""], "output_type": "latent"} | call
    return pipe(generator=torch.Generator().manual_seed(0), **call).images


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def pipe(text_pipeline):
    pipe = text_pipeline()
    pipe.register_to_config(**SETTINGS)
    return pipe


@pytest.fixture
def folder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_passed_denoiser_is_the_one_that_draws(
    text_pipeline, tiny_denoiser, tmp_path, caplog, loader, name, conditioning
):
    config = dict.fromkeys(DENOISERS[name].text_arguments(conditioning), 96) | {"conditioning": conditioning}
    text_pipeline(name=name, **config).save_pretrained(tmp_path)
    mine, component = tiny_denoiser(name, **config), DENOISERS[name].component
    for parameter in mine.parameters():
        parameter.data.mul_(0.5)
    with caplog.at_level(logging.WARNING, "diffusers"):
        loaded = loader.from_pretrained(tmp_path, **{component: mine})
    assert loaded.denoiser is mine and not caplog.records
    exactly(sample(loaded), sample(text_pipeline(name=name, **config).from_pipe(loaded)))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["transformer", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_every_component_can_be_passed(pipe, folder, loader, name):
    mine = getattr(pipe, name)
    loaded = loader.from_pretrained(folder, **{name: mine})
    assert getattr(loaded, name) is mine
    exactly(sample(loaded), sample(pipe))


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["transformer", "text_encoder", "tokenizer"])
def test_a_component_that_is_passed_as_none_is_left_out(folder, loader, name):
    loaded = loader.from_pretrained(folder, **{name: None})
    assert getattr(loaded, name) is None
    with pytest.raises(ValueError, match=f"`{name}`"):
        sample(loaded)


@pytest.mark.parametrize("loader", LOADERS)
def test_all_components_can_be_passed(pipe, folder, loader):
    loaded = loader.from_pretrained(folder, **pipe.components)
    assert loaded.components == pipe.components
    exactly(sample(loaded), sample(pipe))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_unet_takes_the_place_of_a_transformer(folder, tiny_denoiser, loader):
    unet = tiny_denoiser("unet", text_dim=96)
    loaded = loader.from_pretrained(folder, transformer=None, unet=unet)
    assert loaded.denoiser is unet and loaded.transformer is None
    with pytest.raises(ValueError, match="`transformer` and `unet` are both given"):
        loader.from_pretrained(folder, unet=unet)


@pytest.mark.parametrize("loader", LOADERS)
def test_without_a_vae_there_is_no_pipeline(folder, loader):
    with pytest.raises(ValueError, match="`vae` is None"):
        loader.from_pretrained(folder, vae=None)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_denoiser_of_another_family_is_refused(folder, loader):
    other = PixArtTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, cross_attention_dim=8
    )
    with pytest.raises(TypeError, match="`transformer` is a PixArtTransformer2DModel"):
        loader.from_pretrained(folder, transformer=other)
    with pytest.raises(TypeError, match="`transformer` is a int"):
        loader.from_pretrained(folder, transformer=3)


def test_the_settings_go_with_the_components(pipe):
    second = ImprovedLDMPipeline(**pipe.components)
    assert {name: second.config[name] for name in SETTINGS} == SETTINGS
    exactly(sample(second), sample(pipe))


def test_settings_that_are_given_replace_those_of_the_components(pipe):
    second = ImprovedLDMPipeline(**pipe.components, default_original_size=None, max_text_tokens=16)
    assert second.config.default_original_size is None and second.config.max_text_tokens == 16
    assert second.config.default_guidance_scale == 3.5


def test_more_tokens_than_the_text_encoder_has_positions_are_refused(pipe):
    positions = pipe.text_encoder.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"`max_text_tokens` is {positions + 1}"):
        ImprovedLDMPipeline(**pipe.components, max_text_tokens=positions + 1)


def test_a_fresh_denoiser_has_the_defaults(autoencoder, tiny_denoiser):
    pipe = ImprovedLDMPipeline(autoencoder, flow_scheduler(1.0), tiny_denoiser(num_classes=3))
    assert pipe.config.default_guidance_scale == 5.0 and pipe.config.max_text_tokens == 77


@pytest.mark.parametrize("maker", [ImprovedLDMPipeline, AutoPipelineForText2Image])
def test_from_pipe_draws_the_same_pictures_and_copies_nothing(pipe, maker):
    second = maker.from_pipe(pipe)
    assert type(second) is ImprovedLDMPipeline and second.components == pipe.components
    assert {name: second.config[name] for name in SETTINGS} == SETTINGS
    exactly(sample(second), sample(pipe))


def test_from_pipe_leaves_the_dtype_alone(pipe):
    pipe.to(torch.bfloat16)
    assert ImprovedLDMPipeline.from_pipe(pipe).transformer.dtype == torch.bfloat16
    second = ImprovedLDMPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    assert second.transformer.dtype == second.vae.dtype == torch.float32


def test_from_pipe_goes_both_ways_between_classes(pipe, folder):
    class Mine(ImprovedLDMPipeline):
        pass

    there = Mine.from_pipe(pipe)
    back = ImprovedLDMPipeline.from_pipe(there)
    exactly(sample(back), sample(pipe))


def test_from_pipe_replaces_what_is_given(pipe, tiny_denoiser):
    unet = tiny_denoiser("unet", text_dim=96)
    second = ImprovedLDMPipeline.from_pipe(pipe, unet=unet, default_guidance_scale=1.0)
    assert second.denoiser is unet and second.transformer is None and pipe.unet is None
    assert second.config.default_guidance_scale == 1.0 and second.config.max_text_tokens == 12
    with pytest.raises(TypeError, match="`from_pipe` has safety_checker"):
        ImprovedLDMPipeline.from_pipe(pipe, safety_checker=None)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_scheduler_that_does_not_fit_is_refused_before_the_first_step(pipe, folder, loader):
    steps = []
    call = {"callback_on_step_end": lambda pipe, step, *_: steps.append(step) or {}}
    loaded = loader.from_pretrained(folder, scheduler=DDPMScheduler())
    with pytest.raises(ValueError, match=r"`scheduler` is a DDPMScheduler.*fits with beta_start=0\.00085"):
        sample(loaded, **call)
    loaded.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    assert sample(loaded).isfinite().all()
    loaded.scheduler = None
    with pytest.raises(ValueError, match="`scheduler` is None"):
        sample(loaded, **call)
    assert not steps


def test_a_scheduler_that_is_replaced_in_the_components_is_checked(pipe):
    second = ImprovedLDMPipeline(**{**pipe.components, "scheduler": EulerDiscreteScheduler()})
    with pytest.raises(ValueError, match="`scheduler` is a EulerDiscreteScheduler"):
        sample(second)


def test_the_objective_is_saved_and_survives_another_scheduler(pipe, folder):
    loaded = DiffusionPipeline.from_pretrained(folder, scheduler=DDPMScheduler())
    loaded.save_pretrained(folder / "again")
    with pytest.raises(ValueError, match="does not fit"):
        sample(DiffusionPipeline.from_pretrained(folder / "again"))


def test_a_transferred_pipeline_draws(pipe):
    assert sample(transfer(pipe, 16)).isfinite().all()


def test_nothing_is_saved_as_a_pickle(pipe, tmp_path):
    for model in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="`safe_serialization` is False"):
            model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    assert not (tmp_path / "pickled").exists()
    pipe.save_pretrained(tmp_path / "fp16", variant="fp16")
    assert (tmp_path / "fp16" / "transformer" / "diffusion_pytorch_model.fp16.safetensors").exists()
    exactly(sample(DiffusionPipeline.from_pretrained(tmp_path / "fp16", variant="fp16")), sample(pipe))


@pytest.mark.parametrize("file", ["pytorch_lora_weights.safetensors", "adapter_config.json"])
def test_the_folder_of_an_adapter_is_no_pipeline(tmp_path, file):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match="`load_lora_weights`"):
        ImprovedLDMPipeline.from_pretrained(tmp_path)


def test_what_is_saved_does_not_say_where_it_was_loaded_from(folder, tmp_path):
    loaded = DiffusionPipeline.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again", variant="fp16")
    texts = [file.read_text(encoding="utf-8") for file in (tmp_path / "again").rglob("*.json")]
    assert len(texts) > 5 and not any(str(tmp_path) in text or "name_or_path" in text for text in texts)
    exactly(sample(DiffusionPipeline.from_pretrained(tmp_path / "again", variant="fp16")), sample(loaded))


def test_what_is_put_into_a_pipeline_is_checked_when_it_draws(pipe, tiny_denoiser):
    for name, value, error in (
        ("unet", tiny_denoiser("unet", text_dim=96), "`transformer` and `unet` are both given"),
        ("vae", None, "`vae` is None"),
        ("transformer", torch.nn.Linear(2, 2), "`transformer` is a Linear"),
        ("scheduler", DDPMScheduler, "`scheduler` is "),
    ):
        second = ImprovedLDMPipeline.from_pipe(pipe)
        setattr(second, name, value)
        with pytest.raises((ValueError, TypeError), match=error):
            sample(second)


def test_a_denoiser_is_not_drawn_by_an_objective_that_it_was_not_trained_for(folder, autoencoder, tiny_denoiser):
    other = ImprovedLDMPipeline(autoencoder, flow_scheduler(1.0), tiny_denoiser(text_dim=96))
    with pytest.raises(ValueError, match="`objective` has the prediction 'epsilon', but the denoiser was trained for"):
        DiffusionPipeline.from_pretrained(folder, transformer=other.transformer)


@pytest.mark.parametrize("schedule", [{"num_inference_steps": 1001}, {"timesteps": [2000, 10]}])
def test_no_step_is_beyond_the_training(pipe, schedule):
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"`{next(iter(schedule))}` is .*trained up to 1000"):
        sample(pipe, **schedule)


def test_no_noise_level_of_a_flow_is_above_1(class_pipeline):
    pipe = class_pipeline(flow_scheduler(1.0))
    with pytest.raises(ValueError, match=r"`sigmas` is .*trained up to 1\."):
        sample(pipe, prompt=None, class_labels=0, sigmas=[5, 1, 0.5])
