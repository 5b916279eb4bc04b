"""Train a small contrastive text-and-image pair (CLIP) on captioned images.

The folder it writes loads with `CLIPModel`, `CLIPTextModel`, `CLIPTokenizer` and `CLIPImageProcessor`. The text tower
can condition a denoiser; the pair can score how well samples follow their prompts.

Usage: accelerate launch training/train_clip.py --output_dir runs/clip
"""

import itertools
import json
import sys

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from improved_ldm.bounds import (
    BatchSize,
    Count,
    Depth,
    LocalPath,
    NotNegative,
    Pixels,
    Place,
    Positive,
    Seed,
    Share,
    Text,
    Width,
)
from improved_ldm.data.loader import make_loader, make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.exits import exit_on_error
from improved_ldm.naming import naming_keys
from improved_ldm.provenance import write_json
from improved_ldm.settings import Section, parse_config_or_exit
from improved_ldm.trainer.launcher import open_accelerator
from improved_ldm.trainer.nonfinite import check_weights


class Config(Section):
    """Settings of a run. `data` is anything that `open_rows` takes."""

    output_dir: LocalPath
    """Folder to save the model in."""
    data: Place = "embedded:fashion-mnist"
    """Captioned images: an embedded set, a Hub id, a file or a folder."""
    test_split: Text = "test"
    """Split of the set for the final measurements."""
    label_column: Text | None = "label"
    """Column of labels; samples with the same label match each other, or with null, those with the same caption."""
    resolution: Pixels = 32
    """Side length of images, in pixels."""
    patch_size: Pixels = 8
    """Side length of a patch, in pixels."""
    width: Width = 96
    """Width of both towers."""
    heads: Width = 4
    """Attention heads per layer."""
    text_layers: Depth = 2
    """Layers of the text tower."""
    vision_layers: Depth = 4
    """Layers of the image tower."""
    projection_dim: Width = 64
    """Width of the shared embedding."""
    max_tokens: Width = 16
    """Tokens per prompt, including its start and end."""
    max_merges: Count = 2048
    """Largest number of words and word parts that the tokenizer learns."""
    min_crop: Share = 0.8
    """Side length of the smallest crop, as a fraction of the largest square."""
    batch_size: BatchSize = 64
    """Images per process and step."""
    steps: Count = 1600
    """Optimizer steps."""
    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay."""
    seed: Seed = 0
    """Seed of weights and data order."""


def train_tokenizer(captions: list[str], max_merges: int, max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE tokenizer, with merges learned from captions; any other text falls back to bytes."""
    blank = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=512 + max_merges, end_of_word_suffix="</w>", show_progress=False)
    blank.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(blank.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]  # the end has the highest index, as in CLIP
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def build_model(config: Config, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP model of the configured size with new weights."""
    width, dim = config.width, config.projection_dim
    tower = dict(hidden_size=width, intermediate_size=4 * width, num_attention_heads=config.heads, projection_dim=dim)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = dict(
        num_hidden_layers=config.text_layers, vocab_size=len(tokenizer), max_position_embeddings=config.max_tokens
    )
    vision = dict(num_hidden_layers=config.vision_layers, image_size=config.resolution, patch_size=config.patch_size)
    return CLIPModel(CLIPConfig(text_config=tower | text | special, vision_config=tower | vision, projection_dim=dim))


def image_processor(resolution: int) -> CLIPImageProcessor:
    """Scales and crops images to the resolution, pixels to [-1, 1]."""
    half, crop = [0.5] * 3, {"height": resolution, "width": resolution}
    return CLIPImageProcessor(size={"shortest_edge": resolution}, crop_size=crop, image_mean=half, image_std=half)


def contrastive_loss(logits_per_text: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """CLIP's symmetric loss, in which all samples of a group match each other.

    Args:
        logits_per_text: (batch, batch) scaled similarities.
        groups: (batch,) int; samples with equal numbers match each other.

    Source: Khosla et al. 2020, supervised contrastive learning, applied to CLIP's logits.
    """
    matches = (groups[:, None] == groups).float()
    targets = matches / matches.sum(1, keepdim=True)
    return (F.cross_entropy(logits_per_text, targets) + F.cross_entropy(logits_per_text.T, targets)) / 2


def match_groups(batch: dict) -> torch.Tensor:
    """(batch,) numbers that are equal for samples that match: their labels, or else the index of their caption."""
    if "label" in batch:
        return batch["label"]
    index = {caption: number for number, caption in enumerate(dict.fromkeys(batch["caption"]))}
    return torch.tensor([index[caption] for caption in batch["caption"]])


@torch.no_grad()
def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer, config: Config) -> dict[str, float]:
    """Share of 2000 test images whose nearest caption, among those of all these images, matches them."""
    with naming_keys(source="data", split="test_split"):
        rows = open_rows(config.data, split=config.test_split, label_column=config.label_column)
    loader = make_pass(rows, ImageTransform(config.resolution), batch_size=2000)
    batch = next(iter(loader))
    groups = match_groups(batch)
    captions = dict(zip(batch["caption"], groups, strict=True))
    inputs = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    nearest = model(**inputs, pixel_values=pixel_values(batch["pixels"])).logits_per_image.argmax(1)
    return {"accuracy": (torch.stack(list(captions.values()))[nearest] == groups).float().mean().item()}


def main(config: Config):
    accelerator = open_accelerator()
    set_seed(config.seed)
    with naming_keys(source="data"):
        rows = open_rows(config.data, label_column=config.label_column)
    accelerator.print(rows.description)
    tokenizer = train_tokenizer(list(rows.captions()), config.max_merges, config.max_tokens)
    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, (0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    steps = config.steps * accelerator.num_processes  # the scheduler steps once per process
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    transform = ImageTransform(
        config.resolution, "crop_then_resize", "random", min_crop=config.min_crop, flip_probability=0.5
    )
    rank = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, transform, config.batch_size, config.seed, **rank)
    for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
        inputs = tokenizer(batch["caption"], padding="max_length", truncation=True, return_tensors="pt")
        inputs["pixel_values"] = pixel_values(batch["pixels"])
        logits = model(**inputs.to(accelerator.device)).logits_per_text
        loss = contrastive_loss(logits, match_groups(batch).to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            check_weights(model, step)
            accelerator.print(f"step {step} of {config.steps}: loss {loss.item():.4f}")

    check_weights(model, config.steps)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model).cpu().eval()
        for part in (model, tokenizer, image_processor(config.resolution)):
            part.save_pretrained(config.output_dir)
        metrics = evaluate(model, tokenizer, config)
        accelerator.print(metrics)
        write_json(config.output_dir / "metrics.json", metrics)


if __name__ == "__main__":
    with exit_on_error("not trained", "batch_size"):
        main(parse_config_or_exit(Config, sys.argv[1:]))
