"""The control record: which part of which image a sample shows, at what size, and whether it is mirrored.

The record is written by the image transforms, kept by the latent cache, fed by the trainer, built by the
pipeline and embedded by the denoisers. Its columns are known in this file only.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

# One record as a row of float32 numbers. A row of NaN is the null control.
COLUMNS = (
    "original_height",
    "original_width",
    "crop_top",
    "crop_left",
    "crop_height",
    "crop_width",
    "target_height",
    "target_width",
    "flip",
)
NUM_CONTROL = len(COLUMNS)

ControlWeight = Literal["cosine", "constant", "linear", "zero"]
ControlPart = Literal["size", "crop", "flip"]
CONTROL_PARTS: tuple[ControlPart, ...] = get_args(ControlPart)

FEATURES_PER_VARIABLE = 64  # sinusoidal features of one scalar
MAX_PERIOD = 1000  # of the slowest sinusoid; the fastest turns once in 2π
FRACTION_SCALE = 64.0  # of values in [0, 1]: the fastest sinusoid tells 1/64 apart, and is smooth below that
OCTAVE_SCALE = 16.0  # of logarithms to base 2: the fastest sinusoid tells 1/16 of an octave, 4%, apart


@dataclass(frozen=True)
class Control:
    """What was done to an image to make a sample of it, or what is asked of a sample that is drawn.

    The image, scaled to `original_size`, is cropped to `crop_size` at `crops_coords_top_left`, the crop is scaled
    to `target_size` and mirrored if `flip` is set.

    Args:
        original_size: (height, width) of the image before the crop, pixels.
        crops_coords_top_left: (top, left) corner of the crop, in pixels of `original_size`.
        crop_size: (height, width) of the crop, in pixels of `original_size`.
        target_size: (height, width) of the sample, pixels.
        flip: whether the sample is mirrored left to right.

    Raises:
        ValueError: if a size is not positive or the crop leaves the image.

    Source: names from SDXL micro-conditioning; `crop_size` and `flip` from Berrada et al., 2024. The
    common frame of the first three values is our choice.
    """

    original_size: tuple[float, float]
    crops_coords_top_left: tuple[float, float]
    crop_size: tuple[float, float]
    target_size: tuple[int, int]
    flip: bool = False

    def __post_init__(self):
        for field in fields(self)[:4]:
            check_pair(field.name, getattr(self, field.name), minimum_is_zero=field.name == "crops_coords_top_left")
        if self.flip not in (0, 1):
            raise ValueError(f"`flip` is {self.flip!r}; it must be True or False.")
        for axis, side in enumerate(("height", "width")):
            start, extent, whole = (
                self.crops_coords_top_left[axis],
                self.crop_size[axis],
                self.original_size[axis],
            )
            if start + extent > whole * (1 + 1e-6):  # float32 rounding of a stored record
                raise ValueError(
                    f"`crops_coords_top_left` {start} plus `crop_size` {extent} leaves the image: "
                    f"`original_size` has {side} {whole}."
                )

    @classmethod
    def of_whole_image(cls, original_size: tuple[float, float], target_size: tuple[int, int], flip: bool = False):
        """The record of an image that is scaled to `target_size` without a crop."""
        return cls(original_size, (0, 0), original_size, target_size, flip)

    @property
    def aspect_ratio(self) -> float:
        """Width over height of the sample."""
        return self.target_size[1] / self.target_size[0]

    def to_row(self) -> list[float]:
        """The record as numbers in the order of `COLUMNS`."""
        return [
            *map(float, self.original_size),
            *map(float, self.crops_coords_top_left),
            *map(float, self.crop_size),
            *map(float, self.target_size),
            float(self.flip),
        ]

    @classmethod
    def from_row(cls, row: "torch.Tensor | list[float]") -> "Control":
        """The record that `to_row` or a row of a control tensor describes."""
        values = [float(value) for value in row]
        if len(values) != NUM_CONTROL:
            raise ValueError(f"a control row has {NUM_CONTROL} values ({', '.join(COLUMNS)}); got {len(values)}.")
        original_size, corner, crop_size, target_size = zip(values[0:8:2], values[1:8:2], strict=True)
        return cls(original_size, corner, crop_size, tuple(map(int, target_size)), bool(values[8]))


CONTROL_INPUTS = frozenset(field.name for field in fields(Control))  # what a caller can steer
INPUTS_OF_PARTS: dict[ControlPart, frozenset[str]] = {
    "size": frozenset({"original_size", "target_size"}),
    "crop": frozenset({"crops_coords_top_left", "crop_size"}),
    "flip": frozenset({"flip"}),
}


def check_pair(name: str, pair, minimum_is_zero: bool = False):
    """Raise a ValueError for what is not two finite numbers above, or at, zero."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ValueError(f"`{name}` is {pair!r}; it must be two numbers.")
    for value in pair:
        if not math.isfinite(value) or value < 0 or (value == 0 and not minimum_is_zero):
            raise ValueError(f"`{name}` is {pair!r}; its values must be {'≥' if minimum_is_zero else '>'} 0.")


def control_tensor(controls: list[Control]) -> torch.Tensor:
    """Stack records into the (batch, `NUM_CONTROL`) float32 tensor that a denoiser takes."""
    return torch.tensor([control.to_row() for control in controls], dtype=torch.float32)


def null_control(batch_size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The control of `batch_size` samples of which nothing is known: (batch, `NUM_CONTROL`) of NaN."""
    return torch.full((batch_size, NUM_CONTROL), torch.nan, device=device)


def is_null(control: torch.Tensor) -> torch.Tensor:
    """Which rows of a (batch, `NUM_CONTROL`) control are null: (batch,) bool."""
    return control.isnan().all(-1)


def control_weight(
    timestep: torch.Tensor, kind: ControlWeight, power: float = 1.0, num_train_timesteps: int = 1000
) -> torch.Tensor:
    """γ_c(t), the weight of the low-level control at a timestep.

    Args:
        timestep: (batch,) in [0, `num_train_timesteps`]; 0 is clean data.
        kind: `cosine` ((1 + cos(π t / T)) / 2) ** power; `linear` 1 − t / T; `constant` 1; `zero` 0.
        power: α, the steepness of the cosine ramp.
        num_train_timesteps: T.

    Returns:
        (batch,) float32 weights in [0, 1].

    Raises:
        ValueError: for an unknown `kind`.

    Source: Berrada et al., 2024; the form of the ramp is our choice.
    """
    fraction = (timestep.float() / num_train_timesteps).clamp(0, 1)
    if kind == "cosine":
        return ((1 + torch.cos(torch.pi * fraction)) / 2) ** power
    if kind == "linear":
        return 1 - fraction
    if kind == "constant":
        return torch.ones_like(fraction)
    if kind == "zero":
        return torch.zeros_like(fraction)
    raise ValueError(f"`control_weight` is {kind!r}; it must be 'cosine', 'linear', 'constant' or 'zero'.")


def high_level_variables(control: torch.Tensor, parts: Collection[ControlPart] = CONTROL_PARTS) -> torch.Tensor:
    """φ_h: flip, crop position, crop extent and aspect ratio, free of the image's size in pixels.

    The crop is expressed as fractions of the image, so that asking for another `original_size` leaves φ_h as it
    is (our choice).

    Args:
        control: (batch, `NUM_CONTROL`).
        parts: which of the variables: 1 of `flip`, 4 of `crop`, 1 of `size`, in this order.

    Returns:
        (batch, 6) float32 of all parts.
    """
    height, width, top, left, crop_height, crop_width, target_height, target_width, flip = control.float().unbind(-1)
    variables = {
        "flip": [FRACTION_SCALE * flip],
        "crop": [
            FRACTION_SCALE * value for value in (top / height, left / width, crop_height / height, crop_width / width)
        ],
        "size": [OCTAVE_SCALE * torch.log2(target_width / target_height)],
    }
    return torch.stack([value for part, values in variables.items() if part in parts for value in values], dim=-1)


def low_level_variables(control: torch.Tensor) -> torch.Tensor:
    """φ_l: the original height and width in octaves, (batch, 2) float32, from a (batch, `NUM_CONTROL`) control."""
    return OCTAVE_SCALE * torch.log2(control[:, :2].float())


def sdxl_sizes(control: torch.Tensor) -> torch.Tensor:
    """The control as SDXL's time ids: original height and width, crop top and left, target height and width.

    SDXL counts the crop's corner in pixels of the target's scale. A null row gives zeros.

    Args:
        control: (batch, `NUM_CONTROL`).

    Returns:
        (batch, 6) float32.

    Source: SDXL; the zeros are our choice.
    """
    height, width, top, left, crop_height, crop_width, target_height, target_width, _ = control.float().unbind(-1)
    corner = [top * target_height / crop_height, left * target_width / crop_width]
    sizes = torch.stack([height, width, *corner, target_height, target_width], dim=-1)
    return torch.where(is_null(control)[:, None], 0.0, sizes)


def pixart_sizes(control: torch.Tensor) -> torch.Tensor:
    """The control as PixArt-α's micro-conditions: target height and width, and height over width.

    A null row gives zeros.

    Args:
        control: (batch, `NUM_CONTROL`).

    Returns:
        (batch, 3) float32.

    Source: PixArt-α; the zeros are our choice.
    """
    height, width = control.float().unbind(-1)[6:8]
    sizes = torch.stack([height, width, height / width], dim=-1)
    return torch.where(is_null(control)[:, None], 0.0, sizes)


class ScalarsEmbedding(nn.Module):
    """Sinusoidal features of a few scalars, then a two-layer MLP that starts at zero; a learned vector where unknown.

    Args:
        num_variables: scalars a sample.
        embedding_dim: width of the result.

    Source: E_h and E_l of Berrada et al., 2024; zero start and learned null are our choice.
    """

    def __init__(self, num_variables: int, embedding_dim: int):
        super().__init__()
        self.mlp = TimestepEmbedding(num_variables * FEATURES_PER_VARIABLE, embedding_dim)
        self.null = nn.Parameter(torch.zeros(embedding_dim))
        self.zero_start()

    def zero_start(self):
        """Make the embedding contribute nothing until it is trained."""
        for parameter in (*self.mlp.linear_2.parameters(), self.null):
            nn.init.zeros_(parameter)

    def forward(self, variables: torch.Tensor, is_null: torch.Tensor) -> torch.Tensor:
        # (batch, variables) float32, (batch,) bool → (batch, embedding_dim)
        variables = torch.where(is_null[:, None], 0.0, variables)  # no NaN may reach a gradient
        features = get_timestep_embedding(
            variables.flatten(),
            FEATURES_PER_VARIABLE,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
            max_period=MAX_PERIOD,
        ).view(len(variables), -1)
        embedding = self.mlp(features.to(self.null.dtype))
        return torch.where(is_null[:, None], self.null, embedding)


class ControlEmbedding(nn.Module):
    """E_h(φ_h) + γ_c(t) · E_l(φ_l), the control's share of the embedding that modulates a denoiser.

    Args:
        embedding_dim: width of the result.
        weight: the kind of γ_c.
        power: α of the cosine ramp.
        num_train_timesteps: T.
        parts: of the control that are embedded, at least one; the others are not seen.

    Raises:
        ValueError: for an unknown weight or part.

    Source: Berrada et al., 2024.
    """

    def __init__(
        self,
        embedding_dim: int,
        weight: ControlWeight,
        power: float,
        num_train_timesteps: int,
        parts: Collection[ControlPart] = CONTROL_PARTS,
    ):
        super().__init__()
        control_weight(torch.zeros(1), weight)  # raises for an unknown kind
        check_parts(parts)
        self.weight, self.power, self.num_train_timesteps, self.parts = weight, power, num_train_timesteps, parts
        num_variables = high_level_variables(null_control(1), parts).shape[1]
        self.high_level = ScalarsEmbedding(num_variables, embedding_dim)
        self.low_level = ScalarsEmbedding(2, embedding_dim) if "size" in parts else None

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the fields of the control that are read."""
        return frozenset().union(*(INPUTS_OF_PARTS[part] for part in self.parts))

    def forward(self, control: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        # (batch, NUM_CONTROL) float32, (batch,) → (batch, embedding_dim)
        null = is_null(control)
        high = self.high_level(high_level_variables(control, self.parts), null)
        if self.low_level is None:
            return high
        low = self.low_level(low_level_variables(control), null)
        gamma = control_weight(timestep, self.weight, self.power, self.num_train_timesteps)
        return high + gamma[:, None].to(low.dtype) * low


def check_parts(parts: Collection[str]):
    """Raise a ValueError for a part of the control that does not exist."""
    unknown = set(parts) - set(CONTROL_PARTS)
    if unknown:
        raise ValueError(f"`control_parts` has {sorted(unknown)}; it may have {', '.join(CONTROL_PARTS)}.")
