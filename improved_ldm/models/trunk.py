"""The trunk of a denoiser: the conditions of a batch to the embedding that modulates and the tokens attended to."""

from typing import Any, Literal

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from improved_ldm.conditioning.control import CONTROL_INPUTS, ControlEmbedding, null_control, pixart_sizes, sdxl_sizes
from improved_ldm.conditioning.inputs import Conditioning

ConditioningMode = Literal["disentangled", "published"]
TIMESTEP_FEATURES = 256


class PooledEmbedding(nn.Module):
    """Pooled text and, in SDXL, the sizes of the image, to a share of the embedding.

    Args:
        dim: channels of the embedding.
        pooled_dim: channels of the pooled text, or None for sizes alone.
        size_features: sinusoidal features of each of SDXL's six sizes, 0 for text alone.

    Source: Stable Diffusion 3 (text alone) and SDXL.
    """

    def __init__(self, dim: int, pooled_dim: int | None, size_features: int = 0):
        super().__init__()
        self.pooled_dim, self.size_features = pooled_dim, size_features
        self.reads_pooled = pooled_dim is not None
        self.control_inputs = CONTROL_INPUTS - {"flip"} if size_features else frozenset()
        self.mlp = TimestepEmbedding((pooled_dim or 0) + 6 * size_features, dim)

    def forward(
        self, pooled_projections: torch.Tensor | None, control: torch.Tensor, sizes: torch.Tensor | None
    ) -> torch.Tensor:
        # (batch, pooled_dim), (batch, n_control), (batch, 6) in place of the control → (batch, dim)
        parts = []
        if self.reads_pooled:
            if pooled_projections is None:
                pooled_projections = control.new_full((len(control), self.pooled_dim), torch.nan)
            is_null = pooled_projections.isnan().all(-1, keepdim=True)
            parts.append(torch.where(is_null, 0, pooled_projections))
        if self.control_inputs:
            sizes = sdxl_sizes(control) if sizes is None else sizes
            parts.append(sinusoids(sizes.flatten(), self.size_features).view(len(control), -1))
        weight = self.mlp.linear_1.weight
        return self.mlp(torch.cat([part.to(weight.dtype) for part in parts], dim=1))


class SizeEmbedding(nn.Module):
    """Resolution and aspect ratio of the image, in the manner of PixArt-α, to a share of the embedding.

    Args:
        dim: channels of the embedding, divisible by 3.

    Raises:
        ValueError: for a `dim` that is not.

    Source: PixArt-α.
    """

    reads_pooled, control_inputs = False, frozenset({"target_size"})

    def __init__(self, dim: int):
        super().__init__()
        if dim % 3:
            raise ValueError(f"`hidden_size` {dim} must be divisible by 3, the sizes that are embedded.")
        self.resolution = TimestepEmbedding(TIMESTEP_FEATURES, dim // 3)
        self.aspect_ratio = TimestepEmbedding(TIMESTEP_FEATURES, dim // 3)

    def forward(self, pooled_projections: None, control: torch.Tensor, sizes: torch.Tensor | None) -> torch.Tensor:
        # (batch, n_control), (batch, 3) in place of the control → (batch, dim)
        sizes = pixart_sizes(control) if sizes is None else sizes
        features = sinusoids(sizes.flatten(), TIMESTEP_FEATURES).view(len(sizes), 3, TIMESTEP_FEATURES)
        features = features.to(self.resolution.linear_1.weight.dtype)
        return torch.cat([self.resolution(features[:, :2]).flatten(1), self.aspect_ratio(features[:, 2])], dim=1)


def sinusoids(values: torch.Tensor, num_features: int, downscale_freq_shift: float = 0.0) -> torch.Tensor:
    """Sinusoidal features (n, num_features) of n scalars, cosines first."""
    return get_timestep_embedding(
        values, num_features, flip_sin_to_cos=True, downscale_freq_shift=downscale_freq_shift
    )


class ConditioningTrunk(nn.Module):
    """Timestep, control, class and text of a batch → the embedding that modulates and the tokens that are attended to.

    `disentangled`: the embedding carries timestep and control, `e(t, c) = e_time(t) + E_h(φ_h) + γ_c(t) E_l(φ_l)`;
    class and text are tokens only. `published`: the embedding carries what the backbone's authors put there, and the
    tokens are there if the backbone attends to them.

    Args:
        config: of the denoiser; read are `conditioning`, `num_classes`, `num_class_tokens`, `text_dim`,
            `control_parts`, `control_weight`, `control_power` and `num_train_timesteps`.
        dim: channels of the embedding.
        token_dim: channels of the tokens.
        attends: whether the backbone attends to semantic tokens.
        text_projection: from text channels to `token_dim`, for a text-conditional model; default: linear.
        embeds_class: whether the published mode adds the class to the embedding.
        added_embedding: of pooled text and sizes, which the published mode adds to the embedding.
        timestep_features: sinusoidal features of the timestep.
        downscale_freq_shift: of these features; 0 in all published models but diffusers' DiT, which has 1.
        num_null_tokens: tokens of the null text: 1 for any position, or one a position.

    Raises:
        ValueError: for semantic conditions that the mode does not read.

    Source: Berrada et al., 2024.
    """

    def __init__(
        self,
        config: Any,
        dim: int,
        token_dim: int,
        attends: bool,
        text_projection: nn.Module | None = None,
        embeds_class: bool = True,
        added_embedding: PooledEmbedding | SizeEmbedding | None = None,
        timestep_features: int = TIMESTEP_FEATURES,
        downscale_freq_shift: float = 0.0,
        num_null_tokens: int = 1,
    ):
        super().__init__()
        published = config.conditioning == "published"
        has_class, has_text = config.num_classes is not None, config.text_dim is not None
        if config.conditioning not in ("disentangled", "published"):
            raise ValueError(f"`conditioning` is {config.conditioning!r}; it must be 'disentangled' or 'published'.")
        if has_class and has_text:
            raise ValueError("`num_classes` and `text_dim` are both set; a denoiser reads classes or text.")
        if added_embedding is not None and not published:
            raise ValueError(
                "pooled text and sizes (`pooled_dim`, `size_conditions`) are read in 'published' mode only."
            )
        if has_text and not attends:
            raise ValueError("`text_dim` is set, but this denoiser attends to text in 'disentangled' mode only.")
        self.num_classes, self.num_class_tokens = config.num_classes, config.num_class_tokens
        self.timestep_features, self.downscale_freq_shift = timestep_features, downscale_freq_shift

        self.time_embedding = TimestepEmbedding(timestep_features, dim)
        self.control_embedding = None
        if config.control_parts and not published:
            self.control_embedding = ControlEmbedding(
                dim, config.control_weight, config.control_power, config.num_train_timesteps, config.control_parts
            )
        embeds_class = published and has_class and embeds_class
        self.class_embedding = nn.Embedding(config.num_classes + 1, dim) if embeds_class else None
        self.added_embedding = added_embedding

        has_class_tokens = attends and has_class
        self.class_tokens = (
            nn.Embedding(config.num_classes + 1, config.num_class_tokens * token_dim) if has_class_tokens else None
        )
        self.text_projection = (text_projection or nn.Linear(config.text_dim, token_dim)) if has_text else None
        null_text = torch.zeros(num_null_tokens, config.text_dim) if has_text else None
        if published:  # the published models do not learn theirs
            self.register_buffer("null_text", null_text)
        else:
            self.null_text = None if null_text is None else nn.Parameter(null_text)

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the conditions that are read."""
        read = {
            "encoder_hidden_states": self.text_projection is not None,
            "encoder_attention_mask": self.text_projection is not None,
            "class_labels": self.num_classes is not None,
            "control": bool(self.control_inputs),
            "pooled_projections": getattr(self.added_embedding, "reads_pooled", False),
        }
        return frozenset(name for name, is_read in read.items() if is_read)

    @property
    def control_inputs(self) -> frozenset[str]:
        """Names of the fields of the control that are read."""
        if self.control_embedding is not None:
            return self.control_embedding.inputs
        return getattr(self.added_embedding, "control_inputs", frozenset())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.time_embedding.linear_1.weight.dtype

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        conditions: Conditioning,
        sizes: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Embed the conditions of a batch.

        Args:
            hidden_states: (batch, channels, height, width) latents.
            timestep: (batch,) or scalar.
            conditions: those that are None are null.
            sizes: what the published embedding reads of the control, where it is given as numbers of its own.

        Returns:
            The embedding (batch, dim), the tokens (batch, tokens, token_dim) or None, and their mask
            (batch, 1, 1, tokens) or None.
        """
        batch_size, device = len(hidden_states), hidden_states.device
        timestep = torch.as_tensor(timestep, device=device).expand(batch_size)
        class_labels, control = conditions.class_labels, conditions.control
        if class_labels is None and self.num_classes is not None:
            class_labels = torch.full((batch_size,), self.num_classes, device=device)
        if control is None:
            control = null_control(batch_size, device)

        features = sinusoids(timestep, self.timestep_features, self.downscale_freq_shift)
        embedding = self.time_embedding(features.to(self.dtype))  # (batch, dim)
        if self.control_embedding is not None:
            embedding = embedding + self.control_embedding(control, timestep)
        if self.class_embedding is not None:
            embedding = embedding + self.class_embedding(class_labels)
        if self.added_embedding is not None:
            embedding = embedding + self.added_embedding(conditions.pooled_projections, control, sizes)

        if self.class_tokens is not None:
            return embedding, self.class_tokens(class_labels).unflatten(-1, (self.num_class_tokens, -1)), None
        if self.text_projection is None:
            return embedding, None, None
        text = self.text(conditions.encoder_hidden_states, batch_size)
        mask = conditions.encoder_attention_mask
        return embedding, self.text_projection(text), None if mask is None else mask[:, None, None].bool()

    def null_addition(self) -> torch.Tensor | float:
        """What the published mode adds to the timestep's embedding for the null condition: (dim,), or 0."""
        addition = 0.0
        if self.class_embedding is not None:
            addition = addition + self.class_embedding.weight[-1]
        if self.added_embedding is not None:
            control = null_control(1, self.time_embedding.linear_1.weight.device)
            addition = addition + self.added_embedding(None, control, None)[0]
        return addition

    def text(self, encoder_hidden_states: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """The text (batch, tokens, text_dim) with the null text in the rows that are null."""
        if encoder_hidden_states is None:
            return self.null_text.expand(batch_size, -1, -1)
        num_tokens, num_nulls = encoder_hidden_states.shape[1], len(self.null_text)
        if num_nulls > 1 and num_tokens > num_nulls:
            raise ValueError(f"`encoder_hidden_states` has {num_tokens} tokens; the null text has {num_nulls}.")
        is_null = encoder_hidden_states.isnan().all(-1, keepdim=True)
        return torch.where(is_null, self.null_text[:num_tokens], encoder_hidden_states.to(self.dtype))
