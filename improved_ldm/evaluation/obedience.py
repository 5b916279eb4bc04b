"""Measure whether samples show what was requested: a judge checks class and orientation, a probe checks crops."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch.nn.functional import interpolate

from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import Rows, open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import load_judge
from improved_ldm.evaluation.probe import CORNERS, CROPS, CropProbe, cropped
from improved_ldm.evaluation.sampling import call_pipeline
from improved_ldm.evaluation.scores import RealFeatures, high_frequency_energy
from improved_ldm.pipeline import ImprovedLDMPipeline

BATCH_SIZE = 250
NUM_REAL_IMAGES = 2000  # images of the test split that samples are compared with
# Original sizes in the test of detail, as fractions of the default. Below a half, the judge no longer recognises many
# real images reduced to that size.
SIZE_FRACTIONS = (1.0, 0.875, 0.75, 0.625, 0.5)
MIRRORED = {"flip": True}  # control arguments of a mirrored image
MAX_PROBE_IMAGES = 1000  # real images of the probe, half to fit it and half to test it


@dataclass(frozen=True)
class RealImages:
    """Real images of the test split that samples are compared with.

    Args:
        pixels: Images (images, 3, height, width) in [−1, 1].
        labels: Class labels (images,), integers.
        captions: One caption per image.
        class_names: Names of the classes, in the order of the labels.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    captions: list[str]
    class_names: list[str]

    def prompts(self, count: int) -> tuple[list, torch.Tensor]:
        """Captions and labels of `count` images, cycling through the classes."""
        places = [torch.nonzero(self.labels == label).flatten().tolist() for label in range(len(self.class_names))]
        chosen = [places[i % len(places)][i // len(places) % len(places[i % len(places)])] for i in range(count)]
        return [self.captions[place] for place in chosen], self.labels[chosen]


def load_real_images(rows: Rows, resolution: int, count: int) -> RealImages:
    """Load the first `count` images of a labelled, captioned data set, uncropped and unflipped.

    `resolution` is in pixels.
    """
    loader = make_pass(rows, ImageTransform(resolution), BATCH_SIZE)
    batches = list(islice(loader, -(-count // BATCH_SIZE)))
    return RealImages(
        pixel_values(torch.cat([batch["pixels"] for batch in batches])[:count]),
        torch.cat([batch["label"] for batch in batches])[:count],
        [caption for batch in batches for caption in batch["caption"]][:count],
        rows.class_names,
    )


def open_judged(
    source: str | None, data_source: str, size: tuple[int, int], say: Callable[[str], None]
) -> tuple[Judge, RealImages] | None:
    """Open a judge and the real images of its data set.

    Args:
        source: `embedded:judge` or the folder of a `Judge`; None skips the measurement.
        data_source: Source of the data set, as for `open_rows`.
        size: (height, width) of the samples in pixels. A judge sees squares only.
        say: Called with a message if the judge does not fit.

    Returns:
        The judge and the images; None without a judge, or if the judge was trained on other data or another size.

    Raises:
        ValueError: If `source` is not a judge.
    """
    if source is None:
        return None
    judge = load_judge(source)
    if judge is None:
        raise ValueError(f"`judge` is {source!r}; it must be 'embedded:judge' or the folder of a Judge.")
    side = judge.config.sample_size
    if judge.config.data_source != data_source or (side, side) != tuple(size):
        say(f"not judged: {source} is for {judge.config.data_source} at {side}x{side} pixels")
        return None
    return judge, load_real_images(open_rows(data_source, "test", label_column="label"), side, NUM_REAL_IMAGES)


@torch.no_grad()
def evaluate_obedience(
    pipeline: ImprovedLDMPipeline,
    judge: Judge,
    real: RealImages,
    num_samples: int,
    num_coverage_samples: int,
    num_detail_samples: int,
    seed: int = 0,
    **call,
) -> dict[str, float]:
    """Measure how well the samples of a pipeline follow class and control.

    Args:
        pipeline: Pipeline to measure, by default with its own guidance and steps.
        judge: Classifier of the samples.
        real: Test images of the judge's data set.
        num_samples: Number of images whose class and orientation are judged. Half of them are requested flipped.
        num_coverage_samples: Number of images for coverage and Fréchet distance, none of them flipped.
        num_detail_samples: Number of images that are sampled at several original sizes each, and once more with one
            of several crops each.
        seed: Image i is sampled with seed `seed` + i.
        call: Further arguments of the pipeline for every image, such as `control_guidance_scale`.

    Returns:
        Shares and distances by name, with the shares of the judge and the probe on real images as `real_…`. The
        orientation is left out if none of the sampled classes is one-sided.
    """
    num_samples -= num_samples % 2
    prompts, labels = real.prompts(num_samples)
    flips = torch.arange(num_samples) // len(real.class_names) % 2
    read = pipeline.denoiser.control_inputs
    asked_flips = flips.bool().tolist() if "flip" in read else None
    samples = sample_images(pipeline, prompts, labels, seed, flip=asked_flips, **call)
    results = {
        "class_accuracy": _class_accuracy(judge, samples, labels),
        "real_class_accuracy": _class_accuracy(judge, real.pixels, real.labels),
        "num_samples": num_samples,
    }
    if _one_sided(judge, labels).any():
        results["real_orientation_accuracy"] = _orientation_accuracy(judge, real.pixels, real.labels, False)
        if "flip" in read:
            results["orientation_accuracy"] = _orientation_accuracy(judge, samples, labels, flips)
    for name, test in TESTS.items():
        if name in read:
            results |= test(pipeline, judge, real, num_detail_samples, seed, **call)

    prompts, labels = real.prompts(num_coverage_samples)
    fake_features = judge.features(sample_images(pipeline, prompts, labels, seed + num_samples, **call))
    real_features = RealFeatures(judge.features(real.pixels))
    return results | {
        "coverage": real_features.manifold_scores(fake_features)["coverage"],
        "judge_fid": real_features.fid(fake_features),
        "num_coverage_samples": num_coverage_samples,
        "num_real_images": len(real.pixels),
    }


def sample_images(
    pipeline: ImprovedLDMPipeline, prompts: list[str], labels: torch.Tensor, seed: int, **call
) -> torch.Tensor:
    """Samples (images, 3, height, width) in [−1, 1]; image i has seed `seed` + i.

    `call` holds further arguments of the pipeline; a list has one value per image.
    """
    semantics, pixels = prompts if pipeline.takes_text else labels.tolist(), []
    for start in range(0, len(prompts), BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        seeds = [seed + number for number in range(len(prompts))[part]]
        values = {name: value[part] if isinstance(value, list) else value for name, value in call.items()}
        images = call_pipeline(pipeline, semantics[part], seeds, **values, output_type="pt")
        pixels.append(images.float().cpu() * 2 - 1)
    return torch.cat(pixels)


def _class_accuracy(judge: Judge, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    return (judge.class_and_flip(pixels)[0] == labels).float().mean().item()


def _orientation_accuracy(judge: Judge, pixels: torch.Tensor, labels: torch.Tensor, flips) -> float:
    """Share of the images of one-sided classes that have the requested orientation."""
    agrees = judge.class_and_flip(pixels)[1] == flips
    return agrees[_one_sided(judge, labels)].float().mean().item()


def _one_sided(judge: Judge, labels: torch.Tensor) -> torch.Tensor:
    """Mask (images,) of the images whose class has a defined orientation."""
    return torch.isin(labels, torch.tensor(judge.config.one_sided, dtype=labels.dtype))


def _detail(pipeline: ImprovedLDMPipeline, judge: Judge, real: RealImages, count: int, seed: int, **call) -> dict:
    """Effect of a lower `original_size` on detail and class. Each image has the same seed at every size."""
    prompts, labels = real.prompts(count)
    sizes = _sizes(pipeline.default_original_side)
    samples = [sample_images(pipeline, prompts, labels, seed, **sized(size), **call) for size in sizes]
    energies = [high_frequency_energy(pixels).mean().item() for pixels in samples]
    kept = _class_kept(judge, samples)
    return {
        "detail_original_sizes": sizes,
        "detail_high_frequency_energy": energies,
        "detail_falls_with_size": all(low < high for high, low in pairwise(energies)),
        "detail_class_kept": sum(kept[1:]) / len(kept[1:]),
        "detail_class_kept_by_size": kept,
        "real_class_kept_by_size": _class_kept(judge, [reduced(real.pixels, size) for size in sizes]),
        "num_detail_samples": count,
    }


def _crop(pipeline: ImprovedLDMPipeline, judge: Judge, real: RealImages, count: int, seed: int, **call) -> dict:
    """Share of the samples whose requested crop, one of `CROPS`, is recognised by a probe fitted to real images."""
    prompts, labels = real.prompts(count)
    numbers, num_classes = torch.arange(count), len(real.class_names)
    asked = (numbers % num_classes + numbers // num_classes) % len(CROPS)  # every class gets every crop
    side = pipeline.default_original_side
    controls = [CROPS[place].controls((side, side)) for place in asked]
    by_name = {name: [control[name] for control in controls] for name in controls[0]}
    samples = sample_images(pipeline, prompts, labels, seed, **by_name, **call)
    pixels = real.pixels[:MAX_PROBE_IMAGES]
    probe = CropProbe(pixels[::2])
    return {
        "crop_accuracy": (probe(samples) == asked).float().mean().item(),
        "real_crop_accuracy": probe.accuracy(pixels[1::2]),
    }


def _class_kept(judge: Judge, versions: list[torch.Tensor]) -> list[float]:
    """For each version of the same images, the share that the judge assigns the same class as the first version."""
    classes = [judge.class_and_flip(pixels)[0] for pixels in versions]
    return [(found == classes[0]).float().mean().item() for found in classes]


# Tests of the control inputs that the denoiser reads. The flip is tested on the samples whose class is judged.
TESTS = {"original_size": _detail, "crop_size": _crop}


def reduced(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Images (images, 3, height, width) scaled down to a side of `size` pixels and up again."""
    small = interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return interpolate(small, size=pixels.shape[-2:], mode="bicubic", antialias=True)


def sized(side: float) -> dict[str, tuple[float, float]]:
    """The control arguments that request a square original image with a side of `side` pixels."""
    return {"original_size": (side, side)}


def _sizes(side: int) -> list[int]:
    return [max(1, round(side * fraction)) for fraction in SIZE_FRACTIONS]


@dataclass(frozen=True)
class Steering:
    """Versions of a sample that differ in one control input, and the same change applied to real images.

    Args:
        label: Name of the measurement.
        asked: Maps the side of the original image in pixels to the control arguments of each version.
        undone: Maps the samples (images, 3, height, width) of a version to the images that are compared.
        real: Maps real images and the side to each version of them; None if `undone` leaves no difference.
    """

    label: str
    asked: Callable[[int], list[dict]]
    undone: Callable[[torch.Tensor], torch.Tensor] = lambda pixels: pixels
    real: Callable[[torch.Tensor, int], Iterable[torch.Tensor]] | None = None


STEERINGS = {
    "original_size": Steering(
        "original_size",
        asked=lambda side: [sized(size) for size in _sizes(side)[1:]],
        real=lambda pixels, side: (reduced(pixels, size) for size in _sizes(side)[1:]),
    ),
    "crop_size": Steering(
        "crop",
        asked=lambda side: [crop.controls((side, side)) for crop in CORNERS],
        real=lambda pixels, side: (cropped(pixels, crop) for crop in CORNERS),
    ),
    "flip": Steering("flip", asked=lambda side: [MIRRORED], undone=lambda pixels: pixels.flip(-1)),
}
