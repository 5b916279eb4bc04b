"""The resolution of images in pixels: one number for a square, or (height, width)."""

import math

Resolution = int | tuple[int, int]


def sides_of(resolution: Resolution) -> tuple[int, int]:
    """(height, width) of a resolution, pixels."""
    return (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)


def resolution_of(height: int, width: int) -> Resolution:
    """The resolution with these sides in pixels: one number if they are equal."""
    return height if height == width else (height, width)


def side_of(resolution: Resolution) -> float:
    """Pixels per side of the square with as many pixels, which stands for a resolution where one number is needed.

    Noise, guidance and the spacing of positions depend on the number of pixels, not on the ratio of the sides.

    Returns:
        sqrt(height · width); for a square exactly its side, as an integer.

    Source: our choice.
    """
    height, width = sides_of(resolution)
    return height if height == width else math.sqrt(height * width)


def latent_side(resolution: Resolution, latent_factor: int, patch_size: int) -> int:
    """The `sample_size` of a denoiser for a resolution.

    Args:
        resolution: Pixels.
        latent_factor: Image pixels per latent pixel along one side.
        patch_size: Latent pixels per side of a patch.

    Returns:
        Latent pixels per side of the square that stands for the resolution, rounded to whole patches.
    """
    return max(1, round(side_of(resolution) / (latent_factor * patch_size))) * patch_size


def size_text(resolution: Resolution) -> str:
    """A resolution in words: `256`, or `256x384` for a height of 256 and a width of 384."""
    return "x".join(map(str, sides_of(resolution))) if not isinstance(resolution, int) else str(resolution)


def default_size_of(resolution: Resolution) -> list[int] | None:
    """[height, width], the `default_size` of a pipeline; None for a square, whose side the denoiser knows."""
    return None if isinstance(resolution, int) else list(resolution)
