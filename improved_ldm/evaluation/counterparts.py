"""Compare samples with the real image of the same caption, for sets in which each caption has one image."""

import re
from dataclasses import dataclass

import torch

from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import Rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation.obedience import MIRRORED, sample_images, sized
from improved_ldm.evaluation.scores import high_frequency_energy
from improved_ldm.pipeline import ImprovedLDMPipeline

BATCH_SIZE = 250
# Mean absolute difference from the mirror image, in [−1, 1], above which an image has a side. Our choice.
MIN_ASYMMETRY = 0.15
SMALL = 0.25  # fraction of the default original size that the test of detail asks for; our choice


@dataclass(frozen=True)
class Counterparts:
    """Real images that samples are compared with.

    Args:
        pixels: Images (images, 3, side, side) in [−1, 1].
        captions: One per image, all different.
    """

    pixels: torch.Tensor
    captions: list[str]

    def part(self, places: list[int]) -> "Counterparts":
        """The images at these places."""
        return Counterparts(self.pixels[places], [self.captions[place] for place in places])

    def matching(self, pattern: str) -> "Counterparts":
        """The images in whose captions a regular expression occurs."""
        return self.part([place for place, caption in enumerate(self.captions) if re.search(pattern, caption)])

    @property
    def one_sided(self) -> torch.Tensor:
        """Mask (images,) of the images that differ from their mirror image."""
        return (self.pixels - self.pixels.flip(-1)).abs().mean((1, 2, 3)) > MIN_ASYMMETRY


def load_counterparts(rows: Rows, side: int) -> Counterparts:
    """Load all images of a captioned set, uncropped and not mirrored, at `side` pixels."""
    batches = list(make_pass(rows, ImageTransform(side), BATCH_SIZE))
    captions = [caption for batch in batches for caption in batch["caption"]]
    return Counterparts(pixel_values(torch.cat([batch["pixels"] for batch in batches])), captions)


def mirrored_share(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Share of the samples that are nearer, by mean squared error, to the mirrored real image than to the real one.

    Args:
        samples: Images (images, 3, side, side) in [−1, 1].
        real: The real image of each, likewise.
    """
    plain, mirrored = (_distance(samples, images) for images in (real, real.flip(-1)))
    return (mirrored < plain).float().mean().item()


def own_is_nearer_share(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Share of pairs of a sample and another real image in which the sample is nearer to its own real image.

    The distance is the mean squared error; 0.5 is chance. Arguments as for `mirrored_share`.
    """
    distances = torch.cdist(samples.flatten(1), real.flatten(1))
    others = ~torch.eye(len(real), dtype=torch.bool)
    return (distances.diagonal()[:, None] < distances)[others].float().mean().item()


@torch.no_grad()
def evaluate_counterparts(
    pipeline: ImprovedLDMPipeline, real: Counterparts, seed: int = 0
) -> tuple[dict[str, float], torch.Tensor]:
    """Draw each caption as in the data, mirrored, and as from a small original.

    Args:
        pipeline: Pipeline to measure, with its own guidance and steps.
        real: The real images.
        seed: Image i is sampled with seed `seed` + i.

    Returns:
        Shares by name, and the samples (images, 3, side, side) in [−1, 1] as in the data. The shares of mirrored
        samples are of captions whose real image has a side.
    """
    small = sized(round(SMALL * pipeline.default_original_side))
    plain, mirrored, reduced = (_draw(pipeline, real, seed, **call) for call in ({}, MIRRORED, small))
    sided = real.one_sided
    less_detail = high_frequency_energy(reduced) < high_frequency_energy(plain)
    shares = {
        "num_samples": len(plain),
        "own_real_image_is_nearer": own_is_nearer_share(plain, real.pixels),
        "num_one_sided": int(sided.sum()),
        "plain_is_plain": 1 - mirrored_share(plain[sided], real.pixels[sided]),
        "mirrored_is_mirrored": mirrored_share(mirrored[sided], real.pixels[sided]),
        "less_detail_if_small": less_detail.float().mean().item(),
    }
    return shares, plain


def _draw(pipeline: ImprovedLDMPipeline, real: Counterparts, seed: int, **call) -> torch.Tensor:
    return sample_images(pipeline, real.captions, torch.zeros(0), seed, **call)


def _distance(samples: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean squared error (images,)."""
    return (samples - real).square().mean((1, 2, 3))
