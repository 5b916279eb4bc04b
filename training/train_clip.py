"""Train a small contrastive text-and-image pair (CLIP) on captioned images.

The folder it writes loads with `CLIPModel`, `CLIPTextModel`, `CLIPTokenizer` and `CLIPImageProcessor`. The text tower
can condition a denoiser, the pair scores how well samples follow their prompts.

Usage: accelerate launch training/train_clip.py --output_dir runs/clip
"""

import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import BaseModel, ConfigDict
from tokenizers import pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, get_cosine_schedule_with_warmup

from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.trainer.config import parse_config_or_exit


class Config(BaseModel):
    """What a run is made of. `data` is anything that `open_rows` takes."""

    model_config = ConfigDict(extra="forbid")

    output_dir: Path
    data: str = "embedded:fashion-mnist"
    test_split: str = "test"
    label_column: str | None = "label"  # samples of one label match each other; without labels, equal captions do
    resolution: int = 32  # pixels
    patch_size: int = 8  # pixels
    width: int = 96
    heads: int = 4
    text_layers: int = 2
    vision_layers: int = 4
    projection_dim: int = 64
    max_tokens: int = 16  # of a prompt, with its start and its end
    max_merges: int = 2048  # words and word parts that the tokenizer learns
    min_crop: float = 0.8  # smallest crop, fraction of the image
    batch_size: int = 64  # of one process
    steps: int = 1600
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    seed: int = 0


def train_tokenizer(captions: list[str], max_merges: int, max_tokens: int) -> CLIPTokenizer:
    """CLIP's byte-level BPE tokenizer, its merges learned from captions; any other text falls back to bytes."""
    blank = CLIPTokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=512 + max_merges, end_of_word_suffix="</w>", show_progress=False)
    blank.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(blank.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]  # the end has the highest index, as CLIP's
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_tokens)


def build_model(config: Config, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP model of the configured size with fresh weights."""
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
    """CLIP's symmetric loss, where every pair of one group matches.

    Args:
        logits_per_text: (batch, batch) scaled similarities.
        groups: (batch,) int; samples of equal number match each other.

    Source: Khosla et al. 2020, supervised contrastive learning, applied to CLIP's logits.
    """
    matches = (groups[:, None] == groups).float()
    targets = matches / matches.sum(1, keepdim=True)
    return (F.cross_entropy(logits_per_text, targets) + F.cross_entropy(logits_per_text.T, targets)) / 2


def match_groups(batch: dict) -> torch.Tensor:
    """(batch,) numbers that are equal where samples match: their labels, or else the index of their caption."""
    if "label" in batch:
        return batch["label"]
    index = {caption: number for number, caption in enumerate(dict.fromkeys(batch["caption"]))}
    return torch.tensor([index[caption] for caption in batch["caption"]])


@torch.no_grad()
def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer, config: Config) -> dict[str, float]:
    """Share of 2000 test images whose nearest caption, of all their captions, is one that matches them."""
    rows = open_rows(config.data, split=config.test_split, label_column=config.label_column)
    loader = make_loader(rows, ImageTransform(config.resolution), batch_size=2000, shuffle_window=0, repeat=False)
    batch = next(iter(loader))
    groups = match_groups(batch)
    captions = dict(zip(batch["caption"], groups, strict=True))
    inputs = tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
    nearest = model(**inputs, pixel_values=batch["pixels"]).logits_per_image.argmax(1)
    return {"accuracy": (torch.stack(list(captions.values()))[nearest] == groups).float().mean().item()}


def main(config: Config):
    accelerator = Accelerator()
    set_seed(config.seed)
    rows = open_rows(config.data, label_column=config.label_column)
    captions = [row[rows.caption_column] for row in rows.dataset.select_columns(rows.caption_column)]
    tokenizer = train_tokenizer(captions, config.max_merges, config.max_tokens)
    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(
        model.parameters(), config.learning_rate, (0.9, 0.98), weight_decay=config.weight_decay, fused=True
    )
    steps = config.steps * accelerator.num_processes  # the scheduler steps once a process
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)

    transform = ImageTransform(
        config.resolution, "crop_then_resize", "random", min_crop=config.min_crop, flip_probability=0.5
    )
    rank = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, transform, config.batch_size, config.seed, **rank)
    for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
        inputs = tokenizer(batch["caption"], padding="max_length", truncation=True, return_tensors="pt")
        inputs["pixel_values"] = batch["pixels"]
        logits = model(**inputs.to(accelerator.device)).logits_per_text
        loss = contrastive_loss(logits, match_groups(batch).to(accelerator.device))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            accelerator.print(f"step {step} of {config.steps}: loss {loss.item():.4f}")

    if accelerator.is_main_process:
        model = accelerator.unwrap_model(model).cpu().eval()
        for part in (model, tokenizer, image_processor(config.resolution)):
            part.save_pretrained(config.output_dir)
        metrics = evaluate(model, tokenizer, config)
        accelerator.print(metrics)
        (config.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_config_or_exit(Config, sys.argv[1:]))
