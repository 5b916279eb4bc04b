"""Where a patch is: sin-cos position embeddings on a grid."""

import torch


def sincos_grid(height: int, width: int, dim: int, extent: float) -> torch.Tensor:
    """Fixed position embeddings of a grid of patches.

    Each side of the grid spans the coordinates [0, `extent`), whatever its number of patches. So a denser grid
    resamples the positions of a coarser one instead of extending them.

    Args:
        height: patches down.
        width: patches across.
        dim: channels, divisible by 4; the first half encodes the column, the second half the row.
        extent: length of a side in coordinates; the published models use the patches a side at training.

    Returns:
        (height · width, dim) float32 on the CPU, rows of the grid one after the other.

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
        table: (side², dim), rows of the grid one after the other.
        height: patches down, at most `side`.
        width: patches across, at most `side`.

    Returns:
        (height · width, dim).

    Raises:
        ValueError: for a grid that is larger than the table.

    Source: Stable Diffusion 3.
    """
    side = round(len(table) ** 0.5)
    if max(height, width) > side:
        raise ValueError(f"the grid has {height}x{width} patches; the table of positions has {side}x{side}.")
    top, left = (side - height) // 2, (side - width) // 2
    return table.view(side, side, -1)[top : top + height, left : left + width].flatten(0, 1)


def interpolate_grid(table: torch.Tensor, from_size: tuple[int, int], to_size: tuple[int, int], **kwargs):
    """A learned table of a grid, interpolated to another grid.

    Args:
        table: (height · width, channels), rows of the grid one after the other.
        from_size: (height, width) of the table.
        to_size: (height, width) of the result.
        kwargs: of `torch.nn.functional.interpolate`.

    Returns:
        (height · width, channels).
    """
    grid = table.view(1, *from_size, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid.float(), to_size, mode="bicubic", **kwargs).to(table.dtype)
    return grid.permute(0, 2, 3, 1).reshape(to_size[0] * to_size[1], -1)
