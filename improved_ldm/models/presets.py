"""The named sizes of the denoisers, as one table."""

from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.dit import DiTDenoiser
from improved_ldm.models.mmdit import MMDiTDenoiser

DENOISERS: dict[str, type[Denoiser]] = {"dit": DiTDenoiser, "mmdit": MMDiTDenoiser}

# size → hidden_size, num_layers, num_attention_heads
_DIT = {  # Peebles and Xie, 2023, table 1; tiny: our choice
    "tiny": (192, 4, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
    "XL": (1152, 28, 16),
}
_MMDIT = {  # our choice: the widths of DiT, the depths for a parameter count near that of DiT
    "tiny": (192, 3, 3),
    "S": (384, 7, 6),
    "B": (768, 7, 12),
    "L": (1024, 13, 16),
    "XL": (1152, 15, 16),
}
SIZES = {"dit": _DIT, "mmdit": _MMDIT}
PATCH_SIZES = (2, 4, 8)


def denoiser_class(name: str) -> type[Denoiser]:
    """The class of a backbone.

    Raises:
        ValueError: for a name that is not a key of `DENOISERS`.
    """
    if name not in DENOISERS:
        raise ValueError(f"denoiser {name!r} is unknown; choose from {', '.join(DENOISERS)}.")
    return DENOISERS[name]


def preset(name: str, size: str) -> dict[str, int]:
    """Config values of a named size.

    Args:
        name: a backbone: a key of `DENOISERS`.
        size: `tiny`, `S`, `B`, `L` or `XL`, a slash and a patch size of 2, 4 or 8: `"XL/2"`.

    Returns:
        `hidden_size`, `num_layers`, `num_attention_heads` and `patch_size`.

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
    hidden_size, num_layers, num_attention_heads = SIZES[name][width]
    return {
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_attention_heads": num_attention_heads,
        "patch_size": int(patch),
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
