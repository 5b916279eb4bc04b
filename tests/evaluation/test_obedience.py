import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm import DiTDenoiser, ImprovedLDMPipeline
from improved_ldm.conditioning.control import Control
from improved_ldm.diffusion.objectives import make_objective
from improved_ldm.evaluation.obedience import RealImages, evaluate_obedience, sample_images
from improved_ldm.evaluation.probe import CORNERS, CROPS, WHOLE, Crop, CropProbe, cropped
from improved_ldm.trainer.components import load_autoencoder
from improved_ldm.trainer.config import AutoencoderConfig


@pytest.fixture(scope="module")
def few(real) -> RealImages:
    return RealImages(real.pixels[:300], real.labels[:300], real.captions[:300], real.class_names)


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
    assert real.pixels.shape == (1000, 3, 32, 32)
    assert real.pixels.min() >= -1
    assert real.pixels.max() <= 1
    assert real.class_names[9] == "Ankle boot"


def test_an_untrained_pipeline_obeys_nothing(untrained, judge, few):
    results = evaluate_obedience(untrained, judge, few, num_samples=40, num_coverage_samples=40, num_detail_samples=20)
    assert results["real_class_accuracy"] > 0.85
    assert results["real_orientation_accuracy"] > 0.97
    assert results["class_accuracy"] < 0.4
    assert results["coverage"] < 0.1
    assert results["judge_fid"] > 1
    assert len(results["detail_high_frequency_energy"]) == len(results["detail_original_sizes"]) == 5
    assert results["crop_accuracy"] < 0.5
    assert results["real_crop_accuracy"] > 0.93


def test_further_arguments_are_of_every_call(untrained, judge, few):
    counts = {"num_samples": 10, "num_coverage_samples": 10, "num_detail_samples": 5}
    plain = evaluate_obedience(untrained, judge, few, **counts)
    guided = evaluate_obedience(untrained, judge, few, **counts, control_guidance_scale=8.0)
    assert guided["judge_fid"] != plain["judge_fid"]
    assert guided["detail_high_frequency_energy"] != plain["detail_high_frequency_energy"]


def test_orientation_is_left_out_where_no_class_of_the_samples_has_one(untrained, judge, few):
    counts = {"num_samples": 2, "num_coverage_samples": 6, "num_detail_samples": 1}
    results = evaluate_obedience(untrained, judge, few, **counts)  # samples of the classes 0 and 1
    assert not [name for name in results if "orientation" in name]
    assert json.dumps(results, allow_nan=False)


def test_only_control_that_the_denoiser_reads_is_measured(judge, few, class_pipeline):
    pipeline = class_pipeline(num_classes=10, sample_size=16, control_parts=("flip",))
    results = evaluate_obedience(pipeline, judge, few, num_samples=20, num_coverage_samples=20, num_detail_samples=10)
    assert "orientation_accuracy" in results
    assert not [name for name in results if "crop" in name or "detail" in name]


def test_a_pipeline_without_a_default_original_size_is_asked_for_its_own(untrained, judge, few):
    settings = {"default_original_size": None, "default_guidance_scale": 2.0, "default_num_inference_steps": 2}
    pipeline = ImprovedLDMPipeline(**untrained.components, **settings)
    pipeline.set_progress_bar_config(disable=True)
    results = evaluate_obedience(pipeline, judge, few, num_samples=10, num_coverage_samples=10, num_detail_samples=10)
    assert results["detail_original_sizes"] == [32, 28, 24, 20, 16]


def test_the_whole_crop_is_the_image_and_a_corner_is_its_part_enlarged(real):
    torch.testing.assert_close(cropped(real.pixels[:5], WHOLE), real.pixels[:5], rtol=0, atol=1 / 127)
    quadrants = torch.tensor([[-1.0, -0.2], [0.6, 1.0]]).repeat_interleave(16, 0).repeat_interleave(16, 1)
    left_below = cropped(quadrants.expand(1, 3, 32, 32), Crop(top=0.5, left=0, extent=0.5))
    torch.testing.assert_close(left_below, torch.full((1, 3, 32, 32), 0.6), rtol=0, atol=1 / 127)


@given(st.sampled_from(CROPS), st.integers(8, 2000), st.integers(8, 2000))
def test_the_control_of_a_crop_stays_in_the_image(crop, height, width):
    control = Control((height, width), **crop.controls((height, width)), target_size=(8, 8))
    assert control.crop_size[0] == pytest.approx(crop.extent * height)


def test_the_probe_finds_the_crops_of_images_that_it_has_not_seen(real):
    probe = CropProbe(real.pixels[:200])
    assert probe.accuracy(real.pixels[800:]) > 0.93
    for crop in CORNERS:
        found = probe(cropped(real.pixels[800:], crop))
        assert (found == CROPS.index(crop)).float().mean() > 0.85


def test_the_probe_is_the_same_each_time(real):
    first, second = CropProbe(real.pixels[:20]), CropProbe(real.pixels[:20])
    assert torch.equal(first.weights, second.weights)


def test_drawn_images_depend_on_their_own_seed_only(untrained):
    labels = torch.arange(4)
    together = sample_images(untrained, [""] * 4, labels, seed=5)
    last = sample_images(untrained, [""], labels[3:], seed=8)
    torch.testing.assert_close(together[3:], last, rtol=1e-4, atol=1e-4)
