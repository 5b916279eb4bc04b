"""Measure the colour model on combinations of thing and style that it has seen, and on held-out ones.

Usage: python training/measure_emoji.py [--pipeline FOLDER] [--output FOLDER]

Two judges, trained on the real images by `configs/networks/emoji_style_judge.yaml` and `emoji_thing_judge.yaml`, say
which style and which thing a sample shows. Their accuracy on the real held-out images stands next to their findings.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import load_judge
from improved_ldm.evaluation.obedience import sample_images
from improved_ldm.evaluation.scores import RealFeatures, high_frequency_energy
from improved_ldm.exits import ArgumentParser, exit_on_error
from improved_ldm.provenance import device_name, launch_command, write_json

SOURCE = "embedded:emoji"
BATCH_SIZE = 50
ONE_SIDED = 0.15  # mean absolute difference from the mirror image, in [-1, 1], from which on an image has a side
SMALL = 0.25  # of the original size, in the test of detail


@dataclass(frozen=True)
class Emoji:
    """Real images of a split.

    Args:
        pixels: (images, 3, side, side) in [-1, 1].
        captions: one per image, "thing, style".
    """

    pixels: torch.Tensor
    captions: list[str]

    def part(self, places: torch.Tensor | list[int]) -> "Emoji":
        """The images at these places."""
        return Emoji(self.pixels[places], [self.captions[place] for place in places])

    @property
    def things(self) -> list[str]:
        return [caption.rsplit(", ", 1)[0] for caption in self.captions]

    @property
    def styles(self) -> list[str]:
        return [caption.rsplit(", ", 1)[1] for caption in self.captions]


def read_emoji(split: str, side: int) -> Emoji:
    """The whole images of a split at `side` pixels."""
    batches = list(make_pass(open_rows(SOURCE, split), ImageTransform(side), BATCH_SIZE))
    captions = [caption for batch in batches for caption in batch["caption"]]
    return Emoji(pixel_values(torch.cat([batch["pixels"] for batch in batches])), captions)


@dataclass(frozen=True)
class NamedJudge:
    """A judge with the names of its classes.

    Args:
        judge: the judge.
        names: name of each class.
    """

    judge: Judge
    names: list[str]

    @classmethod
    def load(cls, folder: str, column: str) -> "NamedJudge":
        judge = load_judge(folder)
        if judge is None:
            raise ValueError(f"{folder!r} is not the folder of a judge; `train_judge.py` makes one.")
        return cls(judge, open_rows(SOURCE, "train", label_column=column).class_names)

    def resized(self, pixels: torch.Tensor) -> torch.Tensor:
        side = self.judge.config.sample_size
        return interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.judge.features(self.resized(pixels))

    @torch.no_grad()
    def accuracy(self, pixels: torch.Tensor, names: list[str], among: int = 1) -> float:
        """Share of the images whose name is among the most probable ones."""
        scores = self.judge(self.resized(pixels)).logsumexp(2)
        asked = torch.tensor([self.names.index(name) for name in names])
        return (scores.topk(among).indices == asked[:, None]).any(1).float().mean().item()


def one_sided(pixels: torch.Tensor) -> torch.Tensor:
    """(images,) bool, which images differ from their mirror image."""
    return (pixels - pixels.flip(-1)).abs().mean((1, 2, 3)) > ONE_SIDED


def flipped_share(samples: torch.Tensor, real: torch.Tensor) -> float:
    """Share of the samples that are nearer to the mirrored real image than to the real one."""
    distances = [(samples - images).square().mean((1, 2, 3)) for images in (real, real.flip(-1))]
    return (distances[1] < distances[0]).float().mean().item()


def nearest_is_asked(samples: torch.Tensor, real: Emoji, every: Emoji, judge: NamedJudge) -> float:
    """Share of the samples of which the nearest real picture of the asked style shows the asked thing."""
    features, others = judge.features(samples), judge.features(every.pixels)
    distances = torch.cdist(features, others)
    same = torch.tensor([[style == other for other in every.styles] for style in real.styles])
    nearest = distances.masked_fill(~same, torch.inf).argmin(1)
    return sum(every.things[place] == thing for place, thing in zip(nearest, real.things, strict=True)) / len(samples)


def measure(
    pipeline: ImprovedLDMPipeline, real: Emoji, every: Emoji, style: NamedJudge, thing: NamedJudge, seed: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Draw each caption once and once mirrored.

    Args:
        pipeline: the pipeline.
        real: the real images with these captions.
        every: all real images.
        style, thing: the judges.
        seed: seed of the first sample; the others follow.

    Returns:
        The numbers, and the samples that are not mirrored.
    """
    draw = {flip: sample_images(pipeline, real.captions, torch.zeros(0), seed, flip=flip) for flip in (False, True)}
    plain, sided = draw[False], one_sided(real.pixels)
    distance = (plain - real.pixels).square().mean((1, 2, 3))
    shuffled = (plain - real.pixels.roll(1, 0)).square().mean((1, 2, 3))
    return {
        "num_samples": len(plain),
        "style_right": style.accuracy(plain, real.styles),
        "thing_right": thing.accuracy(plain, real.things),
        "thing_among_5": thing.accuracy(plain, real.things, among=5),
        "nearest_real_is_asked": nearest_is_asked(plain, real, every, thing),
        "nearer_to_its_real_image_than_to_another": (distance < shuffled).float().mean().item(),
        "num_one_sided": int(sided.sum()),
        "plain_is_not_mirrored": 1 - flipped_share(plain[sided], real.pixels[sided]),
        "flip_is_mirrored": flipped_share(draw[True][sided], real.pixels[sided]),
    }, plain


def detail(pipeline: ImprovedLDMPipeline, captions: list[str], seed: int) -> dict[str, float]:
    """Share of high frequencies in samples of full and of small original size, from the same seeds."""
    side = pipeline.default_original_side
    shares = {}
    for name, size in {"full": side, "small": round(side * SMALL)}.items():
        samples = sample_images(pipeline, captions, torch.zeros(0), seed, original_size=(size, size))
        shares[name] = high_frequency_energy(samples)
    smaller = (shares["small"] < shares["full"]).float().mean().item()
    means = {f"high_frequency_energy_{name}": share.mean().item() for name, share in shares.items()}
    return means | {"small_has_less_detail": smaller}


def main(argv: list[str] | None = None):
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", default="runs/emoji/model", help="folder of the colour model")
    parser.add_argument("--style_judge", default="runs/emoji/style_judge", help="folder of the judge of styles")
    parser.add_argument("--thing_judge", default="runs/emoji/thing_judge", help="folder of the judge of things")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji"), help="folder for metrics.json")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    arguments = parser.parse_args(argv)

    pipeline = ImprovedLDMPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    style = NamedJudge.load(arguments.style_judge, "style")
    thing = NamedJudge.load(arguments.thing_judge, "name")
    side = pipeline.default_size[0]
    seen, held_out = read_emoji("train", side), read_emoji("test", side)
    every = Emoji(torch.cat([seen.pixels, held_out.pixels]), seen.captions + held_out.captions)

    record = {
        "real": {
            "style_right": style.accuracy(held_out.pixels, held_out.styles),
            "thing_right": thing.accuracy(held_out.pixels, held_out.things),
            "thing_among_5": thing.accuracy(held_out.pixels, held_out.things, among=5),
        }
    }
    places = torch.linspace(0, len(seen.captions) - 1, len(held_out.captions)).round().long().tolist()
    for name, real in {"seen": seen.part(places), "held_out": held_out}.items():
        record[name], samples = measure(pipeline, real, every, style, thing, arguments.seed)
        features = RealFeatures(thing.features(every.pixels))
        record[name]["density"] = features.manifold_scores(thing.features(samples))["density"]
    record["detail"] = detail(pipeline, held_out.captions, arguments.seed)
    record |= {"device": device_name(pipeline.device), "command": launch_command()}
    write_json(arguments.output / "metrics.json", record)
    for name in ("real", "seen", "held_out", "detail"):
        print(name, {key: round(value, 3) for key, value in record[name].items()})


if __name__ == "__main__":
    with exit_on_error("not measured"):
        main(sys.argv[1:])
