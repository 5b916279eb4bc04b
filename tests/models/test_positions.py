import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.models.positions import (
    centre_crop,
    interpolate_grid,
    patch_coordinates,
    resample_grid,
    sincos_beyond,
    sincos_embedding,
    sincos_grid,
)

SIDE = st.integers(1, 12)


FACTOR = st.integers(1, 4)


@given(SIDE, SIDE, FACTOR, st.floats(0.5, 64), st.booleans())
def test_a_denser_grid_holds_the_coarser_one(height, width, factor, extent, stretched):
    coarse = sincos_grid(height, width, 32, extent, stretched).view(height, width, 32)
    rows, columns = factor * height, factor * width
    dense = sincos_grid(rows, columns, 32, extent, stretched).view(rows, columns, 32)
    assert_close(dense[::factor, ::factor], coarse, rtol=0, atol=1e-5)


@given(st.integers(1, 64), st.sampled_from([4, 8, 32]), st.floats(0.5, 64))
def test_a_square_spans_the_extent_exactly(side, dim, extent):
    place = torch.arange(side, dtype=torch.float64) * (extent / side)
    angle = place[:, None] / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    grid = sincos_grid(side, side, dim, extent).view(side, side, dim)
    assert torch.equal(grid[..., : dim // 2], line.expand(side, side, -1))
    assert torch.equal(grid[..., dim // 2 :], line[:, None].expand(side, side, -1))
    assert torch.equal(grid, sincos_grid(side, side, dim, extent, stretched=True).view(side, side, dim))


@given(SIDE, SIDE, st.floats(0.5, 64))
def test_every_grid_has_the_centre_and_the_area_of_the_square_and_one_step(height, width, extent):
    row, column = patch_coordinates(height, width, extent)
    step = extent / (height * width) ** 0.5
    for place, number in ((row, height), (column, width)):
        assert_close(place.diff(), torch.full((number - 1,), step, dtype=torch.float64))
        assert place.mean() + step / 2 == pytest.approx(extent / 2)  # a coordinate is where its patch begins
    assert (height * step) * (width * step) == pytest.approx(extent**2)


@given(SIDE, SIDE, st.floats(0.5, 64))
def test_a_transposed_grid_has_the_coordinates_of_the_other_axis(height, width, extent):
    row, column = patch_coordinates(height, width, extent)
    across, down = patch_coordinates(width, height, extent)
    assert torch.equal(row, down) and torch.equal(column, across)


@given(SIDE, SIDE)
def test_rows_come_one_after_the_other(height, width):
    grid = sincos_grid(height, width, 16, 8.0)
    assert grid.shape == (height * width, 16) and grid.dtype == torch.float32
    column, row = grid.view(height, width, 16).split(8, dim=-1)
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row, row[:, :1].expand_as(row))


@given(SIDE, SIDE, SIDE, st.floats(0.5, 64))
def test_a_stretched_side_spans_the_extent_whatever_the_other_side_is(height, width, other, extent):
    def grid(rows, columns):
        return sincos_grid(rows, columns, 16, extent, stretched=True).view(rows, columns, 16)

    column, row = grid(height, width).split(8, dim=-1)
    assert_close(column, grid(other, width)[:1, :, :8].expand_as(column))
    assert_close(row, grid(height, other)[:, :1, 8:].expand_as(row))


def test_the_published_extent_gives_integer_coordinates():
    position, dim = torch.arange(5.0), 16
    angle = position[:, None] / 10000 ** (torch.arange(4.0) / 4)
    expected = torch.cat([angle.sin(), angle.cos()], dim=1)
    grid = sincos_grid(5, 5, dim, 5.0).view(5, 5, dim)
    assert_close(grid[0, :, :8], expected)
    assert_close(grid[:, 0, 8:], expected)


def test_positions_are_distinct():
    grid = sincos_grid(8, 6, 32, 8.0)
    assert torch.cdist(grid, grid).fill_diagonal_(1).min() > 1e-2


def numbered(side, dim=1):
    """A table whose values are its row numbers."""
    return torch.arange(float(side**2))[:, None].expand(-1, dim)


@given(SIDE, st.data())
def test_a_crop_is_the_centre_of_its_table(side, data):
    height, width = (data.draw(st.integers(1, side)) for _ in range(2))
    crop = centre_crop(numbered(side, 3), height, width)
    assert crop.shape == (height * width, 3)
    rows, columns = crop[:, 0].view(height, width) // side, crop[:, 0].view(height, width) % side
    for coordinates, size in ((rows[:, 0], height), (columns[0], width)):
        before, after = coordinates[0].item(), side - 1 - coordinates[-1].item()
        assert torch.equal(coordinates, torch.arange(size) + before)
        assert after - before in (0, 1)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))


@given(SIDE)
def test_a_crop_of_the_whole_table_is_the_table(side):
    assert torch.equal(centre_crop(numbered(side), side, side), numbered(side))


@pytest.mark.parametrize(("height", "width"), [(5, 4), (1, 5), (6, 6)])
def test_a_crop_larger_than_its_table_is_an_error(height, width):
    with pytest.raises(ValueError, match=f"{height}x{width} patches.*4x4"):
        centre_crop(numbered(4), height, width)


ALIGNMENT = st.sampled_from([{}, {"align_corners": True}])


@given(SIDE, SIDE, ALIGNMENT)
def test_interpolation_to_the_same_grid_is_the_identity(height, width, alignment):
    table = torch.randn(height * width, 6)
    assert_close(interpolate_grid(table, (height, width), (height, width), **alignment), table, rtol=0, atol=1e-5)


@given(SIDE, SIDE, SIDE, SIDE, ALIGNMENT, st.floats(-100, 100, width=32))
def test_interpolation_of_a_constant_is_constant(height, width, to_height, to_width, alignment, value):
    table = torch.tensor([value, -value]).expand(height * width, 2)
    resized = interpolate_grid(table, (height, width), (to_height, to_width), **alignment)
    assert resized.shape == (to_height * to_width, 2)
    assert_close(resized, table[:1].expand_as(resized), rtol=1e-4, atol=1e-4)


@given(st.integers(2, 6), st.integers(2, 6), FACTOR)
def test_aligned_interpolation_keeps_the_corners(height, width, factor):
    table = torch.randn(height * width, 3)
    resized = interpolate_grid(table, (height, width), (factor * height, factor * width), align_corners=True)
    grids = table.view(height, width, 3), resized.view(factor * height, factor * width, 3)
    before, after = (torch.stack([grid[row, column] for row in (0, -1) for column in (0, -1)]) for grid in grids)
    assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_interpolation_keeps_the_dtype():
    assert interpolate_grid(torch.randn(4, 3).half(), (2, 2), (3, 3)).dtype == torch.float16


def test_interpolation_keeps_rows_and_columns_apart():
    table = torch.arange(4.0)[:, None].repeat_interleave(6, dim=0)  # rows of a 4 x 6 grid, numbered
    resized = interpolate_grid(table, (4, 6), (8, 3)).view(8, 3)
    assert_close(resized, resized[:, :1].expand_as(resized))
    assert (resized[1:, 0] - resized[:-1, 0]).min() > 0


@given(SIDE, SIDE, ALIGNMENT)
def test_a_table_is_resampled_to_a_square_as_it_is_interpolated(side, to, alignment):
    table = torch.randn(side**2, 3)
    expected = interpolate_grid(table, (side, side), (to, to), **alignment)
    assert torch.equal(resample_grid(table, (to, to), to, **alignment), expected)


@given(st.integers(2, 6), st.integers(1, 3))
def test_a_resampled_table_has_one_step_and_its_own_centre(side, factor):
    rows, columns = side * factor, 4 * side * factor  # twice as wide and half as high as the square
    place = torch.arange(float(side))
    table = torch.stack(torch.meshgrid(place, place, indexing="ij"), dim=-1).flatten(0, 1)
    row, column = resample_grid(table, (rows, columns), 2 * side * factor).view(rows, columns, 2).unbind(-1)
    assert_close(row, row[:, :1].expand_as(row))
    assert_close(column, column[:1].expand_as(column))
    assert_close(row + row.flip(0), torch.full_like(row, side - 1))
    assert_close(column + column.flip(1), torch.full_like(column, side - 1))
    ends = (columns - 2 * side * factor) // 2 - 2 * factor  # beyond the table, farther than the kernel reaches
    if ends > 0:
        assert_close(column[:, :ends], torch.zeros(rows, ends))


def test_the_continuation_of_a_table_is_that_of_its_positions():
    side, dim, grid = 8, 16, (4, 16)
    beyond = sincos_beyond(*grid, dim, float(side))
    continued = resample_grid(sincos_grid(side, side, dim, side), grid, side) + beyond
    assert_close(continued, sincos_embedding(*patch_coordinates(*grid, side), dim), rtol=0, atol=1e-5)
    inside = beyond.view(*grid, dim)[:, 4:12]
    assert torch.equal(inside, torch.zeros_like(inside)) and beyond.abs().max() > 0.1


@given(SIDE)
def test_a_square_has_nothing_beyond_its_table(side):
    assert torch.equal(sincos_beyond(side, side, 8, 3.7), torch.zeros(side**2, 8))
