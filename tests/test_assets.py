"""The networks that ship with the package perform as stated in their records."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPModel, CLIPTextModel

from improved_ldm.autoencoder import decode_latents, encode_images
from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation.judge import Judge
from improved_ldm.places import ASSETS

NOUNS = ("T-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@pytest.fixture(scope="module")
def batch():
    """1000 images of the embedded test split."""
    rows = open_rows("embedded:fashion-mnist", split="test", label_column="label")
    batch = next(iter(make_pass(rows, ImageTransform(32), batch_size=1000)))
    return batch | {"pixels": pixel_values(batch["pixels"])}


@pytest.fixture(scope="module")
def judge():
    return Judge.from_pretrained(ASSETS / "judge").eval()


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(ASSETS / "clip").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "clip")


def recorded(asset: str) -> dict:
    return json.loads((ASSETS / asset / "metrics.json").read_text(encoding="utf-8"))


def test_judge_knows_the_classes_as_recorded(judge, batch):
    hits = [
        judge.class_and_flip(pixels)[0] == batch["label"] for pixels in (batch["pixels"], batch["pixels"].flip(-1))
    ]
    assert torch.cat(hits).float().mean() >= recorded("judge")["class_accuracy"] - 0.01


def test_judge_knows_which_way_shoes_point(judge, batch):
    pixels = batch["pixels"][torch.isin(batch["label"], torch.tensor([5, 7, 9]))]
    as_in_the_data, mirrored = judge.class_and_flip(pixels)[1], judge.class_and_flip(pixels.flip(-1))[1]
    accuracy = torch.cat([as_in_the_data == 0, mirrored == 1]).float().mean()
    assert accuracy >= recorded("judge")["orientation_accuracy"] - 0.01


def test_judge_rejects_another_size(judge):
    with pytest.raises(ValueError, match=r"\(2, 3, 28, 28\); the judge reads \(batch, 3, 32, 32\)"):
        judge.features(torch.zeros(2, 3, 28, 28))


@torch.no_grad()
def test_clip_knows_the_classes_as_recorded(clip, tokenizer, batch):
    prompts = [f"a photo of {'an' if noun[0] == 'a' else 'a'} {noun}" for noun in NOUNS]
    inputs = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    judged = clip(**inputs, pixel_values=batch["pixels"]).logits_per_image.argmax(1)
    assert (judged == batch["label"]).float().mean() >= recorded("clip")["accuracy"] - 0.02


@torch.no_grad()
def test_text_tower_loads_alone_and_reads_the_end_of_each_prompt(clip, tokenizer):
    tower = CLIPTextModel.from_pretrained(ASSETS / "clip").eval()
    prompts = ["", "a photo of a bag", "a word that no caption holds: ξ", "a bag and " * 9]
    inputs = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    output, expected = tower(**inputs), clip.text_model(**inputs)
    assert torch.equal(output.last_hidden_state, expected.last_hidden_state)
    assert output.last_hidden_state.shape[:2] == (4, 16)
    last = inputs.attention_mask.sum(1) - 1
    assert inputs.attention_mask[:2].sum(1).tolist() == [2, 7]
    assert torch.equal(output.pooler_output, output.last_hidden_state[torch.arange(4), last])


@torch.no_grad()
def test_text_states_differ_between_nouns(clip, tokenizer):
    inputs = tokenizer([f"a photo of a {noun}" for noun in NOUNS], return_tensors="pt", padding=True)
    pooled = F.normalize(clip.text_model(**inputs).pooler_output, dim=-1)
    assert all((pooled[i] @ pooled[j]).item() < 0.9 for i, j in itertools.combinations(range(len(NOUNS)), 2))


def test_autoencoder_reconstructs_as_recorded(batch):
    vae = AutoencoderKL.from_pretrained(ASSETS / "autoencoder").eval()
    pixels = batch["pixels"][:250]
    latents = encode_images(vae, pixels, torch.Generator().manual_seed(0))
    assert latents.shape == (250, 4, 8, 8)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=0.1, rtol=0)
    error = (decode_latents(vae, latents).clamp(-1, 1) - pixels) / 2
    psnr = -10 * error.square().mean((1, 2, 3)).log10().mean()
    assert psnr >= recorded("autoencoder")["whole"]["psnr"] - 0.3
