"""Measure how much else changes in an image when one control input changes."""

from collections.abc import Iterable
from functools import partial

import torch

from improved_ldm.evaluation.obedience import STEERINGS, RealImages, sample_images
from improved_ldm.evaluation.perceptual import PerceptualDistance
from improved_ldm.pipeline import ImprovedLDMPipeline

BATCH_SIZE = 50  # pairs measured at once


@torch.no_grad()
def control_distances(
    pipeline: ImprovedLDMPipeline,
    distance: PerceptualDistance,
    real: RealImages,
    num_samples: int,
    seed: int = 0,
    **call,
) -> dict[str, float]:
    """Mean perceptual distance between samples with the same seed and prompt that differ in one control input.

    Only control inputs that the denoiser reads are measured. A smaller size removes detail and a crop shows less of
    the image, so some distance is expected from obedience alone. That distance is measured on real images and returned
    as `real_…`; subtract it.

    Args:
        pipeline: Pipeline to measure, by default with its own guidance and steps.
        distance: Perceptual distance between two images.
        real: Real images; their prompts or labels are used, cycling through the classes.
        num_samples: Number of images of each kind.
        seed: Image i is sampled with seed `seed` + i.
        call: Further arguments of the pipeline for every image, such as `control_guidance_scale`.

    Returns:
        original_size_distance: From plain samples to samples at each smaller size in `SIZE_FRACTIONS`.
        crop_distance: From plain samples to samples of each crop in `CORNERS`.
        flip_distance: From plain samples to the mirror images of flipped samples.
        real_original_size_distance: From real images to the same images reduced to these sizes.
        real_crop_distance: From real images to these crops of the same images.

    Source: Berrada et al., 2024, compare samples that differ in their control; the measure is our choice.
    """
    read = pipeline.denoiser.control_inputs
    if not read:
        return {}
    prompts, labels = real.prompts(num_samples)
    side, originals = pipeline.default_original_side, real.pixels[:num_samples]
    steered = partial(sample_images, pipeline, prompts, labels, seed, **call)
    plain = steered()

    def distance_to(images: torch.Tensor, versions: Iterable[torch.Tensor]) -> float:
        return torch.stack([_distances(distance, images, version).mean() for version in versions]).mean().item()

    results = {}
    for name, steering in STEERINGS.items():
        if name in read:
            versions = (steering.undone(steered(**arguments)) for arguments in steering.asked(side))
            results[f"{steering.label}_distance"] = distance_to(plain, versions)
        if name in read and steering.real is not None:
            results[f"real_{steering.label}_distance"] = distance_to(originals, steering.real(originals, side))
    return results


def _distances(distance: PerceptualDistance, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance (images,) between the two images of each pair, clamped because filters can slightly exceed [−1, 1]."""
    pairs = zip(a.clamp(-1, 1).split(BATCH_SIZE), b.clamp(-1, 1).split(BATCH_SIZE), strict=True)
    return torch.cat([distance(*pair) for pair in pairs])
