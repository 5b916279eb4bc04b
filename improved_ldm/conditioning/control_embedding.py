"""The control as denoisers read it: embeddings of φ_h and φ_l with the weight γ_c(t), or the published sizes."""

from collections.abc import Collection
from typing import Literal

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from improved_ldm.conditioning.control import (
    CONTROL_PARTS,
    DEFAULT_PARTS,
    INPUTS_OF_PARTS,
    VARIABLES,
    ControlPart,
    check_parts,
    control_columns,
    is_null,
    null_control,
)
from improved_ldm.conditioning.control_row import ControlLevel

ControlWeight = Literal["cosine", "constant", "linear", "zero"]

FEATURES_PER_VARIABLE = 64  # sinusoidal features per scalar
MAX_PERIOD = 1000  # 1 / frequency of the slowest sinusoid; the fastest has period 2π

# the order of a level's scalars
LAST_PART_FIRST = tuple(sorted(VARIABLES, key=lambda row: -CONTROL_PARTS.index(row.part)))

SDXL_INPUTS = INPUTS_OF_PARTS["size"] | INPUTS_OF_PARTS["crop"]
PIXART_INPUTS = frozenset({"target_size"})


def control_weight(
    timestep: torch.Tensor, kind: ControlWeight, power: float = 1.0, num_train_timesteps: int = 1000
) -> torch.Tensor:
    """γ_c(t), the weight of the low-level control at a timestep.

    Args:
        timestep: (batch,) in [0, `num_train_timesteps`]; 0 is clean data.
        kind: `cosine`, ((1 + cos(π t / T)) / 2) ** power; `linear`, 1 − t / T; `constant`, 1; `zero`, 0.
        power: α, the steepness of the cosine ramp.
        num_train_timesteps: T.

    Returns:
        (batch,) float32 weights in [0, 1].

    Raises:
        ValueError: If `kind` is unknown.

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


def high_level_variables(control: torch.Tensor, parts: Collection[ControlPart] = DEFAULT_PARTS) -> torch.Tensor:
    """φ_h: the scalars of the high level, (batch, variables) float32, NaN where a variable is unknown.

    They do not depend on the image's size in pixels. The default parts give 1 scalar of `flip`, 4 of `crop` and 1 of
    `size`.

    Args:
        control: (batch, `NUM_CONTROL`).
        parts: Parts of the control whose variables are used.
    """
    return _level_variables(control, "high", parts)


def low_level_variables(control: torch.Tensor, parts: Collection[ControlPart] = DEFAULT_PARTS) -> torch.Tensor:
    """φ_l: the scalars of the low level, as in `high_level_variables`; the default parts give 2 of `size`."""
    return _level_variables(control, "low", parts)


def _level_variables(control: torch.Tensor, level: ControlLevel, parts: Collection[ControlPart]) -> torch.Tensor:
    columns = control_columns(control)
    rows = [row for row in LAST_PART_FIRST if row.level == level and row.part in parts]
    scalars = [scalar for row in rows for scalar in row.features(columns)]
    return torch.stack(scalars, dim=-1) if scalars else control.new_empty(len(control), 0)


def sdxl_sizes(control: torch.Tensor) -> torch.Tensor:
    """The control as SDXL's time ids: original height and width, crop top and left, target height and width.

    SDXL gives the crop's corner in pixels at the scale of the target. A null row gives zeros.

    Args:
        control: (batch, `NUM_CONTROL`).

    Returns:
        (batch, 6) float32.

    Source: SDXL; the zeros are our choice.
    """
    c = control_columns(control)
    corner = [c.crop_top * c.target_height / c.crop_height, c.crop_left * c.target_width / c.crop_width]
    sizes = torch.stack([c.original_height, c.original_width, *corner, c.target_height, c.target_width], dim=-1)
    return torch.where(is_null(control)[:, None], 0.0, sizes)


def pixart_sizes(control: torch.Tensor) -> torch.Tensor:
    """The control as PixArt-α's micro-conditions: target height, target width, and height divided by width.

    A null row gives zeros.

    Args:
        control: (batch, `NUM_CONTROL`).

    Returns:
        (batch, 3) float32.

    Source: PixArt-α; the zeros are our choice.
    """
    c = control_columns(control)
    sizes = torch.stack([c.target_height, c.target_width, c.target_height / c.target_width], dim=-1)
    return torch.where(is_null(control)[:, None], 0.0, sizes)


class LevelEmbedding(nn.Module):
    """E_h or E_l: sinusoidal features of a level's scalars, then a two-layer MLP that starts at zero.

    The features of an unknown variable are zeros, which no known value has. If all variables are unknown, as in the
    null control, the embedding is a learned vector.

    Args:
        embedding_dim: Width of the result.
        level: `high` or `low`.
        parts: Parts of the control that are embedded.

    Source: Berrada et al., 2024; sinusoids and MLP are our reading; zero start, learned null and unknown variables are
    our choice.
    """

    def __init__(self, embedding_dim: int, level: ControlLevel, parts: Collection[ControlPart]):
        super().__init__()
        self.level, self.parts = level, tuple(parts)
        num_scalars = _level_variables(null_control(1), level, parts).shape[1]
        self.mlp = TimestepEmbedding(num_scalars * FEATURES_PER_VARIABLE, embedding_dim)
        self.null = nn.Parameter(torch.zeros(embedding_dim))
        self.zero_start()

    def zero_start(self):
        """Make the embedding contribute nothing until it is trained."""
        for parameter in (*self.mlp.linear_2.parameters(), self.null):
            nn.init.zeros_(parameter)

    def forward(self, control: torch.Tensor) -> torch.Tensor:
        # (batch, NUM_CONTROL) float32 → (batch, embedding_dim)
        scalars = _level_variables(control, self.level, self.parts)  # (batch, n)
        unknown = scalars.isnan()
        features = get_timestep_embedding(
            torch.where(unknown, 0.0, scalars).flatten(),  # NaN must not reach a gradient
            FEATURES_PER_VARIABLE,
            flip_sin_to_cos=True,
            downscale_freq_shift=0,
            max_period=MAX_PERIOD,
        ).view(*scalars.shape, FEATURES_PER_VARIABLE)
        features = torch.where(unknown[..., None], 0.0, features).flatten(1)
        embedding = self.mlp(features.to(self.null.dtype))
        return torch.where(unknown.all(-1, keepdim=True), self.null, embedding)


class ControlEmbedding(nn.Module):
    """The terms of E_h(φ_h) + γ_c(t) · E_l(φ_l), the embedding of the control.

    `high_level` and `low_level` are E_h and E_l, or None if the parts have no variable of that level.

    Args:
        embedding_dim: Width of the result.
        weight: Kind of γ_c.
        power: α of the cosine ramp.
        num_train_timesteps: T.
        parts: Parts of the control that are embedded, at least one; the others are ignored.

    Raises:
        ValueError: If the weight or a part is unknown.

    Source: Berrada et al., 2024; the equation is our reading.
    """

    def __init__(
        self,
        embedding_dim: int,
        weight: ControlWeight,
        power: float,
        num_train_timesteps: int,
        parts: Collection[ControlPart] = DEFAULT_PARTS,
    ):
        super().__init__()
        control_weight(torch.zeros(1), weight)  # raises for an unknown kind
        check_parts(parts)
        self.weight, self.power, self.num_train_timesteps, self.parts = weight, power, num_train_timesteps, parts
        levels = {row.level for row in VARIABLES if row.part in parts}
        self.high_level = LevelEmbedding(embedding_dim, "high", parts) if "high" in levels else None
        self.low_level = LevelEmbedding(embedding_dim, "low", parts) if "low" in levels else None

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the control's fields that are read."""
        return frozenset().union(*(INPUTS_OF_PARTS[part] for part in self.parts))

    def forward(
        self, control: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # (batch, NUM_CONTROL) float32, (batch,) → E_h (batch, dim), γ_c (batch, 1), E_l (batch, dim)
        e_high, e_low = self._embedded(self.high_level, control), self._embedded(self.low_level, control)
        gamma = control_weight(timestep, self.weight, self.power, self.num_train_timesteps)
        return e_high, gamma[:, None].to(e_low.dtype), e_low

    def _embedded(self, level: LevelEmbedding | None, control: torch.Tensor) -> torch.Tensor:
        """The embedding of a level, zero if the parts have no variable of that level."""
        if level is not None:
            return level(control)
        null = (self.high_level or self.low_level).null
        return torch.zeros_like(null).expand(control.shape[0], -1)
