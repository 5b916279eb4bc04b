"""How much else changes when one control input does?"""

from collections.abc import Iterable
from functools import partial

import torch

from improved_ldm.evaluation.obedience import SIZE_FRACTIONS, RealImages, draw, original_side, reduced
from improved_ldm.evaluation.perceptual import PerceptualDistance
from improved_ldm.evaluation.probe import CORNERS, cropped
from improved_ldm.pipeline import ImprovedLDMPipeline

BATCH_SIZE = 50  # pairs that are measured at once


@torch.no_grad()
def control_distances(
    pipeline: ImprovedLDMPipeline,
    distance: PerceptualDistance,
    real: RealImages,
    num_samples: int,
    seed: int = 0,
    **call,
) -> dict[str, float]:
    """Mean perceptual distance of samples that share seed and prompt and differ in one control input.

    Only control inputs that the denoiser reads are measured. A smaller size takes detail away and a crop shows less:
    what this obedience costs is seen on real images, and stands beside as `real_…`, to be subtracted.

    Args:
        pipeline: what is measured, by default at its own guidance and steps.
        distance: of pairs of images.
        real: its prompts or labels are drawn, the classes in turn.
        num_samples: images of each kind.
        seed: image i is drawn from `seed` + i.
        call: further arguments of the pipeline, for every image: `control_guidance_scale`, …

    Returns:
        original_size_distance: of plain samples to those at each smaller size of `SIZE_FRACTIONS`.
        crop_distance: of plain samples to those that are asked to show each of `CORNERS`.
        flip_distance: of plain samples to the mirror images of those that are asked to be flipped.
        real_original_size_distance: of real images to themselves, reduced to these sizes.
        real_crop_distance: of real images to these parts of themselves.

    Source: Berrada et al., 2024, compare samples that differ in their control; the measure is our choice.
    """
    read = pipeline.denoiser.control_inputs
    if not read:
        return {}
    prompts, labels = real.prompts(num_samples)
    side, originals = original_side(pipeline), real.pixels[:num_samples]
    steered = partial(draw, pipeline, prompts, labels, seed, **call)
    plain = steered()

    def distance_to(images: torch.Tensor, versions: Iterable[torch.Tensor]) -> float:
        return torch.stack([_distances(distance, images, version).mean() for version in versions]).mean().item()

    results = {}
    if "original_size" in read:
        sizes = [max(1, round(side * fraction)) for fraction in SIZE_FRACTIONS[1:]]
        results["original_size_distance"] = distance_to(plain, (steered(original_size=(size, size)) for size in sizes))
        results["real_original_size_distance"] = distance_to(originals, (reduced(originals, size) for size in sizes))
    if "crop_size" in read:
        controls = [crop.controls((side, side)) for crop in CORNERS]
        results["crop_distance"] = distance_to(plain, (steered(**control) for control in controls))
        results["real_crop_distance"] = distance_to(originals, (cropped(originals, crop) for crop in CORNERS))
    if "flip" in read:
        results["flip_distance"] = distance_to(plain, [steered(flip=True).flip(-1)])
    return results


def _distances(distance: PerceptualDistance, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distance (images,) of each pair of images; what a filter made of an image may leave its range a little."""
    pairs = zip(a.clamp(-1, 1).split(BATCH_SIZE), b.clamp(-1, 1).split(BATCH_SIZE), strict=True)
    return torch.cat([distance(*pair) for pair in pairs])
