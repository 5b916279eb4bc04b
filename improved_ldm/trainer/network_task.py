"""What the networks around a denoiser have in common as tasks: they are measured on images, finished and saved."""

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from improved_ldm.trainer.task import Samples, Task

Images = Callable[[], Iterator[dict[str, Any]]]  # begins a pass over images, whole, in batches of `collate`


@dataclass(frozen=True)
class Measured:
    """What a network reaches on images.

    Args:
        values: the numbers by name.
        summary: the most important ones in words.
        picture: what it makes of some images; None for a network that makes none.
    """

    values: dict[str, float]
    summary: str
    picture: Image.Image | None = None


class NetworkTask(Task):
    """The training of a network around a denoiser.

    Args:
        model: the network with its new weights.
        image_size: side length, or (height, width), of the images that it is measured on, pixels.
    """

    def __init__(self, model: nn.Module, image_size: int | tuple[int, int]):
        super().__init__(model)
        self.image_size = image_size

    @abstractmethod
    def samples(self, batch: dict[str, Any]) -> Samples:
        """The tensors of a batch of `collate` that the loss reads."""

    @abstractmethod
    def measure(self, model: nn.Module, images: Images) -> Measured:
        """Measure a model, which is in evaluation mode, on images."""

    def finish(self, model: nn.Module, images: Images):
        """Change a trained model at the end, from statistics of training images; nothing by default."""

    @abstractmethod
    def save(self, model: nn.Module, folder: Path):
        """Save the network in a folder."""

    @abstractmethod
    def usage(self, folder: Path) -> str:
        """What to type to use the network in a folder."""
