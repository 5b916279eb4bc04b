"""CLIP score: how well images match their prompts."""

import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer, CLIPModel

from improved_ldm.evaluation.networks import (
    MeasuringNetwork,
    check_pixels,
    load_transformers,
    process,
)
from improved_ldm.evaluation.open_clip_towers import OpenClip
from improved_ldm.places import resolve

SOURCES = "'embedded:clip', 'open_clip:MODEL:PRETRAINED', or the folder or Hub id of a transformers CLIPModel"


class TransformersClip:
    """Both towers of a transformers `CLIPModel`, with its own image processor and tokenizer.

    Args:
        source: Folder, Hub id or `embedded:` name.

    Raises:
        MissingWeightsError: If the weights are not available.
    """

    def __init__(self, source: str):
        self.network, self.processor = load_transformers(CLIPModel, source, SOURCES)
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(source))

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, dim) of pixels in [−1, 1]."""
        return self.network.get_image_features(process(self.processor, pixels)).pooler_output

    def encode_texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Embeddings (batch, dim) of prompts, truncated to the number of positions of the text tower."""
        length = self.network.config.text_config.max_position_embeddings
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.network.get_text_features(**inputs.to(device)).pooler_output


class ClipScorer(MeasuringNetwork):
    """A frozen CLIP model that compares images with their prompts.

    `name` is the source of the model and `sha256` is the hash of its weights.

    Args:
        name: Source of the model.
        towers: Image tower and text tower.
        device: Device to compute on.

    Source: Hessel et al. 2021, with the usual weight for generated images, 100 instead of 2.5.
    """

    def __init__(self, name: str, towers: OpenClip | TransformersClip, device: torch.device | str):
        super().__init__(name, towers.network, device)
        self.towers = towers

    @torch.no_grad()
    def __call__(self, pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """100 · max(cos, 0) of the embeddings of each image and its prompt.

        Args:
            pixels: Images (batch, 3, height, width) in [−1, 1], of any size.
            prompts: One prompt per image.

        Returns:
            Scores (batch,), float32 in [0, 100], on the network's device.

        Raises:
            ValueError: If the shape or range of the pixels or the number of prompts is wrong.
        """
        check_pixels(pixels)
        if len(prompts) != len(pixels):
            raise ValueError(f"`prompts` has length {len(prompts)}; it must have one prompt per image, {len(pixels)}.")
        images = self.towers.encode_images(pixels.to(self.device, torch.float32))
        texts = self.towers.encode_texts(list(prompts), self.device)
        return 100 * torch.cosine_similarity(images.float(), texts.float()).clamp(min=0)

    @torch.no_grad()
    def embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, dim) of images as for a call, float32, each of length 1."""
        check_pixels(pixels)
        return normalize(self.towers.encode_images(pixels.to(self.device, torch.float32)).float())

    @torch.no_grad()
    def embed_prompts(self, prompts: list[str]) -> torch.Tensor:
        """Embeddings (batch, dim) of prompts, float32, each of length 1."""
        return normalize(self.towers.encode_texts(prompts, self.device).float())


def open_clip_scorer(source: str, device: torch.device | str = "cpu") -> ClipScorer:
    """Open a CLIP model that scores images against prompts.

    Args:
        source: `embedded:clip`; `open_clip:MODEL:PRETRAINED`, where PRETRAINED is an open_clip tag or a weights file;
            or the folder or Hub id of a transformers `CLIPModel`.
        device: Device to compute on.

    Raises:
        ValueError: If the embedded name or the open_clip model does not exist.
        MissingWeightsError: If the weights are not available.
    """
    towers = OpenClip(source, SOURCES) if source.startswith("open_clip:") else TransformersClip(source)
    return ClipScorer(source, towers, device)
