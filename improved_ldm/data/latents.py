"""Samples that a denoiser trains on: latents, text tokens, class and control; encoded on the fly or cached."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from improved_ldm.autoencoder import encode_images
from improved_ldm.conditioning.text import TextTokens, encode_prompts
from improved_ldm.data.transforms import pixel_values


@dataclass(frozen=True)
class OwnTokens:
    """The prompts' own tokens alone, one prompt after the other, as a cache stores them.

    Args:
        hidden_states: (own tokens of all prompts, text_dim).
        counts: (batch,) int, number of own tokens of each prompt.
        pooled: (batch, pooled_dim).
        length: tokens per prompt when they are padded.
    """

    hidden_states: torch.Tensor
    counts: torch.Tensor
    pooled: torch.Tensor
    length: int

    def padded(self, device: torch.device | str) -> TextTokens:
        """The prompts on a device, with zeros after their own tokens."""
        states, counts, pooled = (
            value.to(device, non_blocking=True) for value in (self.hidden_states, self.counts, self.pooled)
        )
        mask = torch.arange(self.length, device=device) < counts[:, None]
        padded = states.new_zeros(*mask.shape, states.shape[1]).masked_scatter(mask[..., None], states)
        return TextTokens(padded, mask, pooled)


@dataclass(frozen=True)
class EncodedBatch:
    """A batch for the denoiser, before padding, noise and dropout, which change every time it is used.

    Args:
        latents: (batch, latent_channels, height, width).
        control: (batch, `NUM_CONTROL`) float32.
        text: tokens of the captions, for a text-conditional model; from a cache, only their own until `to`.
        class_labels: (batch,) int, for a class-conditional model.
    """

    latents: torch.Tensor
    control: torch.Tensor
    text: TextTokens | OwnTokens | None = None
    class_labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The batch as named tensors."""
        named = {"latents": self.latents, "control": self.control}
        if self.text is not None:
            named |= {f"text.{name}": value for name, value in vars(self.text).items()}
        if self.class_labels is not None:
            named["class_labels"] = self.class_labels
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, torch.Tensor]) -> "EncodedBatch":
        """The inverse of `tensors`."""
        text = {name.removeprefix("text."): value for name, value in named.items() if name.startswith("text.")}
        return cls(named["latents"], named["control"], TextTokens(**text) if text else None, named.get("class_labels"))

    def to(self, device: torch.device | str) -> "EncodedBatch":
        """The batch on a device; what was encoded or stored in half precision becomes float32 there."""
        whole = replace(self, text=self.text.padded(device)) if isinstance(self.text, OwnTokens) else self
        moved = {name: value.to(device, non_blocking=True) for name, value in whole.tensors().items()}
        return self.from_tensors(
            {name: value.float() if value.is_floating_point() else value for name, value in moved.items()}
        )


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes batches of images and captions.

    Args:
        vae: the autoencoder.
        tokenizer: tokenizer of the text encoder; None leaves captions out and keeps class labels.
        text_encoder: the text encoder, or None.
        max_tokens: L, tokens per prompt.
    """

    vae: ModelMixin
    tokenizer: PreTrainedTokenizerBase | None = None
    text_encoder: PreTrainedModel | None = None
    max_tokens: int = 77

    def __call__(self, batch: dict[str, Any]) -> EncodedBatch:
        """Encode a batch of `collate`."""
        latents = self.latents(batch["pixels"], batch["seed"])
        if self.text_encoder is None:
            return EncodedBatch(latents, batch["control"], class_labels=batch["label"])
        return EncodedBatch(latents, batch["control"], self.text(batch["caption"]))

    def latents(self, pixels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """(batch, latent_channels, height, width) of (batch, 3, height, width) uint8 pixels and (batch,) seeds."""
        return encode_images(self.vae, pixel_values(pixels.to(self.vae.device, non_blocking=True)), seeds=seeds)

    def text(self, captions: list[str]) -> TextTokens:
        """The tokens of captions; a run says before it begins how many captions are truncated."""
        return encode_prompts(captions, self.tokenizer, self.text_encoder, self.max_tokens, warn=False)


class EncodingLoader:
    """Encodes the batches of a loader one by one; resumable like the loader.

    Args:
        loader: loader from `make_loader`.
        encoder: encoder of the batches.
    """

    def __init__(self, loader, encoder: Callable[[dict[str, Any]], Any]):
        self.loader, self.encoder = loader, encoder

    def __iter__(self) -> Iterator[EncodedBatch]:
        for batch in self.loader:
            yield self.encoder(batch)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader."""
        return {"loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.loader.load_state_dict(state["loader"])
