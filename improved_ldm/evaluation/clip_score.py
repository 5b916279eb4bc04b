"""CLIP score: how well images fit their prompts."""

import torch
from transformers import AutoTokenizer, CLIPModel

from improved_ldm.embedded import resolve
from improved_ldm.evaluation.networks import (
    MeasuringNetwork,
    OpenClip,
    check_pixels,
    load_transformers,
    process,
)

PLACES = "'embedded:clip', 'open_clip:MODEL:PRETRAINED', or the folder or Hub id of a transformers CLIPModel"


class TransformersClip:
    """Both towers of a transformers `CLIPModel`, with its own image processor and tokenizer.

    Args:
        place: a folder, a Hub id or an `embedded:` name.

    Raises:
        MissingWeightsError: if the weights cannot be had.
    """

    def __init__(self, place: str):
        self.network, self.processor = load_transformers(CLIPModel, place, PLACES)
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(place))

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, dim) of pixels in [−1, 1]."""
        return self.network.get_image_features(process(self.processor, pixels)).pooler_output

    def encode_texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Embeddings (batch, dim) of prompts, cut where the tower has no more positions."""
        length = self.network.config.text_config.max_position_embeddings
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.network.get_text_features(**inputs.to(device)).pooler_output


class ClipScorer(MeasuringNetwork):
    """A frozen CLIP that compares images with their prompts, named with the hash of its weights.

    `name` is the place that it was opened from, `sha256` the hash of its weights.

    Args:
        name: the place.
        towers: its image and text towers.
        device: where it computes.

    Source: Hessel et al. 2021, with the weight 100 in place of 2.5, as is usual for generated images.
    """

    def __init__(self, name: str, towers: OpenClip | TransformersClip, device: torch.device | str):
        super().__init__(name, towers.network, device)
        self.towers = towers

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """100 · max(cos, 0) of the embeddings of each image and its prompt.

        Args:
            pixels: (batch, 3, height, width) in [−1, 1], of any size.
            prompts: one an image.

        Returns:
            (batch,) float32 in [0, 100], on the network's device.

        Raises:
            ValueError: for another shape or range, or another number of prompts.
        """
        check_pixels(pixels)
        if len(prompts) != len(pixels):
            raise ValueError(f"`prompts` has {len(prompts)}; it must have one for each of {len(pixels)} images.")
        images = self.towers.encode_images(pixels.to(self.device, torch.float32))
        texts = self.towers.encode_texts(list(prompts), self.device)
        return 100 * torch.cosine_similarity(images.float(), texts.float()).clamp(min=0)


def open_clip_scorer(place: str, device: torch.device | str = "cpu") -> ClipScorer:
    """Open a CLIP that scores images against prompts.

    Args:
        place: `embedded:clip`, `open_clip:MODEL:PRETRAINED` with a tag of open_clip or a weights file, or a folder or
            Hub id of a transformers `CLIPModel`.
        device: where it computes.

    Raises:
        ValueError: for an embedded name or an open_clip model that does not exist.
        MissingWeightsError: if the weights cannot be had.
    """
    towers = OpenClip(place, PLACES) if place.startswith("open_clip:") else TransformersClip(place)
    return ClipScorer(place, towers, device)
