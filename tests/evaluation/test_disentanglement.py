from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from improved_ldm.conditioning.control_embedding import LevelEmbedding
from improved_ldm.evaluation.disentanglement import control_distances
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.obedience import reduced, sample_images
from improved_ldm.evaluation.perceptual import open_perceptual

COUNT = 12
OF_SIZE = {"original_size_distance", "real_original_size_distance"}
OF_CROP = {"crop_distance", "real_crop_distance"}
OF_FLIP = {"flip_distance"}


@pytest.fixture(scope="module")
def small(real):
    """Real images of 8 x 8 pixels."""
    return replace(real, pixels=F.interpolate(real.pixels, size=8, mode="area"))


@pytest.fixture(scope="module")
def distance(tmp_path_factory):
    """The distance of a random judge for 8 x 8 pixels."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    Judge(sample_size=8, widths=(8, 8)).save_pretrained(folder)
    return open_perceptual(str(folder))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [(("size",), OF_SIZE), (("crop",), OF_CROP), (("flip",), OF_FLIP), (None, OF_SIZE | OF_CROP | OF_FLIP)],
)
def test_every_control_that_is_read_is_measured_for_classes(class_pipeline, small, distance, parts, expected):
    pipeline = class_pipeline(num_classes=10, **({"control_parts": parts} if parts else {}))
    distances = control_distances(pipeline, distance, small, COUNT)
    assert distances.keys() == expected
    assert all(value > 0 for value in distances.values())


def test_it_works_for_text(text_pipeline, small, distance):
    distances = control_distances(text_pipeline(), distance, small, COUNT)
    assert distances.keys() == OF_SIZE | OF_CROP | OF_FLIP
    assert all(value > 0 for value in distances.values())


def test_a_denoiser_that_is_deaf_to_its_control_changes_nothing_but_what_is_mirrored_back(
    class_pipeline, small, distance
):
    pipeline = class_pipeline(num_classes=10)
    for module in pipeline.denoiser.modules():
        if isinstance(module, LevelEmbedding):
            module.zero_start()
    distances = control_distances(pipeline, distance, small, COUNT)
    plain = sample_images(pipeline, *small.prompts(COUNT), seed=0).clamp(-1, 1)
    assert distances["original_size_distance"] == distances["crop_distance"] == 0
    assert distances["flip_distance"] == pytest.approx(distance(plain, plain.flip(-1)).mean().item(), rel=1e-3)


def test_a_pipeline_without_control_has_no_distances(text_pipeline, small, distance):
    pipeline = text_pipeline(name="dit", text_dim=96, control_parts=())
    assert control_distances(pipeline, distance, small, COUNT) == {}


def test_distances_are_the_mean_over_sizes_and_the_cost_of_obedience_that_of_real_images(
    class_pipeline, small, distance
):
    pipeline = class_pipeline(num_classes=10, control_parts=("size",))
    pipeline.register_to_config(default_original_size=16)
    prompts, labels = small.prompts(COUNT)
    plain = sample_images(pipeline, prompts, labels, seed=3)
    samples, reals = [], []
    for size in (14, 12, 10, 8):
        smaller = sample_images(pipeline, prompts, labels, seed=3, original_size=[(size, size)] * COUNT)
        samples.append(distance(plain.clamp(-1, 1), smaller.clamp(-1, 1)).mean())
        originals = small.pixels[:COUNT]
        reals.append(distance(originals, reduced(originals, size).clamp(-1, 1)).mean())
    distances = control_distances(pipeline, distance, small, COUNT, seed=3)
    assert distances["original_size_distance"] == pytest.approx(torch.stack(samples).mean().item())
    assert distances["real_original_size_distance"] == pytest.approx(torch.stack(reals).mean().item())
