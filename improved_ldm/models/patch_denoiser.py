"""The base class of the transformers over latent patches: sizes, positions and the trunk."""

from typing import Any

import torch
from torch import nn

from improved_ldm.models.denoiser import Denoiser
from improved_ldm.models.positions import PositionTransfer, interpolate_grid, sincos_grid
from improved_ldm.models.published import PooledEmbedding, make_trunk
from improved_ldm.models.trunk import ConditioningTrunk, TrunkSpec


class PatchDenoiser(Denoiser):
    """Base class of the transformers over latent patches, which have the same width in all blocks.

    Arguments that the constructors share, in addition to those of `Denoiser`:

    Args:
        patch_size: Latent pixels per side of a patch.
        hidden_size: Channels of a token, divisible by `num_attention_heads` and 4.
        num_layers: Blocks.
        num_attention_heads: Heads.
        mlp_ratio: Width of the feed-forward divided by `hidden_size`.
        qk_norm: RMS-normalise queries and keys per head.
        position_extent: Coordinates that a side of a square grid spans; default: its number of patches at training.
    """

    _skip_layerwise_casting_patterns = ("patch_embedding", "trunk", "norm")

    @property
    def stretches_positions(self) -> bool:
        """Whether both sides of any grid span the same coordinates, as in PixArt-α and diffusers' DiT."""
        return self.config.conditioning == "published"

    @property
    def computes_positions(self) -> bool:
        """Whether positions of grids that are not square are always computed, and never interpolated."""
        return True

    @property
    def patch_size(self) -> int:
        """Latent pixels per side of a patch."""
        return self.config.patch_size

    @property
    def summary(self) -> str:
        """Width, depth and patch in words."""
        config = self.config
        return f"{config.hidden_size} channels, {config.num_layers} blocks, patches of {config.patch_size}"

    def check_sizes(self):
        """Raise a ValueError if the width does not divide into heads or positions, or the latents into patches."""
        width, heads = self.config.hidden_size, self.config.num_attention_heads
        side, patch_size = self.config.sample_size, self.config.patch_size
        if side % patch_size:
            raise ValueError(f"`sample_size` {side} must be divisible by `patch_size` {patch_size}.")
        if width % heads:
            raise ValueError(f"`hidden_size` {width} must be divisible by `num_attention_heads` {heads}.")
        if width % 4:
            raise ValueError(f"`hidden_size` {width} must be divisible by 4, the parts of a sin-cos position.")

    def make_trunk(
        self,
        attends: bool,
        text_projection: nn.Module | None = None,
        embeds_class: bool = True,
        added_embedding: nn.Module | None = None,
        **spec,
    ) -> ConditioningTrunk:
        """The trunk that the model's config describes, with pooled text if `pooled_dim` is set.

        Args:
            attends: Whether the backbone attends to tokens.
            text_projection: As in `PublishedTrunk`, like `embeds_class` and `added_embedding`.
            spec: Further fields of `TrunkSpec`.
        """
        config, width = self.config, self.config.hidden_size
        if config.get("pooled_dim") is not None:
            added_embedding = PooledEmbedding(width, config.pooled_dim)
        spec = TrunkSpec(width, width, attends, **spec)
        return make_trunk(config, spec, text_projection, embeds_class, added_embedding)

    def register_positions(self):
        """Register the position embeddings of the configured latent size; they are saved with the weights."""
        side = self.config.sample_size // self.config.patch_size
        self.register_buffer("positions", self.computed_positions(side, side))

    @property
    def position_extent(self) -> float:
        """Coordinates that a side of a square grid spans."""
        return self.config.position_extent or self.config.sample_size / self.config.patch_size

    def computed_positions(self, rows: int, columns: int, device: torch.device | None = None) -> torch.Tensor:
        """Sin-cos embeddings (rows · columns, dim) of a grid in the model's coordinate range."""
        extent, stretched = self.position_extent, self.stretches_positions
        return sincos_grid(rows, columns, self.config.hidden_size, extent, stretched, device)

    def resized_positions(
        self, sample_size: int, positions: PositionTransfer
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Config values and tensors of positions for another latent size."""
        old, new = (size // self.config.patch_size for size in (self.config.sample_size, sample_size))
        extent = self.config.position_extent or old
        if positions == "resample":
            return {"position_extent": extent}, {}
        if positions == "interpolate":
            table = interpolate_grid(self.positions, (old, old), (new, new))
            return {"position_extent": extent}, {"positions": table}
        return ({"position_extent": extent * new / old} if positions == "extrapolate" else {}), {}

    def positions_for(self, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings (rows · columns, dim) of a grid of patches."""
        side = self.config.sample_size // self.config.patch_size
        if grid == (side, side):
            return self.positions
        return self.computed_positions(*grid, self.positions.device).to(self.positions)
