"""Prompts, their embeds or class labels as the semantic conditions of a denoiser."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from improved_ldm.conditioning.conditions import Conditioning
from improved_ldm.conditioning.text import TextTokens, encode_prompts, own_positions, pad_tokens
from improved_ldm.conditioning.values import (
    is_sequence,
    read_integer,
    read_number,
    read_per_sample,
    read_texts,
    refuse,
)
from improved_ldm.models.active_adapters import scaled_adapters
from improved_ldm.sampling.arguments import MAX_IMAGES, MAX_SCALE, Generators, read_labels

TEXT_INPUTS = frozenset({"encoder_hidden_states", "pooled_projections"})

Text = list[str] | TextTokens


@dataclass(frozen=True)
class Semantics:
    """The checked semantic arguments of a call.

    Args:
        positive: Class labels, prompts or encoded prompts.
        negative: Prompts or encoded prompts to guide away from; None is the null condition.
    """

    positive: list[int] | Text
    negative: Text | None = None

    def __len__(self) -> int:
        return len(self.positive)

    @property
    def labels(self) -> list[int] | None:
        """The class labels, or None for prompts."""
        positive = self.positive
        return positive if isinstance(positive, list) and isinstance(positive[0], int) else None


class PromptMixin:
    """The part of the pipeline that reads and encodes prompts and classes."""

    @property
    def takes_text(self) -> bool:
        """Whether the denoiser reads prompts."""
        return bool(TEXT_INPUTS & self.denoiser.inputs)

    @property
    def semantic_argument(self) -> str:
        """Name of the semantic argument: `prompt`, or `class_labels` for a class-conditional model."""
        return "prompt" if self.takes_text else "class_labels"

    def class_name(self, label: int) -> str:
        """The name of a class, or its number if the pipeline has no names."""
        names = self.config.class_names
        return names[label] if names else f"class {label}"

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        prompt_attention_mask: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        device: torch.device | str | None = None,
        lora_scale: float = 1.0,
    ) -> tuple[torch.Tensor | None, ...]:
        """Encode prompts once, to sample from them repeatedly, mixed or weighted, or without a text encoder.

        Pass the results to the pipeline's call under the names that they have here; the images are the same as from
        the prompts. If the mask is given, the call adds the noise of the noisy replicate padding.

        Args:
            prompt: One or several prompts.
            negative_prompt: Prompts to guide away from; default: the null prompt, whose rows are NaN.
            num_images_per_prompt: Copies of each row; keep 1 to repeat them in the call instead.
            do_classifier_free_guidance: Whether the negative results are computed; otherwise they are None.
            prompt_embeds: Embeds in place of `prompt`; they are only repeated, like the other embeds and masks.
            negative_prompt_embeds: Embeds in place of `negative_prompt`.
            pooled_prompt_embeds: Pooled embeds that belong to `prompt_embeds`.
            negative_pooled_prompt_embeds: Pooled embeds that belong to `negative_prompt_embeds`.
            prompt_attention_mask: Mask that belongs to `prompt_embeds`.
            negative_prompt_attention_mask: Mask that belongs to `negative_prompt_embeds`.
            device: Device of the results; default: the device of the pipeline's computation.
            lora_scale: Strength of the text encoder's adapters.

        Returns:
            `prompt_embeds` (prompts, tokens, text_dim), `negative_prompt_embeds`, `pooled_prompt_embeds` (prompts,
            pooled_dim), `negative_pooled_prompt_embeds`, `prompt_attention_mask` (prompts, tokens) bool, True at the
            prompt's own tokens, and `negative_prompt_attention_mask`.

        Raises:
            ValueError: If arguments contradict each other or the model, or have wrong shapes.
        """
        num_images_per_prompt = read_integer("num_images_per_prompt", num_images_per_prompt, 1, MAX_IMAGES)
        embeds = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
            "prompt_attention_mask": prompt_attention_mask,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
        }
        semantics = self.read_semantics(prompt, negative_prompt, None, embeds)
        device = device or self._execution_device
        lora_scale = read_number("lora_scale", lora_scale, -MAX_SCALE, MAX_SCALE)
        with scaled_adapters([self.text_encoder], lora_scale):
            positive = self._encoded(semantics.positive, num_images_per_prompt).to(device)
            negative = TextTokens(None, None, None)
            if do_classifier_free_guidance:
                has_negative = semantics.negative is not None
                negative = (
                    self._encoded(semantics.negative, num_images_per_prompt) if has_negative else positive.null()
                )
                negative = negative.to(device)
        prompt_embeds, prompt_attention_mask, pooled_prompt_embeds = vars(positive).values()
        negative_prompt_embeds, negative_prompt_attention_mask, negative_pooled_prompt_embeds = vars(negative).values()
        return (
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            prompt_attention_mask,
            negative_prompt_attention_mask,
        )

    def read_semantics(
        self, prompt: Any, negative_prompt: Any, class_labels: Any, embeds: dict[str, torch.Tensor | None]
    ) -> Semantics:
        """Read and check the semantic arguments of a call: a prompt, class labels or embeds.

        Args:
            prompt: One or several strings.
            negative_prompt: One or several strings.
            class_labels: One or several integers or names.
            embeds: Results of `encode_prompt`, by name.

        Raises:
            ValueError: If arguments contradict each other or the model, or have wrong shapes.
        """
        embeds = {name: value for name, value in embeds.items() if value is not None}
        positive = {name: value for name, value in embeds.items() if not name.startswith("negative_")}
        negative = {name.removeprefix("negative_"): embeds[name] for name in embeds if name not in positive}
        given = [name for name, value in (("prompt", prompt), ("class_labels", class_labels)) if value is not None]
        given += list(positive)[:1]
        negatives = ["negative_prompt"] if negative_prompt is not None else []
        negatives += [f"negative_{name}" for name in negative][:1]
        if len(given) != 1:
            both = f"{' and '.join(f'`{name}`' for name in given)} are both given" if given else "neither is given"
            raise ValueError(f"give a `prompt`, `prompt_embeds` or `class_labels`; {both}.")
        if len(negatives) > 1:
            raise ValueError(f"`{negatives[0]}` and `{negatives[1]}` are both given; give one.")
        self._check_kind(given[0], next(iter(negatives), None))

        if class_labels is not None:
            return Semantics(read_labels(class_labels, self.denoiser.config.num_classes, self.config.class_names))
        text = read_texts("prompt", prompt) if prompt is not None else self._read_embeds(positive)
        length = self.config.max_text_tokens
        num_tokens = positive["prompt_embeds"].shape[1] if "prompt_embeds" in positive else length
        if negative:
            return Semantics(text, self._read_embeds(negative, "negative_", len(text), num_tokens))
        if negative_prompt is not None and num_tokens != length:
            raise ValueError(
                f"`negative_prompt` is encoded to {length} tokens, but `prompt_embeds` has {num_tokens}; "
                "give `negative_prompt_embeds`."
            )
        return Semantics(text, None if negative_prompt is None else _read_negative_prompt(negative_prompt, len(text)))

    def _check_kind(self, positive: str, negative: str | None):
        """Raise a ValueError if arguments with these names do not fit the model or the pipeline's components."""
        if positive == "class_labels":
            if negative is not None:
                raise ValueError(f"`{negative}` is given, but it needs a `prompt` or `prompt_embeds`.")
            if self.denoiser.config.num_classes is None:
                raise ValueError("`class_labels` is given, but the model is text-conditional: give a `prompt`.")
            return
        if self.denoiser is not None and not self.takes_text:
            raise ValueError(f"`{positive}` is given, but the model is class-conditional: give `class_labels`.")
        for name in {positive, negative} & {"prompt", "negative_prompt"}:
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError(
                    f"`{name}` is given, but the pipeline has no `text_encoder` and `tokenizer`: give `{name}_embeds`."
                )

    def _read_embeds(
        self,
        given: dict[str, Any],
        prefix: str = "",
        batch_size: int | None = None,
        num_tokens: int | None = None,
    ) -> TextTokens | None:
        """Encoded prompts, from the tensors of a call; None if negative ones are the null prompt.

        Args:
            given: Tensors by their names without the prefix.
            prefix: `negative_` or empty.
            batch_size: Required number of rows; default: that of the first tensor.
            num_tokens: Required number of tokens; default: that of `prompt_embeds`.
        """
        widths = self._widths_of_embeds()
        missing = [name for name in widths if name not in given]
        if "prompt_attention_mask" in given and "prompt_embeds" not in given:
            missing.append("prompt_embeds")
        if missing:
            raise ValueError(f"`{prefix}{next(iter(given))}` is given without `{prefix}{missing[0]}`, which it needs.")
        first, embeds = next(iter(given.values())), given.get("prompt_embeds")
        batch_size = batch_size or (len(first) if getattr(first, "ndim", 0) else None)
        num_tokens = num_tokens or (embeds.shape[1] if getattr(embeds, "ndim", 0) == 3 else None)
        shapes = {
            "prompt_embeds": (batch_size, num_tokens, widths.get("prompt_embeds")),
            "pooled_prompt_embeds": (batch_size, widths.get("pooled_prompt_embeds")),
            "prompt_attention_mask": (batch_size, num_tokens),
        }
        for name, value in given.items():
            _check_tensor(prefix + name, value, shapes[name], null_is_valid=bool(prefix))
        self._check_num_tokens(num_tokens)
        mask = given.get("prompt_attention_mask")
        tokens = TextTokens(embeds, None if mask is None else mask.bool(), given.get("pooled_prompt_embeds"))
        return None if tokens.is_null() else tokens

    def _widths_of_embeds(self) -> dict[str, int]:
        """Channels of the embeds that the denoiser reads, by name."""
        if self.denoiser is None:
            return {}
        read, config = self.denoiser.inputs, self.denoiser.config
        widths = {
            "prompt_embeds": ("encoder_hidden_states", "text_dim"),
            "pooled_prompt_embeds": ("pooled_projections", "pooled_dim"),
        }
        return {name: config[key] for name, (condition, key) in widths.items() if condition in read}

    def _check_num_tokens(self, num_tokens: int | None):
        """Raise a ValueError if there are more tokens than in a null prompt that has one token per position."""
        null_text = None if self.denoiser is None else self.denoiser.trunk.null_text
        if num_tokens is not None and null_text is not None and 1 < len(null_text) < num_tokens:
            raise ValueError(f"`prompt_embeds` has {num_tokens} tokens; the model reads at most {len(null_text)}.")

    def _encoded(self, text: Text, repeats: int) -> TextTokens:
        """Encoded prompts, each row repeated, the prompt's own tokens first, with padding that has no noise yet."""
        if not isinstance(text, TextTokens):
            device = self._execution_device
            length = self.config.max_text_tokens
            tokens = encode_prompts(text, self.tokenizer, self.text_encoder, length, device)
            padding = self.config.text_padding.removeprefix("noisy_")
            text = TextTokens(pad_tokens(tokens, padding)[0], own_positions(tokens.attention_mask), tokens.pooled)
        return text.rows(torch.arange(len(text)).repeat_interleave(repeats))

    def _condition(self, text: Text, repeats: int, generator: Generators) -> Conditioning:
        """The condition of a text, padded as the pipeline is configured."""
        tokens = self._encoded(text, repeats).to(self._execution_device)
        if tokens.hidden_states is None:
            return Conditioning(pooled_projections=tokens.pooled)
        if tokens.attention_mask is None:
            every = torch.ones_like(tokens.hidden_states[..., 0], dtype=torch.bool)
            tokens = replace(tokens, attention_mask=every)
        padded, mask = pad_tokens(tokens, self.config.text_padding, self.config.text_noise_scale, generator)
        return Conditioning(padded, mask, tokens.pooled).only(self.denoiser.inputs)

    def semantic_conditions(
        self, semantics: Semantics, num_images_per_prompt: int, generator: Generators
    ) -> tuple[Conditioning, Conditioning]:
        """The positive and the negative condition of all images, without control.

        Args:
            semantics: Checked semantic arguments.
            num_images_per_prompt: Images per prompt or class label.
            generator: Generator of the noise for noisy replicate padding, one for all images or one per image.
        """
        if semantics.labels is not None:
            positive = Conditioning(
                class_labels=torch.tensor(semantics.labels).repeat_interleave(num_images_per_prompt)
            )
        else:
            positive = self._condition(semantics.positive, num_images_per_prompt, generator)
        if semantics.negative is None:
            return positive, positive.without_semantic(self.denoiser.config.num_classes, self.denoiser.null_keeps_mask)
        return positive, self._condition(semantics.negative, num_images_per_prompt, generator)


def _read_negative_prompt(negative_prompt: Any, batch_size: int) -> list[str]:
    """One negative prompt per prompt, from one for all prompts or a sequence."""
    texts = read_texts("negative_prompt", negative_prompt)
    return read_per_sample("negative_prompt", texts if is_sequence(negative_prompt) else texts[0], batch_size)


def _check_tensor(name: str, value: Any, shape: tuple[int | None, ...], null_is_valid: bool):
    """Raise a ValueError if a value is not a tensor of this shape, or has values that are not finite.

    Args:
        name: Name of the argument.
        value: Embeds or a mask.
        shape: Shape of the tensor, None for any size.
        null_is_valid: Whether a row of NaN is the null prompt.
    """
    is_mask = name.endswith("mask")
    wanted = f"a{'' if is_mask else ' floating'} torch.Tensor of shape ({', '.join(str(n or 'any') for n in shape)})"
    if not isinstance(value, torch.Tensor) or not (is_mask or value.is_floating_point()):
        refuse(name, value, wanted)
    fits = value.ndim == len(shape) and all(n in (None, size) for n, size in zip(shape, value.shape, strict=True))
    if not fits or not value.numel():
        raise ValueError(f"`{name}` is of shape {tuple(value.shape)}; it must be {wanted}.")
    valid = value.isfinite() if not is_mask else (value == 0) | (value == 1)
    if null_is_valid and not is_mask:
        valid = valid | value.isnan().all(-1, keepdim=True)
    if not valid.all():
        raise ValueError(f"`{name}` has values that are {'not 0 or 1' if is_mask else 'NaN or infinite'}.")
