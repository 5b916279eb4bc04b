"""From prompts to a token sequence of fixed length, and what stands where a prompt is shorter than that."""

import warnings
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TextPadding = Literal["zero", "mask", "replicate", "noisy_replicate"]


@dataclass(frozen=True)
class TextTokens:
    """A batch of encoded prompts as the text encoder gives them, before padding is decided.

    Args:
        hidden_states: (batch, tokens, text_dim).
        attention_mask: (batch, tokens) bool, True at the prompt's own tokens.
        pooled: (batch, pooled_dim), one vector a prompt.
    """

    hidden_states: torch.Tensor
    attention_mask: torch.Tensor
    pooled: torch.Tensor

    def _map(self, function) -> "TextTokens":
        return TextTokens(*(function(value) for value in (self.hidden_states, self.attention_mask, self.pooled)))

    def rows(self, index: torch.Tensor) -> "TextTokens":
        """The prompts at these places, (any number,) int."""
        return self._map(lambda value: value[index.to(value.device)])

    def to(self, device: torch.device | str) -> "TextTokens":
        """The tokens on a device."""
        return self._map(lambda value: value.to(device))

    @classmethod
    def concatenate(cls, parts: "list[TextTokens]") -> "TextTokens":
        """One batch out of several, in order."""
        return cls(*(torch.cat(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def encode_prompts(
    prompts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    text_encoder: PreTrainedModel,
    max_length: int,
    device: torch.device | str | None = None,
) -> TextTokens:
    """Encode prompts with any Hugging Face text encoder (CLIP, T5, BERT and their like).

    Gradients reach an encoder in training mode; one in evaluation mode keeps none.

    Args:
        prompts: the texts; what exceeds `max_length` tokens is cut, with a warning.
        tokenizer: the encoder's tokenizer.
        text_encoder: a model whose output has `last_hidden_state`.
        max_length: L, tokens a prompt.
        device: where the encoder computes, if that is not where its weights lie (offloading).

    Returns:
        Tokens of shape (len(prompts), `max_length`, text_dim), each distinct prompt encoded once. The pooled vector is
        the encoder's own (`text_embeds` or `pooler_output`) or, where it has none, the mean over the prompt's tokens.
    """
    prompts, index = unique_prompts(prompts)
    longest = max(len(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"])
    if longest > max_length:  # said once a length, for captions by the million are cut alike
        warnings.warn(f"prompts of more than {max_length} tokens are cut to {max_length}", stacklevel=2)
    inputs = tokenizer(prompts, padding="max_length", max_length=max_length, truncation=True, return_tensors="pt")
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
    """Each prompt once, and for every given prompt its place among those, (len(prompts),) int."""
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    return list(places), torch.tensor([places[prompt] for prompt in prompts])


def pad_tokens(
    tokens: TextTokens,
    padding: TextPadding,
    noise_scale: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Decide what stands behind the last token of a prompt that is shorter than the sequence.

    `zero`: zero vectors that attention reads. `mask`: zero vectors that attention does not read. `replicate`: the
    prompt's tokens again, cyclically. `noisy_replicate`: the same, the copies perturbed by Gaussian noise of standard
    deviation `noise_scale` · sqrt(m − 1) · σ_channel, where the prompt is repeated m times to fill the sequence and
    σ_channel is the deviation of each channel over the prompt's tokens. A prompt without a token of its own counts
    its first position as one.

    Args:
        tokens: the encoded prompts.
        padding: one of the four modes.
        noise_scale: β_txt, for `noisy_replicate`.
        generator: source of the noise, one for all or one a sample.

    Returns:
        The padded tokens (batch, tokens, text_dim), the prompt's own first and unchanged, and the (batch, tokens)
        bool mask that attention needs, or None where every token counts.

    Raises:
        ValueError: for an unknown mode or a negative `noise_scale`.

    Source: Berrada et al., 2024.
    """
    if padding not in get_args(TextPadding):
        raise ValueError(f"`padding` is {padding!r}; it must be one of {', '.join(get_args(TextPadding))}.")
    if noise_scale < 0:
        raise ValueError(f"`noise_scale` is {noise_scale}; it must be ≥ 0.")
    hidden_states, attention_mask = tokens.hidden_states, tokens.attention_mask
    length = hidden_states.shape[1]
    position = torch.arange(length, device=hidden_states.device)
    own_first = torch.argsort((~attention_mask).int(), dim=1, stable=True)  # encoders that pad on the left
    hidden_states = hidden_states.gather(1, own_first[..., None].expand_as(hidden_states))
    count = attention_mask.sum(1).clamp(min=1)[:, None]  # (batch, 1), n own tokens
    is_own = position < count  # (batch, tokens)

    if padding in ("zero", "mask"):
        padded = hidden_states.masked_fill(~is_own[..., None], 0)
        return padded, (is_own if padding == "mask" else None)

    cyclic = position % count  # (batch, tokens)
    padded = hidden_states.gather(1, cyclic[..., None].expand_as(hidden_states))
    if padding == "noisy_replicate":
        repeats = torch.ceil(length / count)  # (batch, 1), m
        deviation = noise_scale * (repeats - 1).sqrt()[..., None] * _channel_deviation(hidden_states.detach(), is_own)
        noise = randn_tensor(hidden_states.shape, generator=generator, device=hidden_states.device)
        padded = torch.where(is_own[..., None], padded, padded + (deviation * noise).to(padded.dtype))
    return padded, None


def _channel_deviation(hidden_states: torch.Tensor, is_own: torch.Tensor) -> torch.Tensor:
    """Standard deviation of every channel over a prompt's own tokens: (batch, 1, text_dim) float32."""
    own = is_own[..., None].float()
    count = own.sum(1, keepdim=True)
    mean = (hidden_states.float() * own).sum(1, keepdim=True) / count
    return (((hidden_states.float() - mean).square() * own).sum(1, keepdim=True) / count).sqrt()
