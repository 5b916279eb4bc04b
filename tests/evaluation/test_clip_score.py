import open_clip
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image
from transformers import AutoTokenizer, CLIPModel

from improved_ldm.evaluation.clip_score import open_clip_scorer
from improved_ldm.evaluation.features import open_features
from improved_ldm.evaluation.networks import MissingWeightsError, to_bytes
from improved_ldm.places import ASSETS

OPEN_CLIP = "ViT-S-32-alt"


@pytest.fixture(scope="module")
def scorer():
    return open_clip_scorer("embedded:clip")


@torch.no_grad()
def test_the_score_is_a_hundred_times_the_positive_cosine(scorer, real):
    pixels, prompts = real.pixels[:60], real.captions[30:90]
    clip, tokenizer = CLIPModel.from_pretrained(ASSETS / "clip").eval(), AutoTokenizer.from_pretrained(ASSETS / "clip")
    inputs = tokenizer(prompts, padding=True, truncation=True, return_tensors="pt")
    output = clip(**inputs, pixel_values=pixels)
    cosines = (output.image_embeds * output.text_embeds).sum(1)  # the embeddings of CLIPModel have unit length
    assert cosines.min() < 0 < cosines.max()
    torch.testing.assert_close(scorer(pixels, prompts), 100 * cosines.clamp(min=0), rtol=1e-3, atol=1e-2)


def test_right_captions_score_higher_than_those_of_other_images(scorer, real):
    right = scorer(real.pixels[:200], real.captions[:200])
    wrong = scorer(real.pixels[:200], real.captions[200:400])
    assert right.shape == (200,)
    assert right.mean() > wrong.mean() + 20
    assert right.min() >= 0
    assert right.max() <= 100


def test_scores_do_not_depend_on_the_batch(scorer, real):
    together = scorer(real.pixels[:8], real.captions[:8])
    alone = torch.cat([scorer(real.pixels[i : i + 1], real.captions[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_a_long_prompt_is_cut_and_another_size_is_resized(scorer, real):
    larger = F.interpolate(real.pixels[:2], size=64, mode="bilinear")
    assert scorer(larger, ["a bag and " * 50, ""]).isfinite().all()


def test_the_scorer_names_itself_and_its_weights(scorer):
    assert scorer.name == "embedded:clip"
    assert scorer.sha256 == open_features("embedded:clip").sha256


@torch.no_grad()
def test_open_clip_scores_with_its_own_tokenizer_and_preprocessing(tmp_path, real):
    torch.save(open_clip.create_model(OPEN_CLIP, pretrained=None).state_dict(), tmp_path / "weights.pt")
    model, preprocess = open_clip.create_model_from_pretrained(OPEN_CLIP, str(tmp_path / "weights.pt"))
    pixels, prompts = real.pixels[:4], real.captions[:4]
    images = torch.stack([preprocess(to_pil_image(image)) for image in to_bytes(pixels)])
    tokens = open_clip.get_tokenizer(OPEN_CLIP)(prompts)
    cosines = (model.eval().encode_image(images, True) * model.encode_text(tokens, True)).sum(1)
    scores = open_clip_scorer(f"open_clip:{OPEN_CLIP}:{tmp_path / 'weights.pt'}")(pixels, prompts)
    torch.testing.assert_close(scores, 100 * cosines.clamp(min=0), rtol=1e-3, atol=1e-3)


def test_each_image_needs_a_prompt(scorer, real):
    with pytest.raises(ValueError, match="`prompts` has length 2; it must have one prompt per image, 3"):
        scorer(real.pixels[:3], ["a bag", "a coat"])


@pytest.mark.parametrize("place", ["nobody/nothing", "embedded:judge", f"open_clip:{OPEN_CLIP}:nowhere.pt"])
def test_missing_weights_are_named_with_the_other_places(place):
    with pytest.raises(MissingWeightsError, match=rf"'{place}' are not available.*'embedded:clip'"):
        open_clip_scorer(place)
