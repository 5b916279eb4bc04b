"""Train the judge: a small classifier of what an image shows and whether it is mirrored.

Usage: accelerate launch training/train_judge.py --output_dir runs/judge
"""

import itertools
import sys
from typing import Annotated

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from pydantic import Field

from improved_ldm.bounds import (
    BatchSize,
    Classes,
    Count,
    CountOrZero,
    LocalPath,
    NotNegative,
    Pixels,
    Place,
    Positive,
    Probability,
    Seed,
    Share,
    Text,
    Width,
)
from improved_ldm.data.loader import make_loader, make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation.judge import Judge
from improved_ldm.exits import exit_on_error
from improved_ldm.naming import naming_keys
from improved_ldm.provenance import write_json
from improved_ldm.settings import Section, parse_config_or_exit
from improved_ldm.trainer.launcher import open_accelerator
from improved_ldm.trainer.nonfinite import check_weights


class Config(Section):
    """Settings of a run. `data` is anything that `open_rows` takes, with integer labels."""

    output_dir: LocalPath
    """Folder to save the judge in."""
    data: Place = "embedded:fashion-mnist"
    """Labelled images: an embedded set, a Hub id, a file or a folder."""
    test_split: Text = "test"
    """Split of the set for the final measurements."""
    label_column: Text = "label"
    """Column of the class labels."""
    num_classes: Classes = 10
    """Number of classes."""
    resolution: Pixels = 32
    """Side length of images, in pixels."""
    widths: Annotated[tuple[Width, ...], Field(min_length=1, max_length=10)] = (16, 32, 64, 128)
    """Channels per level."""
    min_crop: Share = 0.85
    """Side length of the smallest crop, as a fraction of the largest square."""
    one_sided: tuple[CountOrZero, ...] = (5, 7, 9)
    """Classes that face one way in the data: sandals, sneakers, ankle boots."""
    batch_size: BatchSize = 64
    """Images per process and step; each comes with its mirror image."""
    steps: Count = 1200
    """Optimizer steps."""
    learning_rate: Positive = 4e-3
    """Peak learning rate."""
    weight_decay: NotNegative = 0.05
    """Decoupled weight decay."""
    label_smoothing: Probability = 0.05
    """Share of the target that is spread over all classes."""
    seed: Seed = 0
    """Seed of weights and data order."""


def with_mirror_images(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, labels and orientations of a batch and of its mirror images."""
    pixels = pixel_values(torch.cat([batch["pixels"], batch["pixels"].flip(-1)]))
    flips = torch.arange(2).repeat_interleave(len(batch["label"]))
    return pixels, batch["label"].repeat(2), flips


@torch.no_grad()
def evaluate(judge: Judge, config: Config) -> dict[str, float]:
    """Accuracy of the class on the test split and its mirror images, and of the orientation for one-sided classes."""
    with naming_keys(source="data", split="test_split"):
        rows = open_rows(config.data, split=config.test_split, label_column=config.label_column)
    transform = ImageTransform(config.resolution)
    batches = make_pass(rows, transform, batch_size=250)
    class_hits, flip_hits = [], []
    for pixels, labels, flips in map(with_mirror_images, batches):
        judged_labels, judged_flips = judge.class_and_flip(pixels)
        class_hits.append(judged_labels == labels)
        flip_hits.append((judged_flips == flips)[torch.isin(labels, torch.tensor(config.one_sided))])
    return {
        "class_accuracy": torch.cat(class_hits).float().mean().item(),
        "orientation_accuracy": torch.cat(flip_hits).float().mean().item(),
    }


def main(config: Config):
    accelerator = open_accelerator()
    set_seed(config.seed)
    judge = Judge(config.num_classes, config.resolution, config.widths, config.data, config.one_sided)
    optimizer = torch.optim.AdamW(judge.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps = config.steps * accelerator.num_processes  # the scheduler steps once per process
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, pct_start=0.1)
    judge, optimizer, scheduler = accelerator.prepare(judge, optimizer, scheduler)

    with naming_keys(source="data"):
        rows = open_rows(config.data, label_column=config.label_column)
    accelerator.print(rows.description)
    transform = ImageTransform(config.resolution, "crop_then_resize", "random", min_crop=config.min_crop)
    rank = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    batches = make_loader(rows, transform, config.batch_size, config.seed, **rank)
    for step, batch in enumerate(itertools.islice(batches, config.steps), start=1):
        pixels, labels, flips = (value.to(accelerator.device) for value in with_mirror_images(batch))
        logits = judge(pixels).flatten(1)  # (2 · batch, 2 · num_classes)
        loss = F.cross_entropy(logits, 2 * labels + flips, label_smoothing=config.label_smoothing)
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            check_weights(judge, step)
            accelerator.print(f"step {step} of {config.steps}: loss {loss.item():.4f}")

    check_weights(judge, config.steps)
    if accelerator.is_main_process:
        judge = accelerator.unwrap_model(judge).cpu().eval()
        judge.save_pretrained(config.output_dir)
        metrics = evaluate(judge, config)
        accelerator.print(metrics)
        write_json(config.output_dir / "metrics.json", metrics)


if __name__ == "__main__":
    with exit_on_error("not trained", "batch_size"):
        main(parse_config_or_exit(Config, sys.argv[1:]))
