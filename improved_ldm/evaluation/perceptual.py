"""Perceptual distance of pairs of images."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import MeasuringNetwork, check_pixels, load_judge, opening

BACKBONES = ("alex", "vgg", "squeeze")
PLACES = "'embedded:judge', the folder of a Judge, 'lpips:alex', 'lpips:vgg' or 'lpips:squeeze'"


class PerceptualDistance(MeasuringNetwork, ABC):
    """A frozen network that says how different two images look, named with the hash of its weights.

    `name` is the place that it was opened from, `sha256` the hash of its weights.
    """

    @torch.no_grad()
    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distance of each image of `a` to its counterpart in `b`.

        Args:
            a: (batch, 3, height, width) in [−1, 1].
            b: as `a`.

        Returns:
            (batch,) float32 ≥ 0, on the network's device; 0 for equal images, and the same for `b` and `a`.

        Raises:
            ValueError: for other or different shapes, or another range.
        """
        check_pixels(a, "a")
        check_pixels(b, "b")
        if a.shape != b.shape:
            raise ValueError(f"`a` is {tuple(a.shape)} and `b` {tuple(b.shape)}; they must have one shape.")
        return self.measure(a.to(self.device, torch.float32), b.to(self.device, torch.float32))

    @abstractmethod
    def measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Distances of checked pixels on the network's device."""


class Lpips(PerceptualDistance):
    """LPIPS 0.1, as torchmetrics has it; its backbone was trained on ImageNet.

    Args:
        place: `lpips:` and `alex`, `vgg` or `squeeze`.
        device: where it computes.

    Source: Zhang et al. 2018, "The unreasonable effectiveness of deep features as a perceptual metric".
    """

    def __init__(self, place: str, device: torch.device | str):
        backbone = place.removeprefix("lpips:")
        if backbone not in BACKBONES:
            raise ValueError(f"{place!r}: LPIPS has no backbone {backbone!r}; it has {', '.join(BACKBONES)}.")
        with opening(place, f"torchvision's weights, in {torch.hub.get_dir()} or by download", PLACES):
            network = LearnedPerceptualImagePatchSimilarity(backbone).net
        super().__init__(place, network, device)

    def measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.network(a, b).flatten()


class JudgeDistance(PerceptualDistance):
    """The distance of a judge's feature maps: LPIPS's form with equal weights.

    At each stage the features of every position are scaled to unit length; their squared differences are averaged
    over the positions and summed over the stages.

    Args:
        place: `embedded:judge` or a folder.
        judge: what is there.
        device: where it computes.

    Source: our choice.
    """

    def __init__(self, place: str, judge: Judge, device: torch.device | str):
        super().__init__(place, judge, device)

    def measure(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        maps = zip(self.network.feature_maps(a), self.network.feature_maps(b), strict=True)
        # each stage: (batch, channels, height, width) → (batch,)
        return sum((F.normalize(x) - F.normalize(y)).square().sum(1).mean((1, 2)) for x, y in maps)


def open_perceptual(place: str, device: torch.device | str = "cpu") -> PerceptualDistance:
    """Open a perceptual distance.

    Args:
        place: `lpips:alex`, `lpips:vgg` or `lpips:squeeze`, whose backbones come from torch hub's cache or are
            downloaded; `embedded:judge` or a folder of a `Judge`, which take images of the judge's size only.
        device: where it computes.

    Raises:
        ValueError: for another place.
        MissingWeightsError: if the weights cannot be had.
    """
    if place.startswith("lpips:"):
        return Lpips(place, device)
    judge = load_judge(place)
    if judge is None:
        raise ValueError(f"{place!r} is no perceptual distance; one may ask for {PLACES}.")
    return JudgeDistance(place, judge, device)
