"""The training of a CLIP pair: its contrastive loss, and how well images find their captions."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

from improved_ldm.conditioning.text import TOKENIZING
from improved_ldm.data.transforms import pixel_values
from improved_ldm.trainer.clip_model import build_clip, image_processor
from improved_ldm.trainer.network_config import ClipRunConfig
from improved_ldm.trainer.network_task import Images, Measured, NetworkTask
from improved_ldm.trainer.nonfinite import pass_nonfinite_to_gradient
from improved_ldm.trainer.randomness import ImageRandomness
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.task import Samples

NEAREST = 5  # captions among which the right one is looked for
CAPTIONS_AT_ONCE = 256


class ClipTask(NetworkTask):
    """The training of a new CLIP pair.

    Args:
        config: configuration of the run.
        tokenizer: tokenizer of the captions.
    """

    model: CLIPModel

    def __init__(self, config: ClipRunConfig, tokenizer: CLIPTokenizer):
        resolution = config.transform.resolution
        super().__init__(build_clip(config.clip, tokenizer, resolution), resolution)
        self.tokenizer, self.by_label = tokenizer, config.clip.match == "label"

    def samples(self, batch: dict[str, Any]) -> Samples:
        tokens = self._tokens(batch["caption"])
        return Samples({"pixels": batch["pixels"], **tokens, "groups": self._groups(batch)})

    def _tokens(self, captions: list[str]) -> dict[str, torch.Tensor]:
        with TOKENIZING:
            return dict(self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt"))

    def _groups(self, batch: dict[str, Any]) -> torch.Tensor:
        """(batch,) int, equal for samples that match each other."""
        if self.by_label:
            return batch["label"]
        numbers = {caption: number for number, caption in enumerate(dict.fromkeys(batch["caption"]))}
        return torch.tensor([numbers[caption] for caption in batch["caption"]])

    def loss(self, run: Run, model: nn.Module, batch: Samples, images: ImageRandomness) -> torch.Tensor:
        tokens = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with run.accelerator.autocast():
            logits = model(**tokens, pixel_values=pixel_values(batch["pixels"])).logits_per_text
        return pass_nonfinite_to_gradient(contrastive_loss(logits.float(), batch["groups"]))

    @torch.no_grad()
    def measure(self, model: CLIPModel, images: Images) -> Measured:
        """Share of images for which the nearest of all captions, or one of the nearest few, matches them."""
        seen, groups, known = [], [], {}  # of images; the group of each caption
        for batch in images():
            pixels = pixel_values(batch["pixels"].to(model.device))
            seen.append(F.normalize(model.get_image_features(pixels).pooler_output, dim=1))
            for number, caption in enumerate(batch["caption"]):
                known.setdefault(caption, int(batch["label"][number]) if self.by_label else len(known))
                groups.append(known[caption])
        similarities = torch.cat(seen) @ self._text_features(model, list(known)).T  # (images, captions)
        of_captions, groups = torch.tensor(list(known.values())), torch.tensor(groups)
        nearest = similarities.topk(min(NEAREST, len(known))).indices.cpu()
        matches = of_captions[nearest] == groups[:, None]
        first, among = matches[:, 0].float().mean().item(), matches.any(1).float().mean().item()
        values = {"accuracy": first, f"accuracy_of_{NEAREST}": among, "captions": len(known)}
        summary = f"the right caption of {len(known):,} is nearest for {first:.1%} of {len(groups):,} images"
        return Measured(values, f"{summary}, among the nearest {NEAREST} for {among:.1%}")

    def _text_features(self, model: CLIPModel, captions: list[str]) -> torch.Tensor:
        """(captions, dim) of length 1."""
        parts = []
        for first in range(0, len(captions), CAPTIONS_AT_ONCE):
            tokens = self._tokens(captions[first : first + CAPTIONS_AT_ONCE])
            tokens = {name: value.to(model.device) for name, value in tokens.items()}
            parts.append(F.normalize(model.get_text_features(**tokens).pooler_output, dim=1))
        return torch.cat(parts)

    def save(self, model: CLIPModel, folder: Path):
        for part in (model.to("cpu"), self.tokenizer, image_processor(self.image_size)):
            part.save_pretrained(folder)

    def usage(self, folder: Path) -> str:
        return f"--text.pretrained {folder} --text.max_tokens {self.tokenizer.model_max_length}"


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
