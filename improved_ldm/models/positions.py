"""Where a patch is: sin-cos position embeddings on a grid."""

import torch


def sincos_grid(height: int, width: int, dim: int, extent: float) -> torch.Tensor:
    """Fixed position embeddings of a grid of patches.

    The longer side of the grid spans the coordinates [0, `extent`), whatever its number of patches; the shorter side
    keeps the same step and is centred. So a denser grid resamples the positions of a coarser one instead of extending
    them.

    Args:
        height: patches down.
        width: patches across.
        dim: channels, divisible by 4; the first half encodes the column, the second half the row.
        extent: length of the longer side in coordinates; the published models use the patches a side at training.

    Returns:
        (height · width, dim) float32 on the CPU, rows of the grid one after the other.

    Source: DiT; the common coordinate range from Berrada et al., 2024; centring is our choice.
    """
    longest = max(height, width)
    row = (torch.arange(height, dtype=torch.float64) + (longest - height) / 2) * (extent / longest)
    column = (torch.arange(width, dtype=torch.float64) + (longest - width) / 2) * (extent / longest)
    row, column = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([_sincos(column.flatten(), dim // 2), _sincos(row.flatten(), dim // 2)], dim=1).float()


def _sincos(position: torch.Tensor, dim: int) -> torch.Tensor:
    # (n,) → (n, dim): sines, then cosines, of frequencies 10000^(-2i/dim)
    exponent = torch.arange(dim // 2, dtype=torch.float64) / (dim / 2)
    angle = position[:, None] / 10000**exponent
    return torch.cat([angle.sin(), angle.cos()], dim=1)
