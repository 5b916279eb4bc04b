"""Latents that are not square, in every denoiser and mode."""

import pytest
import torch
from torch.testing import assert_close

from improved_ldm.models.positions import sincos_grid

SIZES = [(4, 8), (8, 4), (6, 10)]


@pytest.mark.parametrize("size", SIZES)
def test_a_denoiser_learns_from_every_shape(denoiser, make_inputs, size):
    denoiser.train()
    inputs = make_inputs(denoiser, size=size)
    generator = torch.Generator().manual_seed(0)

    def uniform(number):
        return torch.rand(len(inputs["hidden_states"]), number, generator=generator)

    passes = denoiser.training_passes(inputs["hidden_states"], 0.5, uniform)
    samples = [denoiser(**inputs, **extra).sample for extra in passes]
    assert {sample.shape for sample in samples} == {(2, 4, *size)}
    sum(sample.square().mean() for sample in samples).backward()
    gradients = [parameter.grad for parameter in denoiser.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_patches_go_back_to_their_places(patch_denoiser):
    patch, (rows, columns) = patch_denoiser.patch_size, (2, 5)
    layer = patch_denoiser.output_layer
    tokens = torch.randn(1, rows * columns, layer.linear.in_features)
    embedding = torch.randn(1, layer.linear.in_features)
    embedding = embedding[:, None] if "PixArt" in type(patch_denoiser).__name__ else embedding
    with torch.no_grad():
        whole = layer(tokens, embedding, (rows, columns))
        for place, (row, column) in enumerate((row, column) for row in range(rows) for column in range(columns)):
            alone = layer(tokens[:, place : place + 1], embedding, (1, 1))
            down, across = (slice(start * patch, (start + 1) * patch) for start in (row, column))
            assert_close(whole[..., down, across], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_rows_of_a_batch_of_any_shape_do_not_mix(denoiser, make_inputs, size):
    inputs = make_inputs(denoiser, batch_size=3, size=size)
    with torch.no_grad():
        together = denoiser(**inputs).sample
        alone = denoiser(**{name: value[1:2] for name, value in inputs.items()}).sample
    assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["dit", "pixart", "mmdit"])
def test_the_mode_decides_the_positions_of_other_grids(tiny_denoiser, name):
    grid = (2, 8)
    for mode, stretched in (("disentangled", False), ("published", name != "mmdit")):
        model = tiny_denoiser(name, num_classes=5, conditioning=mode, sample_size=8)
        assert_close(model.positions_for(grid), sincos_grid(*grid, 32, 4.0, stretched), rtol=0, atol=0)
        assert model.positions_for((4, 4)) is model.positions


@pytest.mark.parametrize("name", ["dit", "pixart", "mmdit", "mdt"])
def test_the_centre_of_an_image_has_one_position_in_every_grid_of_an_area(tiny_denoiser, name):
    model = tiny_denoiser(name, num_classes=5, sample_size=16)  # 8 x 8 patches
    square = model.positions_for((8, 8)).view(8, 8, -1)
    wide, high = model.positions_for((4, 16)).view(4, 16, -1), model.positions_for((16, 4)).view(16, 4, -1)
    assert_close(wide[:, 4:12], square[2:6], rtol=0, atol=1e-4)
    assert_close(high[4:12], square[:, 2:6], rtol=0, atol=1e-4)
