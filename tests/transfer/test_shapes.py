"""Transfer to and from resolutions of a height and a width."""

import pytest
import torch
from diffusers import DiffusionPipeline
from torch.testing import assert_close

from improved_ldm.models.family import DENOISERS
from improved_ldm.transfer import transfer


def noise_to_signal(scheduler):
    signal = scheduler.alphas_cumprod.double()
    return (1 - signal) / signal


@pytest.mark.parametrize("name", DENOISERS)
def test_a_pipeline_goes_on_at_a_height_and_a_width(class_pipeline, tmp_path, name):
    old = class_pipeline(name=name)  # 8 pixels
    new = transfer(old, (8, 32), guidance="rescale")
    assert new.default_size == (8, 32) and new.denoiser.config.sample_size == 8  # the square of 16 pixels
    assert_close(noise_to_signal(new.scheduler), noise_to_signal(old.scheduler) * 4, rtol=1e-3, atol=1e-8)
    assert new.config.default_guidance_scale == 1 + 2 * (old.config.default_guidance_scale - 1)
    (record,) = new.config.lineage
    assert record["resolution"] == [8, [8, 32]]
    new.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert loaded.default_size == (8, 32) and loaded.config.lineage == new.config.lineage
    loaded.set_progress_bar_config(disable=True)
    images = [pipe(class_labels=0, generator=torch.manual_seed(0), output_type="pt").images for pipe in (new, loaded)]
    assert images[0].shape == (1, 3, 8, 32)
    assert_close(images[1], images[0])


def test_the_same_size_leaves_a_pipeline_as_it_is(class_pipeline):
    once = transfer(class_pipeline(), (8, 16))
    again = transfer(once, [8, 16])
    assert again.default_size == once.default_size == (8, 16) and again.config.lineage == once.config.lineage
    assert dict(again.scheduler.config) == dict(once.scheduler.config)


def test_a_transposed_size_changes_only_the_size(class_pipeline):
    wide = transfer(class_pipeline(), (8, 16))
    high = transfer(wide, (16, 8))
    assert high.default_size == (16, 8) and high.config.lineage[-1]["resolution"] == [[8, 16], [16, 8]]
    assert dict(high.scheduler.config) == dict(wide.scheduler.config)
    weights = high.denoiser.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in wide.denoiser.state_dict().items())


def test_a_square_after_another_shape_is_a_square_again(class_pipeline):
    square = transfer(transfer(class_pipeline(), (8, 32)), 16)
    assert square.default_size == (16, 16) and square.config.default_size is None
    assert square(class_labels=0, output_type="latent").images.shape[-2:] == (8, 8)


@pytest.mark.parametrize("size", [(8, 10), (6, 8), (0, 8), (8, -8)])
def test_every_side_divides_into_patches(class_pipeline, size):
    with pytest.raises(ValueError, match=f"`resolution` is {size[0]}x{size[1]}; it must be a positive multiple of 4"):
        transfer(class_pipeline(), size)


@pytest.mark.parametrize("name", ["dit", "pixart", "mmdit"])
def test_positions_that_are_computed_are_not_interpolated_for_other_shapes(class_pipeline, name):
    with pytest.raises(ValueError, match=r"`positions` is 'interpolate', but .* square samples only; give 'resample'"):
        transfer(class_pipeline(name=name), (8, 16), positions="interpolate")


@pytest.mark.parametrize(("name", "config"), [("mdt", {}), ("mmdit", {"published": {"position_table_size": 8}})])
def test_tables_of_positions_are_interpolated_for_every_shape(class_pipeline, name, config):
    new = transfer(class_pipeline(name=name, **config), (8, 32), positions="interpolate")
    assert new(class_labels=0, output_type="latent").images.shape[-2:] == (4, 16)
