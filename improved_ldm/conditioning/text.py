"""Encoding of prompts into token sequences of a fixed length, and the padding of shorter prompts."""

import math
import warnings
from dataclasses import dataclass
from threading import Lock
from typing import Literal, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

TextPadding = Literal["zero", "mask", "replicate", "noisy_replicate"]

TOKENIZING = Lock()  # a tokenizer stores truncation and padding as state, and pipelines share tokenizers


@dataclass(frozen=True)
class TextTokens:
    """A batch of encoded prompts as the text encoder returns them, before `pad_tokens`; missing outputs are None.

    Args:
        hidden_states: (batch, tokens, text_dim).
        attention_mask: (batch, tokens) bool, True at the prompt's own tokens.
        pooled: (batch, pooled_dim), one vector per prompt.
    """

    hidden_states: torch.Tensor | None
    attention_mask: torch.Tensor | None
    pooled: torch.Tensor | None

    def __len__(self) -> int:
        return len(self.pooled if self.hidden_states is None else self.hidden_states)

    def _map(self, function) -> "TextTokens":
        values = (self.hidden_states, self.attention_mask, self.pooled)
        return TextTokens(*(None if value is None else function(value) for value in values))

    def rows(self, index: torch.Tensor) -> "TextTokens":
        """The prompts at these indices, (any number,) int."""
        return self._map(lambda value: value[index.to(value.device)])

    def null(self) -> "TextTokens":
        """The null prompt in the same shape: NaN, with a mask that is all True."""
        return self._map(lambda value: torch.full_like(value, True if value.dtype == torch.bool else torch.nan))

    def is_null(self) -> bool:
        """Whether every row is the null prompt."""
        embeds = [value for value in (self.hidden_states, self.pooled) if value is not None]
        return all(bool(value.isnan().all()) for value in embeds)

    def to(self, device: torch.device | str) -> "TextTokens":
        """Move the tokens to a device."""
        return self._map(lambda value: value.to(device))

    @classmethod
    def concatenate(cls, parts: "list[TextTokens]") -> "TextTokens":
        """Concatenate several batches, in order."""
        return cls(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def text_positions(config: PretrainedConfig) -> float:
    """The number of positions of a text encoder, from its config; infinity if it has no limit."""
    positions = getattr(config, "max_position_embeddings", None)
    return math.inf if positions is None else positions


def encode_prompts(
    prompts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    max_length: int,
    device: torch.device | str | None = None,
    warn: bool = True,
) -> TextTokens:
    """Encode prompts with any Hugging Face text encoder (CLIP, T5, BERT and similar).

    Gradients are computed only if the encoder is in training mode.

    Args:
        prompts: Prompts; those longer than `max_length` tokens are truncated.
        tokenizer: Tokenizer of the text encoder.
        text_encoder: Model whose output has `last_hidden_state`.
        max_length: L, tokens per prompt.
        device: Device of the computation, if it differs from the device of the weights (offloading).
        warn: Whether truncated prompts are warned of.

    Returns:
        Tokens of shape (len(prompts), `max_length`, text_dim); equal prompts are encoded once. The pooled vector is
        the encoder's own (`text_embeds` or `pooler_output`) or, if it has none, the mean over the prompt's tokens.
    """
    prompts, index = unique_prompts(prompts)
    with TOKENIZING:
        inputs = tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
        is_cut = warn and max(len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]) > max_length
    if is_cut:  # no prompt in the message, so that the warning appears once per length
        warnings.warn(f"prompts of more than {max_length} tokens are cut to {max_length}", stacklevel=2)
    inputs = inputs.to(device or text_encoder.device)
    mask = inputs.attention_mask.bool()
    with torch.set_grad_enabled(torch.is_grad_enabled() and text_encoder.training):
        output = text_encoder(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
    hidden_states = output.last_hidden_state
    pooled = getattr(output, "text_embeds", None)
    if pooled is None:
        pooled = getattr(output, "pooler_output", None)
    if pooled is None:
        weights = mask[..., None].to(hidden_states.dtype)
        pooled = (hidden_states * weights).sum(1) / weights.sum(1).clamp(min=1)
    return TextTokens(hidden_states, mask, pooled).rows(index)


def unique_prompts(prompts: list[str]) -> tuple[list[str], torch.Tensor]:
    """The distinct prompts, and for every given prompt its index among them, (len(prompts),) int."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return list(places), torch.tensor([places[prompt] for prompt in prompts])


def pad_tokens(
    tokens: TextTokens,
    padding: TextPadding,
    noise_scale: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fill the positions after the last token of prompts that are shorter than the sequence.

    `zero`: zero vectors that attention reads. `mask`: zero vectors that attention does not read. `replicate`: the
    prompt's tokens again, cyclically. `noisy_replicate`: the same, with Gaussian noise added to the copies. Its
    standard deviation is `noise_scale` · sqrt(m − 1) · σ_channel, where the prompt is repeated m times to fill the
    sequence and σ_channel is the deviation of each channel over the prompt's tokens. If a prompt has no token of its
    own, its first position counts as one.

    Args:
        tokens: Encoded prompts.
        padding: One of the four modes.
        noise_scale: β_txt, for `noisy_replicate`.
        generator: Generator of the noise, one for all samples or one per sample.
        noise: (batch, tokens, text_dim) standard normal numbers, used in place of the generator.

    Returns:
        The padded tokens (batch, tokens, text_dim), the prompt's own first and unchanged, and the (batch, tokens)
        bool mask for attention, or None to attend to every token.

    Raises:
        ValueError: If the mode is unknown, or `noise_scale` is negative.

    Source: Berrada et al., 2024; the amount of noise is our reading.
    """
    if padding not in get_args(TextPadding):
        raise ValueError(f"`padding` is {padding!r}; it must be one of {', '.join(get_args(TextPadding))}.")
    if noise_scale < 0:
        raise ValueError(f"`noise_scale` is {noise_scale}; it must be ≥ 0.")
    hidden_states, attention_mask = tokens.hidden_states, tokens.attention_mask
    length = hidden_states.shape[1]
    position = torch.arange(length, device=hidden_states.device)
    own_first = torch.argsort((~attention_mask).int(), dim=1, stable=True)  # for encoders that pad on the left
    hidden_states = hidden_states.gather(1, own_first[..., None].expand_as(hidden_states))
    is_own = own_positions(attention_mask)
    count = is_own.sum(1, keepdim=True)  # (batch, 1), n own tokens

    if padding in ("zero", "mask"):
        padded = hidden_states.masked_fill(~is_own[..., None], 0)
        return padded, (is_own if padding == "mask" else None)

    cyclic = position % count  # (batch, tokens)
    padded = hidden_states.gather(1, cyclic[..., None].expand_as(hidden_states))
    if padding == "noisy_replicate":
        repeats = torch.ceil(length / count)  # (batch, 1), m
        deviation = noise_scale * (repeats - 1).sqrt()[..., None] * _channel_deviation(hidden_states.detach(), is_own)
        if noise is None:
            noise = randn_tensor(hidden_states.shape, generator=generator, device=hidden_states.device)
        padded = torch.where(is_own[..., None], padded, padded + (deviation * noise).to(padded.dtype))
    return padded, None


def own_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Mask of a prompt's own tokens when they come first: (batch, tokens) bool, at least one per prompt."""
    position = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return position < attention_mask.sum(1, keepdim=True).clamp(min=1)


def _channel_deviation(hidden_states: torch.Tensor, is_own: torch.Tensor) -> torch.Tensor:
    """Standard deviation of every channel over a prompt's own tokens: (batch, 1, text_dim) float32."""
    own = is_own[..., None].float()
    count = own.sum(1, keepdim=True)
    mean = (hidden_states.float() * own).sum(1, keepdim=True) / count
    return (((hidden_states.float() - mean).square() * own).sum(1, keepdim=True) / count).sqrt()
