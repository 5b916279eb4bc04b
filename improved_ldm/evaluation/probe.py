"""Crops of images, and a linear probe that recognises which crop an image shows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from improved_ldm.conditioning.control import SHOWN_CORNERS, SHOWN_EXTENT, Control, crop_arguments
from improved_ldm.data.transforms import pixel_values, render
from improved_ldm.evaluation.networks import to_bytes


@dataclass(frozen=True)
class Crop:
    """A part of an image, in fractions of the image's sides.

    Args:
        top: Position of the upper edge.
        left: Position of the left edge.
        extent: Height and width of the crop.
    """

    top: float
    left: float
    extent: float

    def controls(self, size: tuple[float, float]) -> dict[str, tuple[float, float]]:
        """The control inputs that request this crop of an image of `size` (height, width) in pixels."""
        return crop_arguments(self.top, self.left, self.extent, self.extent, size)


WHOLE = Crop(0, 0, 1)
CORNERS = tuple(Crop(*corner, SHOWN_EXTENT) for corner in SHOWN_CORNERS.values())
CROPS = (WHOLE, *CORNERS)


def cropped(pixels: torch.Tensor, crop: Crop) -> torch.Tensor:
    """Crop each image (images, 3, height, width) in [−1, 1] and scale the crop to the size of the image."""
    size = tuple(pixels.shape[2:])
    control = Control(size, *crop.controls(size).values(), size)
    return pixel_values(torch.stack([render(to_pil_image(image), control) for image in to_bytes(pixels)]))


class CropProbe:
    """Multinomial logistic regression from small images to the crop that they show.

    Args:
        pixels: Uncropped images (images, 3, height, width) in [−1, 1]. The probe is fitted to all `CROPS` of them.
        side: Side length in pixels that images are reduced to.
        penalty: Factor of the squared weights in the loss.

    Source: our choice.
    """

    def __init__(self, pixels: torch.Tensor, side: int = 16, penalty: float = 1e-3):
        self.side = side
        inputs = torch.cat([self._inputs(cropped(pixels, crop)) for crop in CROPS])
        targets = torch.arange(len(CROPS)).repeat_interleave(len(pixels))
        self.weights = _fit(inputs, targets, penalty)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """Indices (batch,) into `CROPS` of the most probable crop of each image (batch, 3, height, width)."""
        return (self._inputs(pixels) @ self.weights).argmax(1)

    def accuracy(self, pixels: torch.Tensor) -> float:
        """Share of the crops of uncropped images (images, 3, height, width) that the probe recognises."""
        hits = [self(cropped(pixels, crop)) == place for place, crop in enumerate(CROPS)]
        return torch.cat(hits).double().mean().item()

    def _inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        # (batch, 3, height, width) → (batch, 3 · side² + 1) with a one for the bias
        small = F.interpolate(pixels.double(), size=self.side, mode="area").flatten(1)
        return F.pad(small, (0, 1), value=1.0)


@torch.enable_grad()
def _fit(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights (inputs, classes) that minimise the penalised cross-entropy; the last row is the bias."""
    weights = torch.zeros(inputs.shape[1], len(CROPS), dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weights, targets) + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
