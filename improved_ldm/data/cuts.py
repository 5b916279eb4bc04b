"""The geometry of control records: how much of an image a sample shows, where, and how much it is enlarged."""

from improved_ldm.conditioning.control import Control


def crop_box(control: Control) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of the crop, as fractions of the image."""
    (height, width), (top, left) = control.original_size, control.crops_coords_top_left
    return left / width, top / height, (left + control.crop_size[1]) / width, (top + control.crop_size[0]) / height


def share_cut_away(control: Control) -> float:
    """The share of the image that is outside the crop."""
    left, top, right, bottom = crop_box(control)
    return max(0.0, 1 - (right - left) * (bottom - top))


def enlargement(control: Control) -> float:
    """How many times longer the sides of the sample are than those of the crop, the larger of the two factors."""
    return max(target / extent for target, extent in zip(control.target_size, control.crop_size, strict=True))


def is_mirrored(control: Control) -> bool:
    """Whether the sample is the mirrored view."""
    return control.flip


def cut_lines(control: Control) -> list[str]:
    """The record in a few short lines, all sizes as height x width."""
    top, left = control.crops_coords_top_left
    return [
        f"original {_size(control.original_size)}",
        f"crop {_size(control.crop_size)} at {top:.4g}, {left:.4g}",
        f"sample {_size(control.target_size)}{', flipped' if control.flip else ''}",
    ]


def _size(size: tuple[float, float]) -> str:
    return f"{size[0]:.4g} x {size[1]:.4g}"
