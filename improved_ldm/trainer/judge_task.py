"""The training of a judge: its loss on images and their mirror images, and how often it is right."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from improved_ldm.data.transforms import pixel_values
from improved_ldm.evaluation.judge import Judge
from improved_ldm.trainer.network_config import JudgeRunConfig
from improved_ldm.trainer.network_task import Images, Measured, NetworkTask
from improved_ldm.trainer.nonfinite import pass_nonfinite_to_gradient
from improved_ldm.trainer.randomness import ImageRandomness
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.task import Samples


class JudgeTask(NetworkTask):
    """The training of a new judge.

    Args:
        config: configuration of the run.
        num_classes: number of classes.
    """

    model: Judge

    def __init__(self, config: JudgeRunConfig, num_classes: int):
        resolution, sets = config.transform.resolution, ", ".join(config.data.places)
        judge = Judge(num_classes, resolution, config.judge.widths, sets, config.judge.one_sided)
        super().__init__(judge, resolution)
        self.label_smoothing, self.one_sided = config.judge.label_smoothing, torch.tensor(config.judge.one_sided)

    def samples(self, batch: dict[str, Any]) -> Samples:
        return Samples({"pixels": batch["pixels"], "labels": batch["label"]})

    def loss(self, run: Run, model: nn.Module, batch: Samples, images: ImageRandomness) -> torch.Tensor:
        pixels, labels, flips = with_mirror_images(batch["pixels"], batch["labels"])
        with run.accelerator.autocast():
            logits = model(pixels).flatten(1)  # (2 · batch, 2 · num_classes)
        loss = F.cross_entropy(logits.float(), 2 * labels + flips, label_smoothing=self.label_smoothing)
        return pass_nonfinite_to_gradient(loss)

    def measure(self, model: Judge, images: Images) -> Measured:
        """Accuracy of the class of images and their mirror images, and of the orientation for one-sided classes."""
        class_hits, flip_hits = [], []
        for batch in images():
            pixels, labels, flips = with_mirror_images(batch["pixels"].to(model.device), batch["label"])
            judged_labels, judged_flips = (judged.cpu() for judged in model.class_and_flip(pixels))
            class_hits.append(judged_labels == labels)
            flip_hits.append((judged_flips == flips.cpu())[torch.isin(labels, self.one_sided)])
        classes, flips = (torch.cat(hits).float().mean().item() for hits in (class_hits, flip_hits))
        values = {"class_accuracy": classes, "orientation_accuracy": flips if len(self.one_sided) else None}
        of_flips = f", orientation of {flips:.1%} of one-sided ones" if len(self.one_sided) else ""
        return Measured(values, f"class of {classes:.1%} of the images right{of_flips}")

    def save(self, model: Judge, folder: Path):
        model.to("cpu").save_pretrained(folder)

    def usage(self, folder: Path) -> str:
        return f"--evaluation.judge {folder}"


def with_mirror_images(pixels: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and their mirror images in [-1, 1], their labels, and whether they are mirrored, from uint8 images."""
    flips = torch.arange(2, device=pixels.device).repeat_interleave(len(labels))
    return pixel_values(torch.cat([pixels, pixels.flip(-1)])), labels.repeat(2), flips
