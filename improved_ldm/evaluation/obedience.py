"""Does a pipeline draw what it is asked for? A judge sees classes and orientation, a probe sees crops."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise

import torch
from torch.nn.functional import interpolate

from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import Rows, open_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.embedded import resolve
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.probe import CROPS, CropProbe
from improved_ldm.evaluation.sampling import call_pipeline
from improved_ldm.evaluation.scores import frechet_distance, high_frequency_energy, manifold_scores
from improved_ldm.pipeline import ImprovedLDMPipeline

BATCH_SIZE = 250
NUM_REAL_IMAGES = 2000  # of the test split, that samples are compared with
# Original sizes asked for in the test of detail, as fractions of the default. Below a half the judge no longer knows
# many real images that are reduced as far.
SIZE_FRACTIONS = (1.0, 0.875, 0.75, 0.625, 0.5)
MAX_PROBE_IMAGES = 1000  # real images that the probe is fitted and tested on, half and half


@dataclass(frozen=True)
class RealImages:
    """Real images of the test split that samples are compared with.

    Args:
        pixels: (images, 3, height, width) in [−1, 1].
        labels: (images,) int.
        captions: one an image.
        class_names: in the order of the labels.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    captions: list[str]
    class_names: list[str]

    def prompts(self, count: int) -> tuple[list, torch.Tensor]:
        """Captions of `count` images, the classes in turn, and their labels."""
        places = [torch.nonzero(self.labels == label).flatten().tolist() for label in range(len(self.class_names))]
        chosen = [places[i % len(places)][i // len(places) % len(places[i % len(places)])] for i in range(count)]
        return [self.captions[place] for place in chosen], self.labels[chosen]


def load_real_images(rows: Rows, resolution: int, count: int) -> RealImages:
    """The first `count` images of a labelled, captioned set, whole and unflipped, at a resolution in pixels."""
    loader = make_loader(rows, ImageTransform(resolution), BATCH_SIZE, shuffle_window=1, repeat=False)
    batches = list(islice(loader, -(-count // BATCH_SIZE)))
    return RealImages(
        torch.cat([batch["pixels"] for batch in batches])[:count],
        torch.cat([batch["label"] for batch in batches])[:count],
        [caption for batch in batches for caption in batch["caption"]][:count],
        rows.class_names,
    )


def open_judged(
    place: str | None, source: str, side: int, say: Callable[[str], None]
) -> tuple[Judge, RealImages] | None:
    """A judge and real images, where the judge knows the data.

    Args:
        place: `embedded:judge` or a folder of a `Judge`; None judges nothing.
        source: the data set, as `open_rows` takes it.
        side: pixels a side of the samples.
        say: told what is done.
    """
    if place is None:
        return None
    judge = Judge.from_pretrained(resolve(place)).eval()
    if judge.config.data_source != source or judge.config.sample_size != side:
        say(f"not judged: {place} knows {judge.config.data_source} at {judge.config.sample_size} pixels")
        return None
    return judge, load_real_images(open_rows(source, "test", label_column="label"), side, NUM_REAL_IMAGES)


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
    """Measure a pipeline, by default at its own guidance and steps.

    Args:
        pipeline: what is measured.
        judge: looks at the samples.
        real: test images of the judge's own data set.
        num_samples: images whose class and orientation are judged, half of them asked to be flipped.
        num_coverage_samples: images for coverage and Fréchet distance, none flipped.
        num_detail_samples: images that are drawn at several original sizes each, and once more, each with one of
            several crops.
        seed: image i is drawn from `seed` + i.
        call: further arguments of the pipeline, for every image: `control_guidance_scale`, …

    Returns:
        Named shares and distances; the shares of the judge and the probe on the real images stand beside them. Those
        of orientation are left out where no class that is one-sided was asked for.
    """
    num_samples -= num_samples % 2
    prompts, labels = real.prompts(num_samples)
    flips = torch.arange(num_samples) // len(real.class_names) % 2
    read = pipeline.denoiser.control_inputs
    asked_flips = flips.bool().tolist() if "flip" in read else None
    samples = draw(pipeline, prompts, labels, seed, flip=asked_flips, **call)
    results = {
        "class_accuracy": _class_accuracy(judge, samples, labels),
        "real_class_accuracy": _class_accuracy(judge, real.pixels, real.labels),
        "num_samples": num_samples,
    }
    if _one_sided(judge, labels).any():
        results["real_orientation_accuracy"] = _orientation_accuracy(judge, real.pixels, real.labels, False)
        if "flip" in read:
            results["orientation_accuracy"] = _orientation_accuracy(judge, samples, labels, flips)
    if "original_size" in read:
        results |= _detail(pipeline, judge, real, num_detail_samples, seed, **call)
    if "crop_size" in read:
        results |= _crop(pipeline, real, num_detail_samples, seed, **call)

    prompts, labels = real.prompts(num_coverage_samples)
    fake_features = judge.features(draw(pipeline, prompts, labels, seed + num_samples, **call))
    real_features = judge.features(real.pixels)
    return results | {
        "coverage": manifold_scores(real_features, fake_features)["coverage"],
        "judge_fid": frechet_distance(real_features, fake_features),
        "num_coverage_samples": num_coverage_samples,
        "num_real_images": len(real.pixels),
    }


def draw(pipeline: ImprovedLDMPipeline, prompts: list[str], labels: torch.Tensor, seed: int, **call) -> torch.Tensor:
    """Samples (images, 3, height, width) in [−1, 1], image i from `seed` + i.

    `call` are further arguments of the pipeline; a list has one value an image.
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
    """Share of the images of one-sided classes that look the asked way."""
    agrees = judge.class_and_flip(pixels)[1] == flips
    return agrees[_one_sided(judge, labels)].float().mean().item()


def _one_sided(judge: Judge, labels: torch.Tensor) -> torch.Tensor:
    """Which images (images,) are of a class whose orientation can be told."""
    return torch.isin(labels, torch.tensor(judge.config.one_sided, dtype=labels.dtype))


def _detail(pipeline: ImprovedLDMPipeline, judge: Judge, real: RealImages, count: int, seed: int, **call) -> dict:
    """What a lower `original_size` does to detail and to the class, each image from the same seed at every size."""
    prompts, labels = real.prompts(count)
    side = original_side(pipeline)
    sizes = [max(1, round(side * fraction)) for fraction in SIZE_FRACTIONS]
    samples = [draw(pipeline, prompts, labels, seed, original_size=(size, size), **call) for size in sizes]
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


def _crop(pipeline: ImprovedLDMPipeline, real: RealImages, count: int, seed: int, **call) -> dict:
    """Share of the samples, each asked for one of `CROPS`, that a probe of real images takes for that crop."""
    prompts, labels = real.prompts(count)
    numbers, num_classes = torch.arange(count), len(real.class_names)
    asked = (numbers % num_classes + numbers // num_classes) % len(CROPS)  # each class meets all of them
    side = original_side(pipeline)
    controls = [CROPS[place].controls((side, side)) for place in asked]
    by_name = {name: [control[name] for control in controls] for name in controls[0]}
    samples = draw(pipeline, prompts, labels, seed, **by_name, **call)
    pixels = real.pixels[:MAX_PROBE_IMAGES]
    probe = CropProbe(pixels[::2])
    return {
        "crop_accuracy": (probe(samples) == asked).float().mean().item(),
        "real_crop_accuracy": probe.accuracy(pixels[1::2]),
    }


def _class_kept(judge: Judge, versions: list[torch.Tensor]) -> list[float]:
    """For each version of the same images, the share whose class the judge finds as in the first version."""
    classes = [judge.class_and_flip(pixels)[0] for pixels in versions]
    return [(found == classes[0]).float().mean().item() for found in classes]


def original_side(pipeline: ImprovedLDMPipeline) -> int:
    """Shorter side, pixels, of the original size that a pipeline asks for by default."""
    return pipeline.config.default_original_size or pipeline.default_size


def reduced(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """Images (images, 3, height, width) scaled down to `size` pixels a side and up again."""
    small = interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return interpolate(small, size=pixels.shape[-2:], mode="bicubic", antialias=True)
