"""Positions of patches: sin-cos and learned position embeddings on a grid, and relative position biases."""

from typing import Literal

import torch
from torch import nn

PositionTransfer = Literal["resample", "interpolate", "extrapolate", "keep"]


def sincos_grid(height: int, width: int, dim: int, extent: float) -> torch.Tensor:
    """Fixed position embeddings of a grid of patches.

    Each side of the grid spans the coordinates [0, `extent`), regardless of its number of patches. So a denser grid
    resamples the positions of a coarser one instead of extending them.

    Args:
        height: Number of rows of patches.
        width: Number of columns of patches.
        dim: Channels, divisible by 4; the first half encodes the column, the second half the row.
        extent: Length of a side in coordinates; the published models use the number of patches per side at training.

    Returns:
        (height · width, dim) float32 on the CPU, in row-major order.

    Source: DiT; the common coordinate range from PixArt-α and Berrada et al., 2024.
    """
    row = torch.arange(height, dtype=torch.float64) * (extent / height)
    column = torch.arange(width, dtype=torch.float64) * (extent / width)
    row, column = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([_sincos(column.flatten(), dim // 2), _sincos(row.flatten(), dim // 2)], dim=1).float()


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
    """A learned table of positions on a grid, interpolated to another grid.

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

        The largest offsets of both grids are aligned; so the step between offsets shrinks by slightly less than the
        number of patches per side grows.
        """
        trained, asked = 2 * self.side - 1, tuple(2 * side - 1 for side in grid)
        return interpolate_grid(self.table[: trained**2], (trained, trained), asked, align_corners=True)

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
