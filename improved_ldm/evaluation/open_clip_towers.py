"""Image and text towers of open_clip models. Only this module imports open_clip, because the import is slow."""

import open_clip
import torch
from torchvision.transforms.functional import to_pil_image

from improved_ldm.evaluation.networks import opening, to_bytes


class OpenClip:
    """Both towers of an open_clip model, with open_clip's own preprocessing.

    Args:
        source: `open_clip:MODEL:PRETRAINED`, where PRETRAINED is a tag or a weights file; or `open_clip:MODEL`, where
            MODEL is `hf-hub:…` or `local-dir:…` and includes the weights.
        sources: All valid sources, as for `opening`.

    Raises:
        ValueError: If the model is unknown or no weights are given.
        MissingWeightsError: If the weights are not available.
    """

    def __init__(self, source: str, sources: str):
        model, pretrained = _open_clip_names(source)
        tag = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
        with opening(source, f"open_clip with the weights {pretrained or model}", sources):
            self.network, self.preprocess = open_clip.create_model_from_pretrained(
                model,
                pretrained,
                force_quick_gelu=tag.get("quick_gelu", False),  # as in the training of the tag; open_clip only warns
            )
            self.tokenizer = open_clip.get_tokenizer(model)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, dim) of pixels in [−1, 1]."""
        images = torch.stack([self.preprocess(to_pil_image(image)) for image in to_bytes(pixels).cpu()])
        return self.network.encode_image(images.to(pixels.device))

    def encode_texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Embeddings (batch, dim) of prompts."""
        return self.network.encode_text(self.tokenizer(prompts).to(device))


def _open_clip_names(source: str) -> tuple[str, str | None]:
    """Model and weights of an `open_clip:` source; the weights are None if the model includes them."""
    model = source.removeprefix("open_clip:")
    if model.startswith(("hf-hub:", "local-dir:")):
        return model, None
    model, _, pretrained = model.partition(":")
    if model not in open_clip.list_models():
        raise ValueError(f"{source!r}: open_clip has no model {model!r}; `open_clip.list_models()` lists all models.")
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(
            f"{source!r} names no weights; add ':' and a weights file or one of open_clip's tags: {tags}."
        )
    return model, pretrained
