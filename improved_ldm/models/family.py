"""The named sizes of the denoisers, as one table."""

import difflib
import inspect
import math
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

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
# Constructor arguments that follow from the autoencoder, the data and the control settings.
DECIDED = frozenset(
    (
        *("sample_size", "in_channels", "out_channels", "num_classes", "text_dim", "pooled_dim"),
        *("conditioning", "control_weight", "control_power", "control_parts", "control_route"),
    )
)
MAX_LAYERS, MAX_COUNT, MAX_LIST = 1000, 2**16, 100  # of options
FROM_ZERO = {"dual_attention_layers", "size_features"}  # options whose numbers may be 0; others count from 1

# Every `tiny` is our choice, as are the sizes with a comment: millions of parameters with patches of 2 and text of
# 768 channels. The published DiT has 33, 130, 458 and 675.
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
        # LDM's layout: channels of the first of four levels. CompVis/latent-diffusion, `cin256-v2.yaml`: LDM-4/2
        "LDM-tiny": (32,),  # 13
        "LDM-4": (192,),
    },
    "dit": _DIT,
    # sail-sg/MDT, `masked_diffusion/models.py`; the decoders of S and XL from its README, those of B and L its default
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
        ValueError: If the name is not a key of `DENOISERS`.
    """
    if name not in DENOISERS:
        nearest = difflib.get_close_matches(name[:20], DENOISERS, n=1, cutoff=0.5)
        hint = f" The nearest is {nearest[0]!r}." if nearest else ""
        raise ValueError(f"denoiser {name[:40]!r} is unknown; choose from {', '.join(DENOISERS)}.{hint}")
    return DENOISERS[name]


def preset(name: str, size: str) -> dict[str, Any]:
    """Config values of a named size.

    Args:
        name: Backbone, a key of `DENOISERS`.
        size: `tiny`, `S`, `B`, `L` or `XL`, a slash and a patch size of 2, 4 or 8: `"XL/2"`. A UNet has no patches;
            the number is then the stride, in latent pixels, at which attention begins. Its sizes `LDM-tiny` and
            `LDM-4` have the layout of LDM, the others that of SDXL.

    Returns:
        For a transformer `hidden_size`, `num_layers`, `num_attention_heads` and `patch_size`, and for an mDT also
        `num_decoder_layers`; for a UNet the channels, blocks, depths and heads of its levels.

    Raises:
        ValueError: If the backbone or the size is not in the table.
    """
    denoiser_class(name)
    width, _, patch = size.partition("/")
    if width not in SIZES[name] or patch not in map(str, PATCH_SIZES):
        raise ValueError(
            f"size {size[:40]!r} is unknown; it is one of {', '.join(SIZES[name])}, a slash and a patch size of "
            f"{', '.join(map(str, PATCH_SIZES))}, for example 'S/2'."
        )
    values = SIZES[name][width]
    if name == "unet":
        levels = _ldm_levels if width.startswith("LDM-") else _sdxl_levels
        return levels(*values, stride=int(patch))
    return {**dict(zip(_TRANSFORMER, values, strict=False)), "patch_size": int(patch)}


def _sdxl_levels(channels: int, first_blocks: int, second_blocks: int, stride: int) -> dict[str, tuple]:
    # convolutions only at strides 1, 2, … below the given one, then two levels with attention
    plain = stride.bit_length() - 1
    widths = (channels,) * plain + (2 * channels, 4 * channels)
    return {
        **_level_types(plain, attending=2),
        "block_out_channels": widths,
        "transformer_layers_per_block": (0,) * plain + (first_blocks, second_blocks),
        "num_attention_heads": tuple(max(width // 64, 1) for width in widths),
    }


def _ldm_levels(channels: int, stride: int) -> dict[str, Any]:
    # four levels; those at the given stride and beyond attend, each with one block of one head
    plain = stride.bit_length() - 1
    return {
        **_level_types(plain, attending=4 - plain),
        "block_out_channels": tuple(channels * factor for factor in (1, 2, 3, 5)),
        "transformer_layers_per_block": (1,) * 4,
        "num_attention_heads": (1,) * 4,
        "use_linear_projection": False,
        "class_token_dim": 512,
    }


def _level_types(plain: int, attending: int) -> dict[str, tuple[str, ...]]:
    """Blocks of a UNet whose first levels have convolutions only, on the way down and up."""
    return {
        "down_block_types": ("DownBlock2D",) * plain + ("CrossAttnDownBlock2D",) * attending,
        "up_block_types": ("CrossAttnUpBlock2D",) * attending + ("UpBlock2D",) * plain,
    }


def check_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Check the constructor arguments of a backbone that a user gives, and convert them to the declared types.

    Args:
        name: A key of `DENOISERS`.
        options: Values by the names of the arguments; users cannot set those in `DECIDED`.

    Raises:
        ValueError: If a name is not such an argument, or a value has another type or is out of range.
    """
    denoiser = denoiser_class(name)
    parameters = inspect.signature(denoiser).parameters.values()
    known = {parameter.name: parameter.annotation for parameter in parameters if parameter.name not in DECIDED}
    checked = _checked(denoiser.published_form.gather(options), known)
    if checked.get("published"):
        form = {field.name: field.type for field in fields(denoiser.published_form)}
        checked["published"] = _checked(checked["published"], form)
    return checked


def _checked(options: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """The options, converted to the types in `known`."""
    checked = {}
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"it has {option[:40]!r}; it may have {', '.join(sorted(known))}.")
        try:
            checked[option] = TypeAdapter(known[option]).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"`{option}` is {str(value)[:40]!r}: {error.errors()[0]['msg']}") from None
        if isinstance(value, bool) and not isinstance(checked[option], bool):
            raise ValueError(f"`{option}` is {str(value).lower()}; it must be a number")
        most = MAX_LAYERS if "layers" in option else MAX_COUNT
        numbers = [part for part in _parts(checked[option]) if isinstance(part, int | float) and part is not False]
        least = 1 if option not in FROM_ZERO and all(isinstance(number, int) for number in numbers) else 0
        if not all(math.isfinite(number) and least <= number <= most for number in numbers):
            raise ValueError(f"`{option}` is {str(value)[:40]}; a number in it must be from {least} to {most}")
        if checked[option] == () and option not in FROM_ZERO:
            raise ValueError(f"`{option}` is {str(value)[:40]}; a list in it has at least one value")
        if len(_parts(checked[option])) > MAX_LIST:
            raise ValueError(f"`{option}` is {str(value)[:40]} …; a list in it has at most {MAX_LIST} values")
    return checked


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def make_denoiser(name: str, size: str, **config) -> Denoiser:
    """A newly initialised denoiser of a named size.

    Args:
        name: A key of `DENOISERS`.
        size: Size, as in `preset`.
        config: Further constructor arguments; they override the preset's.

    Raises:
        ValueError: If the backbone or the size is unknown.
    """
    return denoiser_class(name)(**{**preset(name, size), **config})
