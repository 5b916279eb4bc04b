"""What all networks that measure images share: a name, the hash of their weights, and how they are opened."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
import torch
from torch import nn
from torchvision.transforms.functional import to_pil_image
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from improved_ldm.embedded import resolve
from improved_ldm.evaluation.judge import Judge


class MissingWeightsError(RuntimeError):
    """The weights of a network that was asked for cannot be had."""


class MeasuringNetwork:
    """A frozen network that names itself and its weights.

    Args:
        name: the place that it was opened from.
        network: what it computes with.
        device: where it computes.
    """

    def __init__(self, name: str, network: nn.Module, device: torch.device | str):
        self.name, self.device = name, torch.device(device)
        self.network = network.requires_grad_(False).eval().to(self.device)
        self.sha256 = weights_sha256(network)

    def check_size(self, argument: str, size: tuple[int, int]):
        """Raise a ValueError for a judge of images of another size; every other network resizes them.

        Args:
            argument: that the network was asked for with.
            size: (height, width), pixels, of the images to come.
        """
        if isinstance(self.network, Judge) and size != (self.network.config.sample_size,) * 2:
            side = self.network.config.sample_size
            raise ValueError(
                f"`{argument}` is {self.name}, which reads images of {side} x {side} pixels; these have "
                f"{size[0]} x {size[1]}."
            )


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of a network's tensors, ordered by name: of each its name, type and shape, and its bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def opening(place: str, tried: str, places: str) -> Iterator[None]:
    """Say what was tried, and what else there is, where a library fails to find or to read weights.

    Args:
        place: what was asked for.
        tried: where its weights are looked for.
        places: every place that could have been asked for.

    Raises:
        MissingWeightsError: in place of the library's error.
    """
    try:
        yield
    except Exception as error:  # each library has errors of its own
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MissingWeightsError(
            f"the weights of {place!r} cannot be had. Tried {tried}: {reason} One may ask for {places}."
        ) from error


def check_pixels(pixels: torch.Tensor, name: str = "pixels"):
    """Raise a ValueError for what is not a batch of RGB images in [−1, 1]."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"`{name}` is {tuple(pixels.shape)} {pixels.dtype}; it must be (batch, 3, height, width) floats."
        )
    if pixels.numel() and not pixels.abs().amax() <= 1 + 1e-3:
        raise ValueError(f"`{name}` reaches {pixels.abs().amax():.4g}; it must be in [-1, 1].")


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels (batch, 3, height, width) in [−1, 1] as uint8, as a saved image holds them."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_judge(place: str) -> Judge | None:
    """The judge of a folder or of an `embedded:` name, in evaluation mode; None if something else is there."""
    folder = Path(resolve(place))
    file = folder / "config.json"
    if not file.is_file() or json.loads(file.read_text()).get("_class_name") != Judge.__name__:
        return None
    return Judge.from_pretrained(folder).eval()


def load_transformers(model_class: type, place: str, places: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A transformers model and its image processor. A pooler that the weights lack is left out.

    Args:
        model_class: a class with `from_pretrained`.
        place: a folder, a Hub id or an `embedded:` name.
        places: as for `opening`.

    Raises:
        MissingWeightsError: if they cannot be had, or some are not there.
    """
    folder = resolve(place)
    with opening(place, f"transformers with the folder or Hub id {folder}", places):
        network, loading = model_class.from_pretrained(folder, output_loading_info=True)
        missing = {key for key in loading["missing_keys"] if not key.startswith("pooler.")}
        if missing:
            raise ValueError(f"{sorted(missing)} are not there and would be random.")
        processor = AutoImageProcessor.from_pretrained(folder)
    if loading["missing_keys"]:
        network.pooler = None
    return network, processor


def process(processor: BaseImageProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels in [−1, 1] as a model's image processor resizes and normalises them, on the same device."""
    return processor(images=to_bytes(pixels), return_tensors="pt")["pixel_values"].to(pixels.device)


class OpenClip:
    """Both towers of an open_clip model, with open_clip's own preprocessing.

    Args:
        place: `open_clip:MODEL:PRETRAINED`, where PRETRAINED is a tag or a weights file, or `open_clip:MODEL` where
            MODEL is `hf-hub:…` or `local-dir:…`, which bring their weights.
        places: as for `opening`.

    Raises:
        ValueError: for an unknown model, or one without weights.
        MissingWeightsError: if the weights cannot be had.
    """

    def __init__(self, place: str, places: str):
        model, pretrained = _open_clip_names(place)
        tag = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
        with opening(place, f"open_clip with the weights {pretrained or model}", places):
            self.network, self.preprocess = open_clip.create_model_from_pretrained(
                model,
                pretrained,
                force_quick_gelu=tag.get("quick_gelu", False),  # what the tag was trained with; open_clip only warns
            )
            self.tokenizer = open_clip.get_tokenizer(model)

    def encode_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings (batch, dim) of pixels in [−1, 1]."""
        images = torch.stack([self.preprocess(to_pil_image(image)) for image in to_bytes(pixels).cpu()])
        return self.network.encode_image(images.to(pixels.device))

    def encode_texts(self, prompts: list[str], device: torch.device) -> torch.Tensor:
        """Embeddings (batch, dim) of prompts."""
        return self.network.encode_text(self.tokenizer(prompts).to(device))


def _open_clip_names(place: str) -> tuple[str, str | None]:
    """Model and weights of an `open_clip:` place; None where the model brings its weights."""
    model = place.removeprefix("open_clip:")
    if model.startswith(("hf-hub:", "local-dir:")):
        return model, None
    model, _, pretrained = model.partition(":")
    if model not in open_clip.list_models():
        raise ValueError(f"{place!r}: open_clip has no model {model!r}; `open_clip.list_models()` has all.")
    if not pretrained:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise ValueError(f"{place!r} names no weights; add ':' and a weights file or one of open_clip's tags: {tags}.")
    return model, pretrained
