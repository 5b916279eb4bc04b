import pytest
import torch

from improved_ldm import DiTDenoiser, ImprovedLDMPipeline
from improved_ldm.data.sources import open_rows
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import draw, evaluate_obedience, load_real_images
from improved_ldm.trainer.components import load_autoencoder, resolve
from improved_ldm.trainer.config import AutoencoderConfig


@pytest.fixture(scope="module")
def real():
    return load_real_images(open_rows("embedded:fashion-mnist", "test", label_column="label"), 32, 300)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(resolve("embedded:judge")).eval()


@pytest.fixture(scope="module")
def untrained() -> ImprovedLDMPipeline:
    torch.manual_seed(0)
    denoiser = DiTDenoiser(
        sample_size=8, hidden_size=32, num_layers=1, num_attention_heads=2, num_classes=10, position_extent=4.0
    )
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    pipeline = ImprovedLDMPipeline(
        load_autoencoder(AutoencoderConfig()),
        make_objective("flow").sampling_scheduler(),
        denoiser,
        default_original_size=28,
        default_guidance_scale=2.0,
        default_num_inference_steps=2,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompts_take_the_classes_in_turn(real):
    captions, labels = real.prompts(20)
    assert labels.tolist() == [*range(10), *range(10)]
    assert all("sneaker" in captions[place] for place in (7, 17))


def test_real_images_have_the_asked_size_and_range(real):
    assert real.pixels.shape == (300, 3, 32, 32)
    assert real.pixels.min() >= -1
    assert real.pixels.max() <= 1
    assert real.class_names[9] == "Ankle boot"


def test_an_untrained_pipeline_obeys_nothing(untrained, judge, real):
    results = evaluate_obedience(untrained, judge, real, num_samples=40, num_coverage_samples=40, num_detail_samples=5)
    assert results["real_class_accuracy"] > 0.85
    assert results["real_orientation_accuracy"] > 0.97
    assert results["class_accuracy"] < 0.4
    assert results["coverage"] < 0.1
    assert results["judge_fid"] > 1
    assert len(results["detail_high_frequency_energy"]) == len(results["detail_original_sizes"]) == 5


def test_drawn_images_depend_on_their_own_seed_only(untrained):
    labels = torch.arange(4)
    together = draw(untrained, [""] * 4, labels, seed=5)
    last = draw(untrained, [""], labels[3:], seed=8)
    torch.testing.assert_close(together[3:], last, rtol=1e-4, atol=1e-4)
