"""Train the judge: a small classifier of what an image shows and whether it is mirrored.

Usage: accelerate launch training/train_judge.py --output_dir runs/judge
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

from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.evaluation.judge import Judge
from improved_ldm.trainer.config import parse_config_or_exit


class Config(BaseModel):
    """What a run is made of. `data` is anything that `open_rows` takes, with integer labels."""

    model_config = ConfigDict(extra="forbid")

    output_dir: Path
    data: str = "embedded:fashion-mnist"
    test_split: str = "test"
    label_column: str = "label"
    num_classes: int = 10
    resolution: int = 32  # pixels
    widths: tuple[int, ...] = (16, 32, 64, 128)
    min_crop: float = 0.85  # smallest crop, fraction of the image
    one_sided: tuple[int, ...] = (5, 7, 9)  # classes that look one way in the data: sandals, sneakers, ankle boots
    batch_size: int = 64  # of one process; each image comes with its mirror image
    steps: int = 1200
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    seed: int = 0


def with_mirror_images(batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, labels and orientations of a batch and of its mirror images."""
    pixels = torch.cat([batch["pixels"], batch["pixels"].flip(-1)])
    flips = torch.arange(2).repeat_interleave(len(batch["label"]))
    return pixels, batch["label"].repeat(2), flips


@torch.no_grad()
def evaluate(judge: Judge, config: Config) -> dict[str, float]:
    """Accuracy of the class on the test split and its mirror images, and of the orientation where there is one."""
    rows = open_rows(config.data, split=config.test_split, label_column=config.label_column)
    transform = ImageTransform(config.resolution)
    batches = make_loader(rows, transform, batch_size=250, shuffle_window=0, repeat=False)
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
    accelerator = Accelerator()
    set_seed(config.seed)
    judge = Judge(config.num_classes, config.resolution, config.widths, config.data, config.one_sided)
    optimizer = torch.optim.AdamW(judge.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    steps = config.steps * accelerator.num_processes  # the scheduler steps once a process
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, steps, pct_start=0.1)
    judge, optimizer, scheduler = accelerator.prepare(judge, optimizer, scheduler)

    rows = open_rows(config.data, label_column=config.label_column)
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
            accelerator.print(f"step {step} of {config.steps}: loss {loss.item():.4f}")

    if accelerator.is_main_process:
        judge = accelerator.unwrap_model(judge).cpu().eval()
        judge.save_pretrained(config.output_dir)
        metrics = evaluate(judge, config)
        accelerator.print(metrics)
        (config.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_config_or_exit(Config, sys.argv[1:]))
