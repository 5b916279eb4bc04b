"""What all measuring networks share: a name, the hash of their weights, and how they are opened."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedModel

from improved_ldm.evaluation.judge import Judge
from improved_ldm.places import resolve


class MissingWeightsError(RuntimeError):
    """The weights of a requested network are not available."""


class MeasuringNetwork:
    """A frozen network with a name and the hash of its weights.

    Args:
        name: Source that the network was opened from.
        network: The network itself.
        device: Device to compute on.
    """

    def __init__(self, name: str, network: nn.Module, device: torch.device | str):
        self.name, self.device = name, torch.device(device)
        self.network = network.requires_grad_(False).eval().to(self.device)
        self.sha256 = weights_sha256(network)

    def check_size(self, argument: str, size: tuple[int, int]):
        """Raise a ValueError if this is a judge and the images have another size. Other networks resize images.

        Args:
            argument: Name of the argument that selected the network.
            size: (height, width) of the images in pixels.
        """
        if isinstance(self.network, Judge) and size != (self.network.config.sample_size,) * 2:
            side = self.network.config.sample_size
            raise ValueError(
                f"`{argument}` is {self.name}, which reads images of {side} x {side} pixels; these have "
                f"{size[0]} x {size[1]}."
            )


def weights_sha256(network: nn.Module) -> str:
    """SHA-256 of the name, dtype, shape and bytes of each tensor of a network, in order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def opening(source: str, tried: str, sources: str) -> Iterator[None]:
    """Report what was tried and which sources are valid if a library fails to find or read weights.

    Args:
        source: The requested source.
        tried: Where its weights are searched.
        sources: All valid sources.

    Raises:
        MissingWeightsError: Instead of the error of the library.
    """
    try:
        yield
    except Exception as error:  # every library has its own errors
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise MissingWeightsError(
            f"the weights of {source!r} are not available. Tried {tried}: {reason} Valid sources are {sources}."
        ) from error


def check_pixels(pixels: torch.Tensor, name: str = "pixels"):
    """Raise a ValueError unless `pixels` is a batch of RGB images in [−1, 1]."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(
            f"`{name}` is {tuple(pixels.shape)} {pixels.dtype}; it must be (batch, 3, height, width) floats."
        )
    if pixels.numel() and not pixels.abs().amax() <= 1 + 1e-3:
        raise ValueError(f"`{name}` has absolute values up to {pixels.abs().amax():.4g}; it must be in [-1, 1].")


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Convert pixels (batch, 3, height, width) in [−1, 1] to uint8, as in a saved image."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def load_judge(source: str) -> Judge | None:
    """The judge in a folder or of an `embedded:` name, in evaluation mode; None if there is no judge."""
    folder = Path(resolve(source))
    file = folder / "config.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("_class_name") != Judge.__name__:
        return None
    return Judge.from_pretrained(folder, use_safetensors=True).eval()


def load_transformers(model_class: type, source: str, sources: str) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a transformers model and its image processor. A pooler without saved weights is removed.

    Args:
        model_class: Class with a `from_pretrained` method.
        source: Folder, Hub id or `embedded:` name.
        sources: All valid sources, as for `opening`.

    Raises:
        MissingWeightsError: If the weights are not available or incomplete.
    """
    folder = resolve(source)
    with opening(source, f"transformers with the folder or Hub id {folder}", sources):
        network, loading = model_class.from_pretrained(folder, output_loading_info=True, use_safetensors=True)
        missing = {key for key in loading["missing_keys"] if not key.startswith("pooler.")}
        if missing:
            raise ValueError(f"{sorted(missing)} are missing and would be random.")
        processor = AutoImageProcessor.from_pretrained(folder)
    if loading["missing_keys"]:
        network.pooler = None
    return network, processor


def process(processor: BaseImageProcessor, pixels: torch.Tensor) -> torch.Tensor:
    """Resize and normalise pixels in [−1, 1] with a model's image processor, on the same device."""
    return processor(images=to_bytes(pixels), return_tensors="pt")["pixel_values"].to(pixels.device)
