"""Which part of an image does a picture show? Crops of a set of images, and a linear probe that tells them apart."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import to_pil_image

from improved_ldm.conditioning.control import Control
from improved_ldm.data.transforms import render, to_pixels
from improved_ldm.evaluation.networks import to_bytes


@dataclass(frozen=True)
class Crop:
    """A part of an image, in fractions of its sides.

    Args:
        top: of the upper edge.
        left: of the left edge.
        extent: of either side.
    """

    top: float
    left: float
    extent: float

    def controls(self, size: tuple[float, float]) -> dict[str, tuple[float, float]]:
        """The control inputs that ask for this crop of an image of `size` (height, width) pixels."""
        height, width = size
        return {
            "crops_coords_top_left": (self.top * height, self.left * width),
            "crop_size": (self.extent * height, self.extent * width),
        }


WHOLE = Crop(0, 0, 1)
CORNERS = tuple(Crop(top, left, 0.65) for top in (0, 0.35) for left in (0, 0.35))
CROPS = (WHOLE, *CORNERS)


def cropped(pixels: torch.Tensor, crop: Crop) -> torch.Tensor:
    """Part of each image (images, 3, height, width) in [−1, 1], scaled to the image's own size."""
    size = tuple(pixels.shape[2:])
    control = Control(size, **crop.controls(size), target_size=size)
    return torch.stack([to_pixels(render(to_pil_image(image), control)) for image in to_bytes(pixels)])


class CropProbe:
    """Multinomial logistic regression from small images to the crop that they show.

    Args:
        pixels: (images, 3, height, width) in [−1, 1], whole; the probe is fitted to each of `CROPS` of them.
        side: pixels a side that images are reduced to before they are read.
        penalty: of the squared weights.

    Source: our choice.
    """

    def __init__(self, pixels: torch.Tensor, side: int = 16, penalty: float = 1e-3):
        self.side = side
        inputs = torch.cat([self._inputs(cropped(pixels, crop)) for crop in CROPS])
        targets = torch.arange(len(CROPS)).repeat_interleave(len(pixels))
        self.weights = _fit(inputs, targets, penalty)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """The most probable crop of each image (batch, 3, height, width): (batch,) places in `CROPS`."""
        return (self._inputs(pixels) @ self.weights).argmax(1)

    def accuracy(self, pixels: torch.Tensor) -> float:
        """Share of the crops of whole images (images, 3, height, width) that the probe finds."""
        hits = [self(cropped(pixels, crop)) == place for place, crop in enumerate(CROPS)]
        return torch.cat(hits).double().mean().item()

    def _inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        # (batch, 3, height, width) → (batch, 3 · side² + 1) with a one for the bias
        small = F.interpolate(pixels.double(), size=self.side, mode="area").flatten(1)
        return F.pad(small, (0, 1), value=1.0)


@torch.enable_grad()
def _fit(inputs: torch.Tensor, targets: torch.Tensor, penalty: float) -> torch.Tensor:
    """Weights (inputs, classes) of least penalised cross-entropy; the last row is the bias."""
    weights = torch.zeros(inputs.shape[1], len(CROPS), dtype=inputs.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(inputs @ weights, targets) + penalty * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()
