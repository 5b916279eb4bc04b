"""Positions of patches: sin-cos and learned position embeddings on a grid, and relative position biases."""

import math
from typing import Literal

import torch
from torch import nn

PositionTransfer = Literal["resample", "interpolate", "extrapolate", "keep"]


def patch_coordinates(
    height: int, width: int, extent: float, stretched: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates of the rows and of the columns of a grid of patches.

    A square grid spans [0, `extent`) along both sides, regardless of its number of patches. So a denser grid resamples
    the positions of a coarser one instead of extending them. Another grid has the centre and the area of the square,
    and the same step in both directions: the coordinates of what an image shows depend on its scale and on the
    distance from the centre, not on the ratio of the sides.

    Args:
        height: Number of rows.
        width: Number of columns.
        extent: Length of the side of a square in coordinates; the published models use its number of patches at
            training.
        stretched: Whether both sides of any grid span [0, `extent`), with a step that differs between them.

    Returns:
        (height,) and (width,) float64 on the CPU.

    Source: the common range from PixArt-α and Berrada et al., 2024; `stretched` from PixArt-α; the common centre and
    step of other grids are our choice.
    """
    row, column = (torch.arange(number, dtype=torch.float64) for number in (height, width))
    if stretched:
        return row * (extent / height), column * (extent / width)
    side = math.sqrt(height * width)  # patches per side of the square with as many patches; exact for a square
    return (row + (side - height) / 2) * (extent / side), (column + (side - width) / 2) * (extent / side)


def sincos_embedding(
    row: torch.Tensor, column: torch.Tensor, dim: int, device: torch.device | None = None
) -> torch.Tensor:
    """Fixed position embeddings of all pairs of a row and a column.

    Args:
        row: (height,) float64 coordinates.
        column: (width,) float64 coordinates.
        dim: Channels, divisible by 4; the first half encodes the column, the second half the row.
        device: Device of the result, which may have no float64; default: the CPU.

    Returns:
        (height · width, dim) float32, in row-major order.

    Source: DiT.
    """
    row, column = (_sincos(axis, dim // 2).float().to(device, non_blocking=True) for axis in (row, column))
    shape = (len(row), len(column), dim // 2)
    return torch.cat([column.expand(shape), row[:, None].expand(shape)], dim=-1).flatten(0, 1)


def sincos_grid(
    height: int,
    width: int,
    dim: int,
    extent: float,
    stretched: bool = False,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Fixed position embeddings (height · width, dim) float32 of a grid of patches, in row-major order.

    The arguments are those of `patch_coordinates` and `sincos_embedding`.
    """
    return sincos_embedding(*patch_coordinates(height, width, extent, stretched), dim, device)


def sincos_beyond(
    height: int, width: int, dim: int, extent: float, device: torch.device | None = None
) -> torch.Tensor:
    """What `sincos_grid` (height · width, dim) has in addition to the nearest patch of a square with as many patches.

    It is zero for every patch within the square.
    """
    row, column = patch_coordinates(height, width, extent)
    side = math.sqrt(height * width)
    last = (side - 1) * (extent / side)  # coordinate of the last row and column of the square
    inside = sincos_embedding(row.clamp(0, last), column.clamp(0, last), dim, device)
    return sincos_embedding(row, column, dim, device) - inside


def _sincos(position: torch.Tensor, dim: int) -> torch.Tensor:
    # (n,) → (n, dim): sines, then cosines, of frequencies 10000^(-2i/dim)
    exponent = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angle = position[:, None] / 10000**exponent
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def centre_crop(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The embeddings of the centre of a square table of positions.

    Args:
        table: (side², dim), in row-major order.
        height: Number of rows of patches, at most `side`.
        width: Number of columns of patches, at most `side`.

    Returns:
        (height · width, dim).

    Raises:
        ValueError: If the grid is larger than the table.

    Source: Stable Diffusion 3.
    """
    side = round(len(table) ** 0.5)
    if max(height, width) > side:
        raise ValueError(f"the grid has {height}x{width} patches; the table of positions has {side}x{side}.")
    top, left = (side - height) // 2, (side - width) // 2
    return table.view(side, side, -1)[top : top + height, left : left + width].flatten(0, 1)


def interpolate_grid(
    table: torch.Tensor, from_size: tuple[int, int], to_size: tuple[int, int], **kwargs
) -> torch.Tensor:
    """A learned table of positions on a grid, interpolated to another grid that spans the same range on each side.

    Args:
        table: (height · width, channels), in row-major order.
        from_size: (height, width) of the table.
        to_size: (height, width) of the result.
        kwargs: Further arguments of `nn.functional.interpolate`.

    Returns:
        (height · width, channels).

    Source: bicubic, as is common for vision transformers; our choice.
    """
    grid = table.view(1, *from_size, -1).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid.float(), to_size, mode="bicubic", **kwargs).to(table.dtype)
    return grid.permute(0, 2, 3, 1).reshape(to_size[0] * to_size[1], -1)


def resample_grid(
    table: torch.Tensor, to_size: tuple[int, int], span: float, align_corners: bool = False
) -> torch.Tensor:
    """A learned table of a square grid, interpolated to a grid with the same centre and one step in both directions.

    Beyond the table, the values of its border repeat.

    Args:
        table: (side², channels), in row-major order.
        to_size: (height, width) of the result.
        span: Number of the result's steps that the table spans; it may be a fraction.
        align_corners: Whether the table spans the centres of its outer cells, or the cells as a whole.

    Returns:
        (height · width, channels); for a square the same as `interpolate_grid`.

    Source: our choice.
    """
    side = math.isqrt(len(table))
    if to_size[0] == to_size[1]:
        return interpolate_grid(table, (side, side), to_size, align_corners=align_corners)
    # from -1 to 1 across the table; the distance between two neighbours is 2 / span
    row, column = (
        (2 * torch.arange(number, dtype=torch.float32, device=table.device) + 1 - number) / span for number in to_size
    )
    places = torch.stack([column.expand(to_size), row[:, None].expand(to_size)], dim=-1)[None]
    grid = table.view(1, side, side, -1).permute(0, 3, 1, 2).float()
    grid = nn.functional.grid_sample(grid, places, "bicubic", "border", align_corners).to(table.dtype)
    return grid.permute(0, 2, 3, 1).reshape(to_size[0] * to_size[1], -1)


class RelativePositionBias(nn.Module):
    """Learned attention bias for the offset between two patches, per head.

    Args:
        num_heads: Attention heads.
        side: Patches per side at training.

    Source: BEiT, MDTv2. The last three rows are for a class token. These models have none, but the published weights
    have the rows.
    """

    def __init__(self, num_heads: int, side: int):
        super().__init__()
        self.side = side
        self.table = nn.Parameter(torch.empty((2 * side - 1) ** 2 + 3, num_heads))
        self.reset_parameters()

    def reset_parameters(self):
        """Set small random biases."""
        nn.init.trunc_normal_(self.table, std=0.02)

    def interpolated(self, grid: tuple[int, int]) -> torch.Tensor:
        """The biases ((2 rows − 1) · (2 columns − 1), heads) for the offsets in a grid of another size.

        The largest offsets of square grids are aligned; so the step between offsets shrinks by slightly less than the
        number of patches per side grows. A grid that is not square has the step of the square with as many patches.
        """
        asked = tuple(2 * side - 1 for side in grid)
        span = 2 * (math.sqrt(grid[0] * grid[1]) - 1)
        return resample_grid(self.table[: (2 * self.side - 1) ** 2], asked, span, align_corners=True)

    def resized(self, side: int) -> torch.Tensor:
        """The table for a grid of `side` patches per side."""
        return torch.cat([self.interpolated((side, side)), self.table[-3:]])

    def forward(self, offsets: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        # (..., tokens, tokens) of a grid of patches → (..., heads, tokens, tokens)
        table = self.table if grid == (self.side, self.side) else self.interpolated(grid)
        return table[offsets].movedim(-1, -3)


def relative_offsets(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """For each pair of patches of a grid, the index (tokens, tokens) of their offset in a table of all offsets."""
    row = torch.arange(rows, device=device).repeat_interleave(columns)
    column = torch.arange(columns, device=device).repeat(rows)
    down = row[:, None] - row + rows - 1
    across = column[:, None] - column + columns - 1
    return down * (2 * columns - 1) + across
