import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.models.positions import centre_crop, interpolate_grid, sincos_grid

SIDE = st.integers(1, 12)


FACTOR = st.integers(1, 4)


@given(SIDE, SIDE, FACTOR, FACTOR, st.floats(0.5, 64))
def test_a_denser_grid_holds_the_coarser_one(height, width, down, across, extent):
    coarse = sincos_grid(height, width, 32, extent).view(height, width, 32)
    dense = sincos_grid(down * height, across * width, 32, extent).view(down * height, across * width, 32)
    assert_close(dense[::down, ::across], coarse, rtol=0, atol=1e-6)


@given(SIDE, SIDE)
def test_rows_come_one_after_the_other(height, width):
    grid = sincos_grid(height, width, 16, 8.0)
    assert grid.shape == (height * width, 16) and grid.dtype == torch.float32
    column, row = grid.view(height, width, 16).split(8, dim=-1)
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row, row[:, :1].expand_as(row))


@given(SIDE, SIDE, SIDE, st.floats(0.5, 64))
def test_a_side_spans_the_extent_whatever_the_other_side_is(height, width, other, extent):
    column, row = sincos_grid(height, width, 16, extent).view(height, width, 16).split(8, dim=-1)
    assert_close(column, sincos_grid(other, width, 16, extent).view(other, width, 16)[:1, :, :8].expand_as(column))
    assert_close(row, sincos_grid(height, other, 16, extent).view(height, other, 16)[:, :1, 8:].expand_as(row))


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
