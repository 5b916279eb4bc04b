"""The sizes of samples that are not square."""

import pytest
import torch

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.conditioning.control import COLUMNS, control_tensor
from improved_ldm.models.family import DENOISERS


@pytest.mark.parametrize("conditioning", ["disentangled", "published"])
@pytest.mark.parametrize("size", [(8, 16), (16, 8), (12, 20), (4, 28)])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_samples_every_shape(class_pipeline, name, size, conditioning):
    pipe = class_pipeline(name=name, conditioning=conditioning)
    images = pipe(class_labels=0, height=size[0], width=size[1], output_type="pt").images
    assert images.shape == (1, 3, *size) and images.isfinite().all()


@pytest.mark.parametrize("size", [(8, 16), (12, 20)])
def test_the_control_tells_the_size_of_the_samples(class_pipeline, size):
    control = control_tensor(class_pipeline().make_controls(1, *size))[0]
    values = dict(zip(COLUMNS, control.tolist(), strict=True))
    assert (values["target_height"], values["target_width"]) == size


@pytest.fixture
def wide_pipeline(class_pipeline):
    square = class_pipeline()
    return ImprovedLDMPipeline(**square.components, default_size=(8, 16))


def test_samples_have_the_default_size(wide_pipeline, tmp_path):
    wide_pipeline.save_pretrained(tmp_path)
    for pipe in (wide_pipeline, ImprovedLDMPipeline.from_pretrained(tmp_path)):
        assert pipe.default_size == (8, 16)
        pipe.set_progress_bar_config(disable=True)
        assert pipe(class_labels=0, output_type="pt").images.shape[-2:] == (8, 16)
        assert pipe(class_labels=0, height=16, output_type="pt").images.shape[-2:] == (16, 16)


def test_another_pipeline_of_the_components_keeps_the_size(wide_pipeline):
    assert ImprovedLDMPipeline(**wide_pipeline.components).default_size == (8, 16)
    assert ImprovedLDMPipeline(**wide_pipeline.components, default_size=None).default_size == (8, 8)


def test_the_image_of_a_view_has_the_ratio_of_the_samples(wide_pipeline):
    assert wide_pipeline.default_image_size == (8, 16)
    wide_pipeline.register_to_config(default_original_size=32)
    assert wide_pipeline.default_image_size == (32, 64)


def test_a_default_size_that_does_not_divide_is_named(class_pipeline):
    pipe = ImprovedLDMPipeline(**class_pipeline().components, default_size=(8, 18))
    with pytest.raises(ValueError, match="`width` is 18; it must be a positive multiple of 4 pixels"):
        pipe(class_labels=0)


@pytest.mark.parametrize("size", [8, (8,), (8, 0), (8, 16.5), "8x16", torch.zeros(2)])
def test_a_default_size_is_two_numbers_of_pixels(class_pipeline, size):
    with pytest.raises(ValueError, match="`default_size` is"):
        ImprovedLDMPipeline(**class_pipeline().components, default_size=size)
