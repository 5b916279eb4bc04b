"""The trunk of a denoiser, which turns conditions into the embedding that modulates and the tokens to attend to."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.control import null_control
from improved_ldm.conditioning.control_embedding import ControlEmbedding

ConditioningMode = Literal["disentangled", "published"]
ControlRoute = Literal["norm", "tokens"]
TIMESTEP_FEATURES = 256

# embedding (batch, dim), tokens (batch, tokens, token_dim) or None, and their mask (batch, 1, 1, tokens) or None
TrunkOutput = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def sinusoids(values: torch.Tensor, num_features: int, downscale_freq_shift: float = 0.0) -> torch.Tensor:
    """Sinusoidal features (n, num_features) of n scalars, cosines first."""
    return get_timestep_embedding(
        values, num_features, flip_sin_to_cos=True, downscale_freq_shift=downscale_freq_shift
    )


@dataclass(frozen=True)
class TrunkSpec:
    """The requirements of a backbone for its trunk.

    Args:
        dim: Channels of the embedding.
        token_dim: Channels of the tokens.
        attends: Whether the backbone attends to tokens.
        timestep_features: Sinusoidal features of the timestep.
        downscale_freq_shift: Frequency shift of these features; 0 in all published models except diffusers' DiT, which
            has 1.
        num_null_tokens: Tokens of the null text: 1 for all positions, or one per position.
        random_null_text: Whether a null text that is not learned starts with random numbers instead of zeros.
    """

    dim: int
    token_dim: int
    attends: bool
    timestep_features: int = TIMESTEP_FEATURES
    downscale_freq_shift: float = 0.0
    num_null_tokens: int = 1
    random_null_text: bool = False


class ConditioningTrunk(nn.Module):
    """Base class of the trunks: the embedding of the timestep, and the tokens of a class or a text.

    A subclass adds its own embeddings, then calls `add_tokens`.

    Args:
        config: Config of the denoiser; `num_classes`, `num_class_tokens` and `text_dim` are read.
        spec: Requirements of the backbone.

    Raises:
        ValueError: If both classes and text are set.
    """

    learns_null_text: bool
    reads_pooled = False

    def __init__(self, config: Any, spec: TrunkSpec):
        super().__init__()
        if config.num_classes is not None and config.text_dim is not None:
            raise ValueError("`num_classes` and `text_dim` are both set; set one of them.")
        self.spec, self.num_classes, self.num_class_tokens = spec, config.num_classes, config.num_class_tokens
        self.time_embedding = TimestepEmbedding(spec.timestep_features, spec.dim)

    def add_tokens(self, text_dim: int | None, text_projection: nn.Module | None):
        """Add the tokens of each class, or the projection of text (default: linear) and the null text."""
        spec, has_text = self.spec, text_dim is not None
        has_class_tokens = spec.attends and self.num_classes is not None
        self.class_tokens = (
            nn.Embedding(self.num_classes + 1, self.num_class_tokens * spec.token_dim) if has_class_tokens else None
        )
        self.text_projection = (text_projection or nn.Linear(text_dim, spec.token_dim)) if has_text else None
        null_text = torch.zeros(spec.num_null_tokens, text_dim) if has_text else None
        if self.learns_null_text:
            self.null_text = None if null_text is None else nn.Parameter(null_text)
        else:
            if has_text and spec.random_null_text:
                null_text.normal_(std=text_dim**-0.5)
            self.register_buffer("null_text", null_text)

    @property
    def inputs(self) -> frozenset[str]:
        """Names of the conditions that are read."""
        read = {
            "encoder_hidden_states": self.text_projection is not None,
            "encoder_attention_mask": self.text_projection is not None,
            "class_labels": self.num_classes is not None,
            "control": bool(self.control_inputs),
            "pooled_projections": self.reads_pooled,
        }
        return frozenset(name for name, is_read in read.items() if is_read)

    @property
    def control_inputs(self) -> frozenset[str]:
        """Names of the control's fields that are read."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.time_embedding.linear_1.weight.dtype

    def embed_time(self, timestep: torch.Tensor) -> torch.Tensor:
        """e_time(t): (batch,) → (batch, dim)."""
        features = sinusoids(timestep, self.spec.timestep_features, self.spec.downscale_freq_shift)
        return self.time_embedding(features.to(self.dtype))

    def with_nulls(self, conditions: Conditioning, timestep: torch.Tensor) -> Conditioning:
        """Replace a class and a control that are None by their nulls; timestep is (batch,)."""
        batch_size, device = timestep.shape[0], timestep.device
        class_labels, control = conditions.class_labels, conditions.control
        if class_labels is None and self.num_classes is not None:
            class_labels = torch.full((batch_size,), self.num_classes, device=device)
        if control is None:
            control = null_control(batch_size, device)
        return Conditioning(
            conditions.encoder_hidden_states,
            conditions.encoder_attention_mask,
            conditions.pooled_projections,
            class_labels,
            control,
        )

    def tokens(self, conditions: Conditioning) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Tokens (batch, tokens, token_dim) of the class or text and their mask (batch, 1, 1, tokens), or None."""
        if self.class_tokens is not None:
            return self.class_tokens(conditions.class_labels).unflatten(-1, (self.num_class_tokens, -1)), None
        if self.text_projection is None:
            return None, None
        text = self.text(conditions.encoder_hidden_states, conditions.control.shape[0])
        mask = conditions.encoder_attention_mask
        return self.text_projection(text), None if mask is None else mask[:, None, None].bool()

    def text(self, encoder_hidden_states: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """The text (batch, tokens, text_dim), with the learned null text in null rows."""
        if encoder_hidden_states is None:
            return self.null_text.expand(batch_size, -1, -1)
        num_tokens, num_nulls = encoder_hidden_states.shape[1], len(self.null_text)
        if num_nulls > 1 and num_tokens > num_nulls:
            raise ValueError(f"`encoder_hidden_states` has {num_tokens} tokens; the null text has only {num_nulls}.")
        is_null = encoder_hidden_states.isnan().all(-1, keepdim=True)
        return torch.where(is_null, self.null_text[:num_tokens], encoder_hidden_states.to(self.dtype))


class DisentangledTrunk(ConditioningTrunk):
    """Embeds the timestep and the control; makes the tokens of the class or the text.

    With `control_route="tokens"` the control is not in the embedding. Instead, E_h(φ_h) and γ_c(t) · E_l(φ_l), each
    added to a learned vector that distinguishes the two, are two tokens after those of the class or text. E_h and E_l
    are zero until they are trained, so an untrained control changes no prediction. The two tokens take some attention
    from the others. In a new model this changes no state of a DiT, mDT or PixArt, whose attention to tokens starts at
    zero, and none of an mmDiT, whose gates start at zero. In a UNet it changes states, but not the prediction, which
    starts at zero.

    Args:
        config: Config of the denoiser; the values that `ConditioningTrunk` uses, `control_parts`, `control_weight`,
            `control_power`, `control_route` and `num_train_timesteps` are read.
        spec: Requirements of the backbone.
        text_projection: Module from text channels to token channels, for a text-conditional model; default: linear.

    Raises:
        ValueError: If both classes and text are set.

    Source: Berrada et al., 2024; the control in tokens is our choice.
    """

    learns_null_text = True

    def __init__(self, config: Any, spec: TrunkSpec, text_projection: nn.Module | None = None):
        super().__init__(config, spec)
        self.control_in_tokens = config.control_route == "tokens"
        self.control_embedding = None
        if config.control_parts:
            self.control_embedding = ControlEmbedding(
                spec.token_dim if self.control_in_tokens else spec.dim,
                config.control_weight,
                config.control_power,
                config.num_train_timesteps,
                config.control_parts,
            )
            if self.control_in_tokens:
                self.control_tokens = nn.Embedding(2, spec.token_dim)  # added to the control's embeddings
        self.add_tokens(config.text_dim, text_projection)

    @property
    def control_inputs(self) -> frozenset[str]:
        """Names of the control's fields that are read."""
        return frozenset() if self.control_embedding is None else self.control_embedding.inputs

    def forward(self, timestep: torch.Tensor, conditions: Conditioning) -> TrunkOutput:
        """Embed the conditions of a batch; None is null. `timestep` is (batch,)."""
        conditions = self.with_nulls(conditions, timestep)
        e_time, (tokens, mask) = self.embed_time(timestep), self.tokens(conditions)
        if self.control_embedding is None:
            return e_time, tokens, mask
        e_high, gamma, e_low = self.control_embedding(conditions.control, timestep)
        if self.control_in_tokens:
            control_tokens = self.control_tokens.weight + torch.stack([e_high, gamma * e_low], dim=1)
            return e_time, *_appended(tokens, mask, control_tokens)
        # e(t, c) = e_time(t) + E_h(φ_h) + γ_c(t) · E_l(φ_l)
        return e_time + (e_high + gamma * e_low), tokens, mask


def _appended(
    tokens: torch.Tensor | None, mask: torch.Tensor | None, more: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Append `more` tokens (batch, n, token_dim), which are never masked, to tokens and their mask."""
    if tokens is None:
        return more, None
    if mask is not None:
        mask = nn.functional.pad(mask, (0, more.shape[1]), value=True)
    return torch.cat([tokens, more], dim=1), mask


def check_modes(config: Any):
    """Raise a ValueError if the mode or the control's route is unknown, or the mode does not support the route."""
    for name, valid in (("conditioning", get_args(ConditioningMode)), ("control_route", get_args(ControlRoute))):
        if config[name] not in valid:
            raise ValueError(f"`{name}` is {config[name]!r}; it must be {' or '.join(map(repr, valid))}.")
    if config.conditioning == "published" and config.control_route == "tokens":
        raise ValueError("`control_route` is 'tokens'; it must be 'norm' in the 'published' mode.")
