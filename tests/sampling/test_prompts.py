"""Embeds instead of prompts give the same images, on every backbone in both modes."""

import pytest
import torch
from diffusers import DDPMScheduler

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.diffusion.schedules import variance_preserving_scheduler
from improved_ldm.models.family import DENOISERS

NAMES = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_attention_mask",
)
MODES = ("disentangled", "published")
PADDINGS = ("zero", "mask", "replicate", "noisy_replicate")


def draw(pipe, **call):
    generator = torch.Generator().manual_seed(0)
    return pipe(**call, generator=generator, num_inference_steps=2, output_type="latent").images


def encoded(pipe, *args, **kwargs):
    return dict(zip(NAMES, pipe.encode_prompt(*args, **kwargs), strict=True))


def without_text(pipe):
    other = ImprovedLDMPipeline(
        **{name: part for name, part in pipe.components.items() if name not in ("text_encoder", "tokenizer")},
        **{name: pipe.config[name] for name in ("text_padding", "text_noise_scale", "max_text_tokens")},
        default_guidance_scale=pipe.config.default_guidance_scale,
    )
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def prompt_pipeline(text_pipeline):
    def build(name, conditioning, **config):
        dims = dict.fromkeys(DENOISERS[name].text_arguments(conditioning), 96)
        return text_pipeline(name=name, conditioning=conditioning, **dims, **config)

    return build


@pytest.mark.parametrize("negative_prompt", [None, "the bag"])
@pytest.mark.parametrize("conditioning", MODES)
@pytest.mark.parametrize("name", DENOISERS)
def test_embeds_draw_what_their_prompts_draw(prompt_pipeline, name, conditioning, negative_prompt):
    pipe = prompt_pipeline(name, conditioning)
    pipe.scheduler = DDPMScheduler.from_config(
        pipe.scheduler.config
    )  # it uses random numbers after those of the padding
    call = {"prompt": ["a red coat", "a blue bag"], "negative_prompt": negative_prompt}
    embeds = encoded(pipe, **call)
    expected = draw(pipe, **call, num_images_per_prompt=2)
    assert torch.equal(draw(without_text(pipe), **embeds, num_images_per_prompt=2), expected)
    repeated = encoded(pipe, **call, num_images_per_prompt=2)
    assert torch.equal(draw(pipe, **repeated), expected)
    assert torch.equal(draw(pipe, **encoded(pipe, **embeds), num_images_per_prompt=2), expected)


@pytest.mark.parametrize("padding", PADDINGS)
def test_embeds_keep_to_the_padding(text_pipeline, padding):
    pipe = text_pipeline(text_padding=padding)
    expected = draw(pipe, prompt=["a coat", ""], negative_prompt="a")
    embeds = encoded(pipe, ["a coat", ""], "a")
    assert torch.equal(draw(pipe, **embeds), expected)
    if padding in ("zero", "replicate"):  # the mask adds no information to the embeds
        alone = {name: embeds[name] for name in NAMES[:2]}
        assert torch.equal(draw(pipe, **alone), expected)


def test_a_pipeline_of_a_text_encoder_alone_encodes(text_pipeline):
    pipe = text_pipeline()
    parts = {**dict.fromkeys(pipe.components), "text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    parts |= {"vae": pipe.vae, "scheduler": variance_preserving_scheduler("epsilon")}
    alone = ImprovedLDMPipeline(**parts, max_text_tokens=16)
    results = zip(alone.encode_prompt("a coat", ""), pipe.encode_prompt("a coat", ""), strict=True)
    assert all(torch.equal(first, second) for first, second in results)


def test_the_null_prompt_is_nan_and_left_out_on_request(text_pipeline):
    pipe = text_pipeline()
    embeds = encoded(pipe, "a coat")
    assert embeds["negative_prompt_embeds"].isnan().all() and embeds["prompt_embeds"].isfinite().all()
    alone = encoded(pipe, "a coat", do_classifier_free_guidance=False)
    assert [value is None for value in alone.values()] == [False, True] * 3
    assert torch.equal(draw(pipe, **alone), draw(pipe, prompt="a coat"))


def test_embeds_may_be_mixed_and_a_negative_prompt_stand_beside_them(text_pipeline):
    pipe = text_pipeline(text_padding="replicate")
    coat, bag = (pipe.encode_prompt(prompt)[0] for prompt in ("a coat", "a bag"))
    mixed = draw(pipe, prompt_embeds=0.5 * coat + 0.5 * bag, negative_prompt="a boot")
    assert mixed.isfinite().all()
    assert not torch.equal(mixed, draw(pipe, prompt="a coat", negative_prompt="a boot"))


EMBEDS, POOLED = torch.zeros(2, 16, 96), torch.zeros(2, 96)
NAN = torch.full((2, 16, 96), torch.nan)
BAD_EMBEDS = [
    ({"prompt": "a"}, r"`prompt` and `prompt_embeds` are both given"),
    ({"class_labels": 0}, r"`class_labels` and `prompt_embeds` are both given"),
    ({"negative_prompt": "a", "negative_prompt_embeds": EMBEDS}, "`negative_prompt` and `negative_prompt_embeds`"),
    ({"prompt_embeds": EMBEDS[0]}, r"`prompt_embeds` is of shape \(16, 96\)"),
    ({"prompt_embeds": EMBEDS[..., :5]}, r"`prompt_embeds` is of shape \(2, 16, 5\); .* \(2, 16, 96\)"),
    ({"prompt_embeds": EMBEDS[:0]}, "`prompt_embeds`"),
    ({"prompt_embeds": EMBEDS.long()}, "`prompt_embeds` is .* a floating torch.Tensor"),
    ({"prompt_embeds": EMBEDS.numpy()}, "`prompt_embeds`"),
    ({"prompt_embeds": "a"}, "`prompt_embeds` is 'a'"),
    ({"prompt_embeds": NAN}, "`prompt_embeds` has values that are NaN"),
    ({"negative_prompt_embeds": EMBEDS[:1]}, r"`negative_prompt_embeds` is of shape \(1, 16, 96\)"),
    ({"negative_prompt_embeds": EMBEDS[:, :3]}, "`negative_prompt_embeds`"),
    ({"negative_prompt_embeds": EMBEDS + torch.inf}, "`negative_prompt_embeds` has values"),
    ({"prompt_attention_mask": torch.ones(2, 3)}, "`prompt_attention_mask`"),
    ({"prompt_attention_mask": torch.full((2, 16), 2)}, "`prompt_attention_mask` has values that are not 0 or 1"),
    ({"prompt_attention_mask": [[1] * 16] * 2}, "`prompt_attention_mask`"),
    ({"prompt_embeds": None, "prompt_attention_mask": torch.ones(2, 16)}, "`prompt_embeds`"),
    ({"pooled_prompt_embeds": POOLED[:1]}, "`pooled_prompt_embeds`"),
    ({"prompt_embeds": EMBEDS[:, :3], "negative_prompt": "a"}, "`negative_prompt` is encoded to 16 tokens"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_EMBEDS, ids=range(len(BAD_EMBEDS)))
def test_embeds_that_do_not_fit_are_refused(text_pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(text_pipeline(), **{"prompt_embeds": EMBEDS, **arguments})


def test_pooled_text_is_asked_for_where_it_is_read(prompt_pipeline):
    pipe = prompt_pipeline("mmdit", "published")
    with pytest.raises(ValueError, match="`prompt_embeds` is given without `pooled_prompt_embeds`, which it needs"):
        draw(pipe, prompt_embeds=EMBEDS)
    with pytest.raises(ValueError, match="without `negative_pooled_prompt_embeds`"):
        draw(pipe, prompt_embeds=EMBEDS, pooled_prompt_embeds=POOLED, negative_prompt_embeds=EMBEDS)
    assert draw(prompt_pipeline("dit", "published"), pooled_prompt_embeds=POOLED).isfinite().all()


def test_more_tokens_than_the_null_prompt_has_are_refused(prompt_pipeline):
    pipe = prompt_pipeline("pixart", "published", published={"num_null_tokens": 16})
    assert draw(pipe, prompt_embeds=EMBEDS).isfinite().all()
    with pytest.raises(ValueError, match="`prompt_embeds` has 17 tokens; the model reads at most 16"):
        draw(pipe, prompt_embeds=torch.zeros(1, 17, 96))


def test_prompts_without_a_text_encoder_are_referred_to_embeds(text_pipeline, class_pipeline):
    pipe = without_text(text_pipeline())
    for arguments, name in (
        ({"prompt": "a"}, "prompt"),
        ({"prompt_embeds": EMBEDS, "negative_prompt": "a"}, "negative_prompt"),
    ):
        with pytest.raises(ValueError, match=f"`{name}` is given, .* no `text_encoder` .* give `{name}_embeds`"):
            draw(pipe, **arguments)
    with pytest.raises(ValueError, match="`prompt_embeds` is given, but the model is class-conditional"):
        draw(class_pipeline(), prompt_embeds=EMBEDS)
    with pytest.raises(ValueError, match="`negative_prompt_embeds` is given, but it needs a `prompt`"):
        draw(class_pipeline(), class_labels=0, negative_prompt_embeds=EMBEDS)
