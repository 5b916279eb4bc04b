import copy

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch.testing import assert_close

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.autoencoder import decode_latents, encode_images, spatial_factor
from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.diffusion.schedules import flow_scheduler, variance_preserving_scheduler
from improved_ldm.models.family import DENOISERS
from improved_ldm.pipeline import NonFiniteLatentsError

BETAS = variance_preserving_scheduler("epsilon").config
LATENT = {"output_type": "latent", "num_inference_steps": 2}


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(generators) > 1 else generators[0]


def sample(pipe, *args, seeds=(0,), **kwargs):
    return pipe(*args, generator=seeded(*seeds), **{**LATENT, **kwargs}).images


def differ(first, second):
    return (first - second).abs().max() > 1e-4


def exactly(first, second):
    assert_close(first, second, rtol=0, atol=0)


@pytest.fixture
def evaluations():
    """Counts the evaluations of a pipeline's denoiser and the rows of each."""

    def watch(pipe):
        rows = []
        pipe.denoiser.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        return rows

    return watch


@pytest.fixture(params=["class", "text"])
def pipe_and_call(request, class_pipeline, text_pipeline):
    """A pipeline, and the arguments of a call that samples three images."""
    if request.param == "class":
        return class_pipeline(), {"class_labels": [0, 1, 2]}
    return text_pipeline(), {"prompt": ["a red coat", "a blue bag", ""]}


# outputs


MODES = ("disentangled", "published")


@pytest.fixture
def prompt_pipeline(text_pipeline):
    """A text pipeline whose denoiser reads the outputs of CLIP's text encoder that its mode uses."""

    def build(name, conditioning="disentangled", **config):
        dims = dict.fromkeys(DENOISERS[name].text_arguments(conditioning), 96)
        return text_pipeline(name=name, conditioning=conditioning, **dims, **config)

    return build


@pytest.mark.parametrize("name", DENOISERS)
def test_one_prompt_or_class_gives_one_image(class_pipeline, text_pipeline, name):
    for image in (
        class_pipeline(name=name)(class_labels=1).images,
        text_pipeline(name=name, text_dim=96)("a red coat").images,
    ):
        assert len(image) == 1 and isinstance(image[0], Image.Image) and image[0].size == (8, 8)


def test_output_types(pipe_and_call):
    pipe, call = pipe_and_call
    pil, array, tensor, latents = (
        pipe(**call, generator=seeded(0), output_type=kind).images for kind in ("pil", "np", "pt", "latent")
    )
    assert [image.size for image in pil] == [(8, 8)] * 3
    assert isinstance(array, np.ndarray) and array.shape == (3, 8, 8, 3)
    assert tensor.shape == (3, 3, 8, 8) and latents.shape == (3, 4, 4, 4)
    assert array.min() >= 0 and array.max() <= 1 and tensor.isfinite().all()
    assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    assert_close(((decode_latents(pipe.vae, latents) + 1) / 2).clamp(0, 1), tensor)
    assert np.array_equal((array * 255).round().astype(np.uint8), np.stack(pil))


def test_a_tuple_is_returned_on_request(class_pipeline):
    pipe = class_pipeline()
    (images,) = pipe(class_labels=1, generator=seeded(0), return_dict=False, **LATENT)
    exactly(images, sample(pipe, class_labels=1))


@pytest.mark.parametrize(("height", "width"), [(8, 16), (12, 4), (None, 12)])
def test_sizes_other_than_the_trained_one(class_pipeline, height, width):
    images = class_pipeline()(class_labels=0, height=height, width=width, output_type="pt").images
    assert images.shape == (1, 3, height or 8, width)


def test_labels_may_be_a_tensor(class_pipeline):
    pipe = class_pipeline()
    expected = sample(pipe, class_labels=[2, 0])
    exactly(sample(pipe, class_labels=torch.tensor([2, 0])), expected)
    exactly(sample(pipe, class_labels=torch.tensor(2)), sample(pipe, class_labels=2))


def test_semantics_change_the_image(class_pipeline, text_pipeline):
    pipe = class_pipeline()
    assert differ(sample(pipe, class_labels=0), sample(pipe, class_labels=1))
    pipe = text_pipeline()
    assert differ(sample(pipe, "a red coat"), sample(pipe, "a blue bag"))


# randomness and batches


def test_the_same_seed_gives_the_same_image(pipe_and_call):
    pipe, call = pipe_and_call
    exactly(sample(pipe, **call), sample(pipe, **call))
    assert differ(sample(pipe, **call), sample(pipe, **call, seeds=(1,)))


@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.0, 1.0), (3.0, 2.0)])
def test_an_image_does_not_depend_on_its_batch(pipe_and_call, scales):
    pipe, call = pipe_and_call
    scales = {"guidance_scale": scales[0], "control_guidance_scale": scales[1]}
    batch = sample(pipe, **call, **scales, seeds=(0, 1, 2))
    for index in range(3):
        alone = {name: values[index] for name, values in call.items()}
        assert_close(sample(pipe, **alone, **scales, seeds=(index,))[0], batch[index], rtol=0, atol=1e-4)


def test_images_are_ordered_by_prompt_then_by_image(pipe_and_call):
    pipe, call = pipe_and_call
    doubled = {name: [value for value in values for _ in range(2)] for name, values in call.items()}
    seeds = tuple(range(6))
    grouped = sample(pipe, **call, num_images_per_prompt=2, seeds=seeds)
    assert grouped.shape == (6, 4, 4, 4)
    exactly(grouped, sample(pipe, **doubled, seeds=seeds))


def test_controls_follow_their_prompt(class_pipeline):
    pipe = class_pipeline()
    flips = sample(pipe, class_labels=[0, 1], flip=[True, False], num_images_per_prompt=2, seeds=(0, 1, 2, 3))
    plain = sample(pipe, class_labels=[0, 1], num_images_per_prompt=2, seeds=(0, 1, 2, 3))
    assert differ(flips[:2], plain[:2])
    assert_close(flips[2:], plain[2:])


def test_given_latents_are_the_start(class_pipeline):
    pipe = class_pipeline()
    noise = torch.randn(1, 4, 4, 4, generator=seeded(0))
    exactly(sample(pipe, class_labels=0, latents=noise, seeds=(7,)), sample(pipe, class_labels=0))


def test_the_callback_sees_and_changes_the_latents(class_pipeline):
    pipe, seen = class_pipeline(), []

    def watch(pipeline, step, timestep, tensors):
        assert pipeline is pipe
        seen.append((step, int(timestep), tensors["latents"].clone()))

    def replace(pipeline, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], step)}

    latents = sample(pipe, class_labels=0, callback_on_step_end=watch)
    assert [entry[:2] for entry in seen] == [(0, 999), (1, 499)]
    exactly(seen[-1][2], latents)
    exactly(sample(pipe, class_labels=0, callback_on_step_end=replace), torch.ones(1, 4, 4, 4))


# guidance


@pytest.mark.parametrize(("scales", "terms"), [((1, 1), 1), ((4, 1), 2), ((1, 2), 2), ((4, 2), 3)])
def test_a_step_is_one_evaluation_of_all_guidance_terms(class_pipeline, evaluations, scales, terms):
    pipe = class_pipeline()
    rows = evaluations(pipe)
    sample(pipe, class_labels=[0, 1], guidance_scale=scales[0], control_guidance_scale=scales[1])
    assert rows == [2 * terms] * 2


@torch.no_grad()
def by_hand(pipe, labels, predict, steps=3):
    """The sampling loop with a prediction function of the caller."""
    latents = torch.randn(len(labels), 4, 4, 4, generator=seeded(0))
    control = control_tensor([Control.of_whole_image((8, 8), (8, 8))] * len(labels))
    pipe.scheduler.set_timesteps(steps)
    for timestep in pipe.scheduler.timesteps:
        prediction = predict(latents, timestep, labels, control)
        latents = pipe.scheduler.step(prediction, timestep, latents).prev_sample
    return latents


def test_unit_scales_are_the_plain_conditional_sample_bit_for_bit(class_pipeline):
    pipe = class_pipeline()

    def plain(latents, timestep, labels, control):
        return pipe.denoiser(latents, timestep, class_labels=labels, control=control).sample

    expected = by_hand(pipe, torch.tensor([2, 0]), plain)
    images = sample(pipe, class_labels=[2, 0], guidance_scale=1.0, control_guidance_scale=1.0, num_inference_steps=3)
    exactly(images, expected)


def test_two_scales_follow_the_guidance_rule(class_pipeline):
    pipe = class_pipeline()

    def guided(latents, timestep, labels, control):
        def predict(**conditions):
            return pipe.denoiser(latents, timestep, **conditions).sample

        conditional = 2 * predict(class_labels=labels, control=control) - predict(class_labels=labels)
        return 3 * conditional - 2 * predict()

    expected = by_hand(pipe, torch.tensor([2, 0]), guided)
    images = sample(pipe, class_labels=[2, 0], guidance_scale=3.0, control_guidance_scale=2.0, num_inference_steps=3)
    assert_close(images, expected, rtol=1e-4, atol=1e-4)


def test_defaults_of_the_pipeline_are_used(class_pipeline, evaluations):
    pipe = class_pipeline()
    default = pipe(class_labels=0, generator=seeded(0), output_type="latent").images
    exactly(default, sample(pipe, class_labels=0, guidance_scale=2.0, num_inference_steps=2))
    pipe.register_to_config(default_num_inference_steps=4, default_guidance_scale=1.0)
    rows = evaluations(pipe)
    pipe(class_labels=0, output_type="latent")
    assert rows == [1] * 4


def test_a_negative_prompt_takes_the_place_of_the_null(text_pipeline):
    pipe = text_pipeline(text_padding="replicate")
    null = sample(pipe, "a red coat")
    negative = sample(pipe, "a red coat", negative_prompt="a blue bag")
    assert differ(negative, null)
    assert_close(sample(pipe, ["a red coat"], negative_prompt=["a blue bag"]), negative)
    same = sample(pipe, "a red coat", negative_prompt="a red coat", guidance_scale=7.0, control_guidance_scale=0.0)
    unguided = sample(pipe, "a red coat", guidance_scale=1.0, control_guidance_scale=0.0)
    assert_close(same, unguided, rtol=1e-3, atol=1e-3)


# control


@pytest.mark.parametrize(
    "control",
    [
        {"flip": True},
        {"original_size": (64, 64)},
        {"original_size": (16, 16), "crops_coords_top_left": (4, 0), "crop_size": (8, 8)},
        {"target_size": (8, 16)},
    ],
)
def test_control_changes_the_image(class_pipeline, control):
    pipe = class_pipeline()
    assert differ(sample(pipe, class_labels=0, **control), sample(pipe, class_labels=0))


def test_default_control_is_the_whole_image_at_its_size(class_pipeline):
    pipe = class_pipeline()
    explicit = {
        "original_size": (8, 16),
        "crops_coords_top_left": (0, 0),
        "crop_size": (8, 16),
        "target_size": (8, 16),
        "flip": False,
    }
    exactly(
        sample(pipe, class_labels=0, width=16),
        sample(pipe, class_labels=0, width=16, **explicit),
    )


def test_default_original_size_keeps_the_aspect_ratio(class_pipeline):
    pipe = class_pipeline()
    pipe.register_to_config(default_original_size=32)
    (control,) = pipe.make_controls(1, 8, 16)
    assert control == Control.of_whole_image((32, 64), (8, 16))


def test_a_crop_reaches_to_the_lower_right_by_default(class_pipeline):
    (control,) = class_pipeline().make_controls(1, 8, 8, original_size=(20, 30), crops_coords_top_left=(4, 6))
    assert control.crop_size == (16, 24)


def test_control_lists_have_one_value_a_prompt(class_pipeline):
    pipe = class_pipeline()
    lists = {"original_size": [(8, 8), (64, 64)], "flip": [False, True], "crops_coords_top_left": [(0, 0), (4, 4)]}
    batch = sample(pipe, class_labels=[0, 1], seeds=(0, 1), **lists)
    for index in range(2):
        one = {name: values[index] for name, values in lists.items()}
        alone = sample(pipe, class_labels=index, seeds=(index,), **one)
        assert_close(alone[0], batch[index], rtol=0, atol=1e-4)


PUBLISHED_WITHOUT_SIZES = {name: {} for name in DENOISERS} | {"unet": {"published": {"size_features": 0}}}
PUBLISHED_WITH_SIZES = {"unet": {}, "pixart": {"published": {"size_conditions": True}, "hidden_size": 48}}


@pytest.mark.parametrize("name", PUBLISHED_WITHOUT_SIZES)
def test_published_models_without_sizes_take_no_control(class_pipeline, name):
    pipe = class_pipeline(name=name, conditioning="published", **PUBLISHED_WITHOUT_SIZES[name])
    assert not pipe.denoiser.control_inputs
    assert sample(pipe, class_labels=0).isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED_WITH_SIZES)
def test_published_models_with_sizes_take_them_as_control(class_pipeline, name):
    pipe = class_pipeline(name=name, conditioning="published", **PUBLISHED_WITH_SIZES[name])
    assert pipe.denoiser.control_inputs
    plain = sample(pipe, class_labels=0)
    assert plain.isfinite().all()
    assert differ(sample(pipe, class_labels=0, target_size=(16, 8)), plain)


# components


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: DDIMScheduler.from_config(BETAS),
        lambda: DDPMScheduler.from_config(BETAS),
        lambda: DPMSolverMultistepScheduler.from_config(BETAS),
        lambda: UniPCMultistepScheduler.from_config(BETAS),
        lambda: EulerDiscreteScheduler.from_config(BETAS),
        lambda: EulerAncestralDiscreteScheduler.from_config(BETAS),
        lambda: HeunDiscreteScheduler.from_config(BETAS),
        lambda: flow_scheduler(3.0),
        lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ],
    ids=["ddim", "ddpm", "dpm", "unipc", "euler", "ancestral", "heun", "flow", "dynamic"],
)
def test_schedulers_of_diffusers_run_and_keep_to_the_seed(class_pipeline, scheduler):
    pipe = class_pipeline(scheduler=scheduler())
    images = sample(pipe, class_labels=[0, 1], seeds=(0, 1), num_inference_steps=4)
    assert images.shape == (2, 4, 4, 4) and images.isfinite().all()
    exactly(images, sample(pipe, class_labels=[0, 1], seeds=(0, 1), num_inference_steps=4))
    assert_close(images[1:], sample(pipe, class_labels=1, seeds=(1,), num_inference_steps=4), rtol=1e-4, atol=1e-3)


def test_every_text_padding_runs(text_pipeline):
    images = [
        sample(text_pipeline(text_padding=padding), ["a red coat", ""])
        for padding in ("zero", "mask", "replicate", "noisy_replicate")
    ]
    for index, image in enumerate(images):
        assert image.isfinite().all()
        assert all(differ(image, other) for other in images[:index])


@pytest.mark.parametrize("encoder", ["t5_text", "bert_text"])
@pytest.mark.parametrize("name", DENOISERS)
def test_other_text_encoders(request, text_pipeline, encoder, name):
    pipe = text_pipeline(request.getfixturevalue(encoder), max_text_tokens=9, name=name, text_dim=24)
    images = sample(pipe, ["a red coat", ""], negative_prompt="the bag")
    assert images.shape == (2, 4, 4, 4) and images.isfinite().all()


@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("name", DENOISERS)
def test_every_backbone_follows_prompts_through_the_same_calls(prompt_pipeline, evaluations, name, conditioning):
    pipe = prompt_pipeline(name, conditioning)
    rows = evaluations(pipe)
    call = {"negative_prompt": "the bag", "guidance_scale": 3.0, "height": 12, "num_images_per_prompt": 2}
    red, _, blue, _ = sample(pipe, ["a red coat", "a blue bag"], seeds=(0, 1, 0, 1), **call)
    assert red.shape == (4, 6, 4) and red.isfinite().all()
    assert differ(red, blue)
    assert rows == [8, 8]


@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("name", DENOISERS)
def test_every_backbone_follows_classes_through_the_same_calls(class_pipeline, evaluations, name, conditioning):
    pipe = class_pipeline(name=name, conditioning=conditioning)
    rows = evaluations(pipe)
    images = sample(pipe, class_labels=[0, 1, 0], seeds=(0, 0, 1), width=16, guidance_scale=1.0)
    assert images.shape == (3, 4, 4, 8) and images.isfinite().all()
    assert differ(images[0], images[1]) and differ(images[0], images[2])
    assert rows == [3, 3]


@pytest.mark.parametrize("name", DENOISERS)
def test_every_backbone_takes_control_guidance(class_pipeline, evaluations, name):
    pipe = class_pipeline(name=name)
    rows = evaluations(pipe)
    one, two = (
        sample(pipe, class_labels=[0], guidance_scale=2.0, control_guidance_scale=1.5, flip=flip, seeds=(0,))
        for flip in (False, True)
    )
    assert differ(one, two)
    assert rows == [3, 3] * 2


def test_a_unet_draws_images_of_every_latent_size(class_pipeline):
    pipe = class_pipeline(name="unet")
    images = pipe(class_labels=0, height=10, width=6, output_type="pt").images
    assert images.shape == (1, 3, 10, 6) and images.isfinite().all()
    with pytest.raises(ValueError, match="`height` is 9; it must be a positive multiple of 2"):
        pipe(class_labels=0, height=9)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_the_denoiser_may_be_set_afterwards(class_pipeline, tiny_denoiser, autoencoder, name):
    pipe = ImprovedLDMPipeline(autoencoder, variance_preserving_scheduler("epsilon"), default_guidance_scale=2.0)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.denoiser is None
    pipe.denoiser = tiny_denoiser(name, num_classes=3)
    exactly(sample(pipe, class_labels=1), sample(class_pipeline(name=name), class_labels=1))
    other = tiny_denoiser(name, num_classes=3)
    pipe.denoiser = other
    assert pipe.denoiser is other is pipe.components[other.component]


def test_the_autoencoder_may_be_tiny(class_pipeline):
    torch.manual_seed(0)
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae = AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    assert spatial_factor(vae) == 2
    assert encode_images(vae, torch.zeros(1, 3, 8, 8)).shape == (1, 4, 4, 4)
    images = class_pipeline(vae=vae)(class_labels=0, output_type="pt").images
    assert images.shape == (1, 3, 8, 8) and images.isfinite().all()


def test_latents_are_scaled_and_shifted_both_ways(autoencoder):
    pixels = torch.rand(2, 3, 8, 8) * 2 - 1
    mean = autoencoder.encode(pixels).latent_dist.mean
    drawn = torch.stack([encode_images(autoencoder, pixels, seeded(seed)) for seed in range(64)])
    deviation = autoencoder.encode(pixels).latent_dist.std.max() * 0.5
    assert_close(drawn.mean(0), (mean - 0.1) * 0.5, rtol=0, atol=deviation.item())
    assert_close(decode_latents(autoencoder, (mean - 0.1) * 0.5), autoencoder.decode(mean).sample)


def test_a_learned_variance_is_left_out(class_pipeline):
    assert sample(class_pipeline(out_channels=8), class_labels=0).shape == (1, 4, 4, 4)


def test_encoding_text_gives_what_the_call_takes(text_pipeline):
    pipe = text_pipeline(text_padding="mask")
    embeds, negative, pooled, negative_pooled, mask, negative_mask = pipe.encode_prompt(["a red coat", ""])
    assert embeds.shape == negative.shape == (2, 16, 96)
    assert mask.shape == negative_mask.shape == (2, 16)
    assert pooled.shape == negative_pooled.shape == (2, 96)


# invalid calls


BAD_CALLS = [
    ({"class_labels": None}, "neither"),
    ({"prompt": "a coat"}, "both"),
    ({"class_labels": None, "prompt": "a coat"}, "class-conditional"),
    ({"negative_prompt": "a coat"}, "negative_prompt"),
    ({"class_labels": []}, "class_labels"),
    ({"class_labels": 3}, "0 to 2"),
    ({"class_labels": [0, -1]}, "-1"),
    ({"class_labels": 1.5}, "1.5"),
    ({"class_labels": "coat"}, "'coat'"),
    ({"height": 10}, "`height` is 10"),
    ({"height": 0}, "`height` is 0"),
    ({"width": -8}, "`width` is -8"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 2.5}, "num_inference_steps"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
    ({"output_type": "jpeg"}, "'jpeg'"),
    ({"callback_on_step_end_tensor_inputs": ("latents", "embeddings")}, "embeddings"),
    ({"flip": [True]}, "`flip` is a list of 1"),
    ({"flip": 2}, "flip"),
    ({"original_size": [(8, 8)]}, "`original_size` is a list of 1"),
    ({"original_size": (8, 0)}, "original_size"),
    ({"original_size": (8,)}, "original_size"),
    ({"crops_coords_top_left": (-1, 0)}, "crops_coords_top_left"),
    ({"crops_coords_top_left": ()}, "crops_coords_top_left"),
    ({"crops_coords_top_left": (4, 4), "crop_size": (8, 8)}, "leaves the image"),
    ({"target_size": (0, 8)}, "target_size"),
    ({"target_size": ()}, "target_size"),
    ({"generator": [torch.Generator()] * 3}, "`generator` is a list of 3"),
    ({"latents": torch.zeros(1, 4, 4, 4)}, r"`latents` is \(1, 4, 4, 4\)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_CALLS, ids=range(len(BAD_CALLS)))
def test_bad_calls_fail_before_any_evaluation(class_pipeline, evaluations, arguments, message):
    pipe = class_pipeline()
    rows = evaluations(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**{"class_labels": [0, 1], **arguments})
    assert not rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None, "class_labels": 0}, "text-conditional"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": ["a coat", None]}, "prompt"),
        ({"negative_prompt": ["a", "b"]}, "`negative_prompt` is a list of 2"),
        ({"negative_prompt": 3}, "negative_prompt"),
    ],
)
def test_bad_prompts_fail_before_any_evaluation(text_pipeline, evaluations, arguments, message):
    pipe = text_pipeline()
    rows = evaluations(pipe)
    with pytest.raises(ValueError, match=message):
        pipe(**{"prompt": "a red coat", **arguments})
    assert not rows


def test_a_prompt_needs_a_text_encoder(autoencoder, tiny_denoiser):
    scheduler = variance_preserving_scheduler("epsilon")
    pipe = ImprovedLDMPipeline(autoencoder, scheduler, tiny_denoiser(text_dim=8))
    with pytest.raises(ValueError, match="text_encoder"):
        pipe("a coat")


@pytest.mark.parametrize(
    "arguments", [{"flip": False}, {"original_size": (8, 8)}, {"target_size": (8, 8)}, {"control_guidance_scale": 2.0}]
)
def test_control_of_a_model_without_it_is_an_error(class_pipeline, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        class_pipeline(conditioning="published")(class_labels=0, **arguments)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_spoilt_weights_are_an_error_that_names_the_step(class_pipeline, output_type, value):
    pipe = class_pipeline()
    next(pipe.denoiser.parameters()).data.fill_(value)
    with pytest.raises(NonFiniteLatentsError, match=r"the latents are NaN or infinite after step 1 of 3, of 2 of 2"):
        pipe(class_labels=[0, 1], num_inference_steps=3, output_type=output_type)


@pytest.mark.parametrize("spoilt_step", [0, 2, 3])
def test_the_step_that_spoils_an_image_is_named(class_pipeline, spoilt_step):
    def spoil(pipe, step, timestep, tensors):
        if step == spoilt_step:
            tensors["latents"][1, 0, 0, 0] = torch.nan
        return tensors

    expected = rf"after step {spoilt_step + 1} of 4, of 1 of 3 images"
    with pytest.raises(ValueError, match=expected):
        class_pipeline()(class_labels=[0, 1, 0], num_inference_steps=4, callback_on_step_end=spoil)


def test_latents_that_are_nan_from_the_start_are_an_error(class_pipeline):
    pipe = class_pipeline()
    latents = torch.full(pipe.latent_shape(1, *pipe.default_size), torch.nan)
    with pytest.raises(NonFiniteLatentsError, match="before the first step"):
        pipe(class_labels=0, latents=latents)


def test_an_autoencoder_that_makes_nan_is_an_error(class_pipeline, autoencoder):
    pipe = class_pipeline(vae=copy.deepcopy(autoencoder))
    next(pipe.vae.decoder.parameters()).data.fill_(torch.nan)
    with pytest.raises(NonFiniteLatentsError, match=r"the images are NaN or infinite; the Autoencoder\w+ computes in"):
        pipe(class_labels=0, num_inference_steps=1)
    assert pipe(class_labels=0, num_inference_steps=1, output_type="latent").images.isfinite().all()
