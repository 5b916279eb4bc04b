"""Support for published checkpoints only: the published conditioning, and the forms of individual models."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import null_control
from improved_ldm.conditioning.control_embedding import PIXART_INPUTS, SDXL_INPUTS, pixart_sizes, sdxl_sizes
from improved_ldm.models.norm import NORM_EPS
from improved_ldm.models.positions import PositionTransfer, centre_crop, interpolate_grid
from improved_ldm.models.trunk import (
    TIMESTEP_FEATURES,
    ConditioningTrunk,
    DisentangledTrunk,
    TrunkOutput,
    TrunkSpec,
    check_modes,
    sinusoids,
)


@dataclass(frozen=True)
class PublishedForm:
    """How published models of a backbone differ from the family's own; the fields are the keys of `published`."""

    @classmethod
    def read(cls, published: Mapping[str, Any] | None) -> Self:
        """The form that the argument `published` of a denoiser describes.

        Raises:
            ValueError: If a name is not a field.
        """
        names = [field.name for field in fields(cls)]
        for name in published or {}:
            if name not in names:
                raise ValueError(f"`published` has {name!r}; it may have {', '.join(names) or 'nothing'}.")
        return cls(**(published or {}))

    @classmethod
    def gather(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Move fields that are next to the other arguments of a config into `published`.

        Version 0.1.0 wrote such configs.
        """
        defaults = asdict(cls())
        beside = {name: config[name] for name in defaults if name in config}
        if config.get("published") or not beside:
            return dict(config)
        rest = {name: value for name, value in config.items() if name not in beside}
        return rest | {"published": {name: value for name, value in beside.items() if value != defaults[name]} or None}


@dataclass(frozen=True)
class PublishedDiT(PublishedForm):
    """How diffusers' DiT differs.

    Args:
        norm_eps: ε of the norms before the feed-forwards; 1e-5 in diffusers' DiT.
        downscale_freq_shift: Frequency shift of the timestep's sinusoids; 1 in diffusers' DiT.
        trunk_per_block: Whether every block has its own embedding of the conditions.
    """

    norm_eps: float = NORM_EPS
    downscale_freq_shift: float = 0.0
    trunk_per_block: bool = False


@dataclass(frozen=True)
class PublishedPixArt(PublishedForm):
    """How PixArt-α differs.

    Args:
        num_null_tokens: Tokens of the null text: 1 for all positions, or one per position as published (120).
        size_conditions: Whether resolution and aspect ratio are added to the timestep in the published mode, as in the
            published 1024-pixel model.
    """

    num_null_tokens: int = 1
    size_conditions: bool = False


@dataclass(frozen=True)
class PublishedMMDiT(PublishedForm):
    """How Stable Diffusion 3 differs.

    Args:
        position_table_size: Side length, in positions, of a table from which grids take the centre; by default every
            grid spans the whole extent.
    """

    position_table_size: int | None = None


@dataclass(frozen=True)
class PublishedUNet(PublishedForm):
    """How SDXL and LDM differ.

    Args:
        size_features: Sinusoidal features per size that the published mode adds to the timestep; 0 adds none, as in
            LDM.
    """

    size_features: int = 256


class PooledEmbedding(nn.Module):
    """Embedding of pooled text and, in SDXL, of the image's sizes, which is added to the timestep's embedding.

    Args:
        dim: Channels of the embedding.
        pooled_dim: Channels of the pooled text, or None for sizes only.
        size_features: Sinusoidal features for each of SDXL's six sizes, 0 for text only.

    Source: Stable Diffusion 3 (text alone) and SDXL.
    """

    def __init__(self, dim: int, pooled_dim: int | None, size_features: int = 0):
        super().__init__()
        self.pooled_dim, self.size_features = pooled_dim, size_features
        self.reads_pooled = pooled_dim is not None
        self.control_inputs = SDXL_INPUTS if size_features else frozenset()
        self.mlp = TimestepEmbedding((pooled_dim or 0) + 6 * size_features, dim)

    def forward(self, conditions: Conditioning, sizes: torch.Tensor | None = None) -> torch.Tensor:
        # pooled text (batch, pooled_dim) or None, control (batch, n_control), and (batch, 6) in place of the control
        # → (batch, dim)
        pooled_projections, control = conditions.pooled_projections, conditions.control
        parts = []
        if self.reads_pooled:
            if pooled_projections is None:
                pooled_projections = control.new_full((control.shape[0], self.pooled_dim), torch.nan)
            is_null = pooled_projections.isnan().all(-1, keepdim=True)
            parts.append(torch.where(is_null, 0, pooled_projections))
        if self.control_inputs:
            sizes = sdxl_sizes(control) if sizes is None else sizes
            parts.append(sinusoids(sizes.flatten(), self.size_features).view(control.shape[0], -1))
        weight = self.mlp.linear_1.weight
        return self.mlp(torch.cat([part.to(weight.dtype) for part in parts], dim=1))


class SizeEmbedding(nn.Module):
    """Embedding of the image's resolution and aspect ratio as in PixArt-α, which is added to the timestep's embedding.

    Args:
        dim: Channels of the embedding, divisible by 3.

    Raises:
        ValueError: If `dim` is not divisible by 3.

    Source: PixArt-α.
    """

    reads_pooled, control_inputs = False, PIXART_INPUTS

    def __init__(self, dim: int):
        super().__init__()
        if dim % 3:
            raise ValueError(f"`hidden_size` {dim} must be divisible by 3, the number of embedded sizes.")
        self.resolution = TimestepEmbedding(TIMESTEP_FEATURES, dim // 3)
        self.aspect_ratio = TimestepEmbedding(TIMESTEP_FEATURES, dim // 3)

    def forward(self, conditions: Conditioning, sizes: torch.Tensor | None = None) -> torch.Tensor:
        # control (batch, n_control), and (batch, 3) in place of it → (batch, dim)
        sizes = pixart_sizes(conditions.control) if sizes is None else sizes
        features = sinusoids(sizes.flatten(), TIMESTEP_FEATURES).view(sizes.shape[0], 3, TIMESTEP_FEATURES)
        features = features.to(self.resolution.linear_1.weight.dtype)
        return torch.cat([self.resolution(features[:, :2]).flatten(1), self.aspect_ratio(features[:, 2])], dim=1)


class PublishedTrunk(ConditioningTrunk):
    """Embeds the timestep and the conditions that the backbone's authors add to it; makes tokens to attend to, if any.

    Args:
        config: Config of the denoiser; the values that `ConditioningTrunk` uses are read.
        spec: Requirements of the backbone.
        text_projection: Module from text channels to token channels, for a text-conditional model; default: linear.
        embeds_class: Whether the class is added.
        added_embedding: Embedding of pooled text and sizes that is added.

    Raises:
        ValueError: If both classes and text are set, or text that the backbone does not attend to.

    Source: DiT, MDT, PixArt-α, Stable Diffusion 3, SDXL.
    """

    learns_null_text = False

    def __init__(
        self,
        config: Any,
        spec: TrunkSpec,
        text_projection: nn.Module | None = None,
        embeds_class: bool = True,
        added_embedding: PooledEmbedding | SizeEmbedding | None = None,
    ):
        super().__init__(config, spec)
        embeds_class = embeds_class and config.num_classes is not None
        if config.text_dim is not None and not spec.attends:
            raise ValueError("`text_dim` is set, but this denoiser attends to text in 'disentangled' mode only.")
        self.class_embedding = nn.Embedding(config.num_classes + 1, spec.dim) if embeds_class else None
        self.added_embedding = added_embedding
        self.add_tokens(config.text_dim, text_projection)

    @property
    def reads_pooled(self) -> bool:
        """Whether pooled text is read."""
        return self.added_embedding is not None and self.added_embedding.reads_pooled

    @property
    def control_inputs(self) -> frozenset[str]:
        """Names of the control's fields that are read."""
        return frozenset() if self.added_embedding is None else self.added_embedding.control_inputs

    def forward(
        self, timestep: torch.Tensor, conditions: Conditioning, sizes: torch.Tensor | None = None
    ) -> TrunkOutput:
        """Embed the conditions of a batch.

        Args:
            timestep: (batch,).
            conditions: Conditions of the batch; None is null.
            sizes: Sizes as numbers, in place of those in the control.
        """
        conditions = self.with_nulls(conditions, timestep)
        embedding = self.embed_time(timestep)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(conditions.class_labels)
        if self.added_embedding is not None:
            embedding = embedding + self.added_embedding(conditions, sizes)
        return embedding, *self.tokens(conditions)

    def null_addition(self) -> torch.Tensor | float:
        """The vector (dim,), or 0, that is added to the timestep's embedding for the null condition."""
        addition = 0.0
        if self.class_embedding is not None:
            addition = addition + self.class_embedding.weight[-1]
        if self.added_embedding is not None:
            null = Conditioning(control=null_control(1, self.time_embedding.linear_1.weight.device))
            addition = addition + self.added_embedding(null)[0]
        return addition


def make_trunk(
    config: Any,
    spec: TrunkSpec,
    text_projection: nn.Module | None = None,
    embeds_class: bool = True,
    added_embedding: PooledEmbedding | SizeEmbedding | None = None,
) -> DisentangledTrunk | PublishedTrunk:
    """The trunk for the config's `conditioning`; the arguments are those of `PublishedTrunk`.

    Raises:
        ValueError: If the mode is unknown, or does not read a condition.
    """
    check_modes(config)
    if config.conditioning == "published":
        return PublishedTrunk(config, spec, text_projection, embeds_class, added_embedding)
    if added_embedding is not None:
        raise ValueError("pooled text and sizes (`pooled_dim`, `size_conditions`) are read in 'published' mode only.")
    return DisentangledTrunk(config, spec, text_projection)


class PositionTable:
    """Positions of a patch denoiser; if `position_table_size` is set, they are the centre of a larger table.

    Source: Stable Diffusion 3.
    """

    stretches_positions = False  # patches of the table have the same step in both directions

    @property
    def computes_positions(self) -> bool:
        """Whether positions of grids that are not square are computed, because there is no table."""
        return self.table_size is None

    def register_positions(self):
        """Register the position embeddings of the table, if there is one, or of the configured latent size."""
        self.table_size = self.published.position_table_size
        if self.table_size is None:
            super().register_positions()
        else:
            self.register_buffer("positions", self.computed_positions(self.table_size, self.table_size))

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config values and tensors of positions for another latent size; a table gets denser, or is cropped less.

        Raises:
            ValueError: If the table is too small, or would not keep its centre.
        """
        side = self.table_size
        if side is None:
            return super().resized_positions(sample_size, positions)
        old, new = (size // self.config.patch_size for size in (self.config.sample_size, sample_size))
        extent = self.config.position_extent or old
        if positions in ("extrapolate", "keep"):
            centre_crop(self.positions, new, new)  # raises if it is too small
            return {"position_extent": extent}, {"positions": self.positions.clone()}
        new_side, remainder = divmod(side * sample_size, self.config.sample_size)
        if remainder or (side - old) % 2 or (new_side - new) % 2:
            raise ValueError(
                f"a table of {side} positions per side around {old} patches cannot be resized around {new} with the "
                f"same centre."
            )
        config = {"position_extent": extent, "published": {**self.config.published, "position_table_size": new_side}}
        if positions == "resample":
            return config, {}
        return config, {"positions": interpolate_grid(self.positions, (side, side), (new_side, new_side))}

    def positions_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (rows · columns, dim) of a grid of patches."""
        return super().positions_for(grid) if self.table_size is None else centre_crop(self.positions, *grid)
