"""CLIP pairs with new weights, and their tokenizers, whose words are learned from captions."""

import json
from collections.abc import Iterable, Sequence

from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from improved_ldm.data.token_counts import TokenCounts
from improved_ldm.trainer.network_config import ClipConfig

CLIP_TOKENS = 77  # of the published models
CUT_SHARE = 0.01  # of the captions, by default

Merges = Sequence[tuple[str, str]]


def learn_merges(captions: Iterable[str], max_merges: int) -> Merges:
    """The pairs of word parts that a byte-level BPE tokenizer joins, the most frequent ones of captions first."""
    blank = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=512 + max_merges, end_of_word_suffix="</w>", show_progress=False)
    blank.train_from_iterator(captions, trainer)
    return [tuple(merge) for merge in json.loads(blank.to_str())["model"]["merges"]]


def make_tokenizer(merges: Merges, max_tokens: int = CLIP_TOKENS) -> CLIPTokenizer:
    """CLIP's byte-level BPE tokenizer with given merges; any other text falls back to bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]  # the end has the highest index, as in CLIP
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(map(tuple, merges)), model_max_length=max_tokens)


def fitting_max_tokens(counts: TokenCounts) -> int:
    """The number of tokens at which `CUT_SHARE` of the captions are cut, at most that of CLIP."""
    return min(CLIP_TOKENS, counts.quantile(1 - CUT_SHARE))


def build_clip(config: ClipConfig, tokenizer: CLIPTokenizer, resolution: int) -> CLIPModel:
    """A CLIP pair of the configured size with new weights.

    Args:
        config: its sizes.
        tokenizer: its tokenizer, which has the number of tokens per caption.
        resolution: side length of its images, pixels.
    """
    width, dim = config.width, config.projection_dim
    tower = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=config.heads, projection_dim=dim)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = dict(
        num_hidden_layers=config.text_layers,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
    )
    vision = dict(num_hidden_layers=config.vision_layers, image_size=resolution, patch_size=config.patch_size)
    return CLIPModel(CLIPConfig(text_config=tower | text | special, vision_config=tower | vision, projection_dim=dim))


def image_processor(resolution: int) -> CLIPImageProcessor:
    """Scales and crops images to the resolution, pixels to [-1, 1]."""
    half, crop = [0.5] * 3, {"height": resolution, "width": resolution}
    return CLIPImageProcessor(size={"shortest_edge": resolution}, crop_size=crop, image_mean=half, image_std=half)
