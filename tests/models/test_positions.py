import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.models.positions import sincos_grid

SIDE = st.integers(1, 12)


@given(SIDE, SIDE, st.integers(2, 4))
def test_a_denser_grid_holds_the_coarser_one(height, width, factor):
    longest = max(height, width)
    coarse = sincos_grid(longest, longest, 32, longest).view(longest, longest, 32)
    dense = sincos_grid(factor * longest, factor * longest, 32, longest).view(factor * longest, -1, 32)
    assert_close(dense[::factor, ::factor], coarse, rtol=0, atol=1e-6)


@given(SIDE, SIDE)
def test_rows_come_one_after_the_other(height, width):
    grid = sincos_grid(height, width, 16, 8.0)
    assert grid.shape == (height * width, 16) and grid.dtype == torch.float32
    column, row = grid.view(height, width, 16).split(8, dim=-1)
    assert torch.equal(column, column[:1].expand_as(column))
    assert torch.equal(row, row[:, :1].expand_as(row))


@given(SIDE, SIDE)
def test_the_shorter_side_is_centred(height, width):
    longest = max(height, width)
    if (longest - height) % 2 or (longest - width) % 2:
        return
    square = sincos_grid(longest, longest, 16, 8.0).view(longest, longest, 16)
    top, left = (longest - height) // 2, (longest - width) // 2
    part = square[top : top + height, left : left + width]
    assert_close(sincos_grid(height, width, 16, 8.0).view(height, width, 16), part)


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
