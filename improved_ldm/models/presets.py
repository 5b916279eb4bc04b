"""The named sizes of the denoisers, as one table."""

from typing import Any

from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.mdt import MDTDenoiser
from improved_ldm.models.mmdit import MMDiTDenoiser
from improved_ldm.models.pixart import PixArtDenoiser
from improved_ldm.models.unet import UNetDenoiser

DENOISERS: dict[str, type[Denoiser]] = {
    "unet": UNetDenoiser,
    "dit": DiTDenoiser,
    "mdt": MDTDenoiser,
    "pixart": PixArtDenoiser,
    "mmdit": MMDiTDenoiser,
}
PATCH_SIZES = (2, 4, 8)

# Every `tiny` is our choice, as are the sizes with a number beside them: millions of parameters with patches of 2 and
# text of 768 channels. DiT has 33, 130, 458 and 675 as published.
_TRANSFORMER = ("hidden_size", "num_layers", "num_attention_heads", "num_decoder_layers")
_DIT = {  # Peebles and Xie, 2023, table 1
    "tiny": (192, 4, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    # channels before the first level that attends, transformer blocks in that level and in the next: SDXL's layout
    "unet": {
        "tiny": (32, 1, 1),  # 8
        "S": (64, 1, 2),  # 37
        "B": (128, 1, 2),  # 135
        "L": (192, 2, 4),  # 453
        "XL": (224, 2, 5),  # 705
    },
    "dit": _DIT,
    # sail-sg/MDT: `masked_diffusion/models.py`, the decoders of S and XL from the README, of B and L its default
    "mdt": {
        "tiny": (192, 4, 3, 2),
        "S": (384, 12, 6, 6),
        "B": (768, 12, 12, 4),
        "L": (1024, 24, 16, 4),
        "XL": (1152, 28, 16, 4),
    },
    "pixart": _DIT,  # XL: Chen et al., 2024; the others: our choice
    "mmdit": {  # the widths of DiT, fewer blocks: each has the weights of two streams
        "tiny": (192, 3, 3),  # 4
        "S": (384, 7, 6),  # 37
        "B": (768, 7, 12),  # 145
        "L": (1024, 13, 16),  # 484
        "XL": (1152, 15, 16),  # 708
    },
}


def denoiser_class(name: str) -> type[Denoiser]:
    """The class of a backbone.

    Raises:
        ValueError: for a name that is not a key of `DENOISERS`.
    """
    if name not in DENOISERS:
        raise ValueError(f"denoiser {name!r} is unknown; choose from {', '.join(DENOISERS)}.")
    return DENOISERS[name]


def preset(name: str, size: str) -> dict[str, Any]:
    """Config values of a named size.

    Args:
        name: a backbone: a key of `DENOISERS`.
        size: `tiny`, `S`, `B`, `L` or `XL`, a slash and a patch size of 2, 4 or 8: `"XL/2"`. A UNet has no patches;
            there the number is the stride, in latent pixels, at which attention begins.

    Returns:
        Of a transformer `hidden_size`, `num_layers`, `num_attention_heads` and `patch_size`, with `num_decoder_layers`
        of an mDT; of a UNet the channels, blocks, depths and heads of its levels.

    Raises:
        ValueError: for a backbone or a size that is not in the table.
    """
    denoiser_class(name)
    width, _, patch = size.partition("/")
    if width not in SIZES[name] or patch not in map(str, PATCH_SIZES):
        raise ValueError(
            f"size {size!r} is unknown; it is one of {', '.join(SIZES[name])}, a slash and a patch size of "
            f"{', '.join(map(str, PATCH_SIZES))}, for example 'S/2'."
        )
    values = SIZES[name][width]
    if name == "unet":
        return _unet_levels(*values, stride=int(patch))
    return {**dict(zip(_TRANSFORMER, values, strict=False)), "patch_size": int(patch)}


def _unet_levels(channels: int, first_blocks: int, second_blocks: int, stride: int) -> dict[str, tuple]:
    # SDXL's levels: convolutions alone at strides 1, 2, … below the given one, then two levels that attend
    plain = stride.bit_length() - 1
    widths = (channels,) * plain + (2 * channels, 4 * channels)
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",) * plain,
        "transformer_layers_per_block": (0,) * plain + (first_blocks, second_blocks),
        "num_attention_heads": tuple(max(width // 64, 1) for width in widths),
    }


def make_denoiser(name: str, size: str, **config) -> Denoiser:
    """A freshly initialised denoiser of a named size.

    Args:
        name: a key of `DENOISERS`.
        size: as `preset` takes it.
        config: further constructor arguments; they win over the preset's.

    Raises:
        ValueError: for an unknown backbone or size.
    """
    return denoiser_class(name)(**{**preset(name, size), **config})
