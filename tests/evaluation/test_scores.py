import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPModel, CLIPTextModel

import improved_ldm
from improved_ldm.autoencoder import decode_latents, encode_images
from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.scores import coverage, frechet_distance, high_frequency_energy

ASSETS = Path(improved_ldm.__file__).parent / "assets"
NOUNS = ("T-shirt", "pair of trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@pytest.fixture(scope="module")
def batch():
    """1000 images of the embedded test split."""
    rows = open_rows("embedded:fashion-mnist", split="test", label_column="label")
    return next(iter(make_loader(rows, ImageTransform(32), batch_size=1000, shuffle_window=0, repeat=False)))


@pytest.fixture(scope="module")
def judge():
    return Judge.from_pretrained(ASSETS / "judge").eval()


@pytest.fixture(scope="module")
def features(judge, batch):
    with torch.no_grad():
        return judge.features(batch["pixels"])


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(ASSETS / "clip").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSETS / "clip")


def recorded(asset: str) -> dict:
    return json.loads((ASSETS / asset / "metrics.json").read_text())


def blur(pixels):
    return F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")


def test_coverage_of_a_set_by_itself_is_one(features):
    assert coverage(features, features) == 1


def test_coverage_by_one_far_point_is_zero(features):
    assert coverage(features, features.max() * 10 + features[:1]) == 0


def test_coverage_falls_when_modes_are_missing(features, batch):
    real, fake, labels = features[::2], features[1::2], batch["label"][1::2]
    of_all, of_half, of_one = (coverage(real, fake[labels < count]) for count in (10, 5, 1))
    assert of_all > of_half + 0.2 > of_one + 0.4


def test_coverage_counts_the_balls_that_hold_a_fake():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii with one neighbour: 1, 1, 1, 8
    assert coverage(real, torch.tensor([[2.5]]), nearest_k=1) == 0.5  # balls of 2 and of 10


def test_coverage_needs_neighbours():
    with pytest.raises(ValueError, match="`nearest_k` is 5; with 5 real samples"):
        coverage(torch.rand(5, 2), torch.rand(5, 2))


def test_frechet_distance_of_halves_is_small_and_of_noise_large(features, judge, batch):
    halves = frechet_distance(features[::2], features[1::2])
    with torch.no_grad():
        noise = judge.features(torch.rand_like(batch["pixels"][:500]) * 2 - 1)
    assert 0 <= halves < 0.02 * frechet_distance(features[::2], noise)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    samples = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(samples, samples + torch.tensor([3.0, 0, 0, 0])) == pytest.approx(9, rel=1e-3)


def test_frechet_distance_names_unequal_widths():
    with pytest.raises(ValueError, match="4 dimensions, `fake_features` 5"):
        frechet_distance(torch.rand(9, 4), torch.rand(9, 5))


def test_high_frequency_energy_falls_with_blur(batch):
    pixels = batch["pixels"]
    assert (high_frequency_energy(blur(pixels)) < high_frequency_energy(pixels)).float().mean() > 0.99


def test_high_frequency_energy_of_known_images():
    column = torch.arange(32) + 0.5
    low, high = (torch.cos(torch.pi * k * column / 32).expand(1, 3, 32, 32) for k in (5, 20))
    uniform = torch.full((1, 3, 32, 32), 0.7)
    energy = high_frequency_energy(torch.cat([low, high, uniform, low + high]))
    torch.testing.assert_close(energy, torch.tensor([0, 1, 0, 0.5]), atol=1e-5, rtol=0)


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
