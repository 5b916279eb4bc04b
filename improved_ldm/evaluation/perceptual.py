"""Perceptual distance between pairs of images."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import MeasuringNetwork, check_pixels, load_judge, opening

BACKBONES = ("alex", "vgg", "squeeze")
SOURCES = "'embedded:judge', the folder of a Judge, 'lpips:alex', 'lpips:vgg' or 'lpips:squeeze'"


class PerceptualDistance(MeasuringNetwork, ABC):
    """A frozen network that measures how different two images look.

    `name` is the source of the network and `sha256` is the hash of its weights.
    """

    @torch.no_grad()
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distance between each image of `a` and its counterpart in `b`.

        Args:
            a: Images (batch, 3, height, width) in [−1, 1].
            b: Images with the same shape and range as `a`.

        Returns:
            Distances (batch,), float32 ≥ 0, on the network's device. They are symmetric, and 0 for equal images.

        Raises:
            ValueError: If the shapes are wrong or differ, or the range is wrong.
        """
        check_pixels(a, "a")
        check_pixels(b, "b")
        if a.shape != b.shape:
            raise ValueError(f"`a` is {tuple(a.shape)} and `b` {tuple(b.shape)}; the shapes must be equal.")
        return self.measure(a.to(self.device, torch.float32), b.to(self.device, torch.float32))

    @abstractmethod
    def measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances of pixels that are already checked and on the network's device."""


class Lpips(PerceptualDistance):
    """LPIPS 0.1, as implemented by torchmetrics, with a backbone trained on ImageNet.

    Args:
        source: `lpips:alex`, `lpips:vgg` or `lpips:squeeze`.
        device: Device to compute on.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".
    """

    def __init__(self, source: str, device: torch.device | str):
        backbone = source.removeprefix("lpips:")
        if backbone not in BACKBONES:
            raise ValueError(
                f"{source!r}: LPIPS has no backbone {backbone!r}; it must be one of {', '.join(BACKBONES)}."
            )
        with opening(source, f"torchvision's weights in {torch.hub.get_dir()} and their download", SOURCES):
            network = LearnedPerceptualImagePatchSimilarity(backbone).net
        super().__init__(source, network, device)

    def measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.network(a, b).flatten()


class JudgeDistance(PerceptualDistance):
    """Distance between a judge's feature maps, in the form of LPIPS with equal weights.

    At each stage, the features at every position are scaled to unit length. Their squared differences are averaged
    over the positions and summed over the stages.

    Args:
        source: `embedded:judge` or a folder.
        judge: The judge at this source.
        device: Device to compute on.

    Source: our choice.
    """

    def __init__(self, source: str, judge: Judge, device: torch.device | str):
        super().__init__(source, judge, device)

    def measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        maps = zip(self.network.feature_maps(a), self.network.feature_maps(b), strict=True)
        # each stage: (batch, channels, height, width) → (batch,)
        return sum((F.normalize(x) - F.normalize(y)).square().sum(1).mean((1, 2)) for x, y in maps)


def open_perceptual(source: str, device: torch.device | str = "cpu") -> PerceptualDistance:
    """Open a perceptual distance.

    Args:
        source: `lpips:alex`, `lpips:vgg` or `lpips:squeeze`, with a backbone from the torch hub cache or a download;
            or `embedded:judge` or the folder of a `Judge`, which only accepts images of the judge's size.
        device: Device to compute on.

    Raises:
        ValueError: If the source is not one of these.
        MissingWeightsError: If the weights are not available.
    """
    if source.startswith("lpips:"):
        return Lpips(source, device)
    judge = load_judge(source)
    if judge is None:
        raise ValueError(f"{source!r} is not a perceptual distance; it must be one of {SOURCES}.")
    return JudgeDistance(source, judge, device)
