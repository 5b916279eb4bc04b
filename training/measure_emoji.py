"""Measure the colour model on combinations of thing and style that it was trained on, and on held-out ones.

Usage: python training/measure_emoji.py [--pipeline FOLDER] [--output FOLDER]

A judge, trained on real images by `configs/networks/emoji_style_judge.yaml`, names the style of a sample, and the CLIP
pair of the model names the thing. Their accuracy on the real held-out images stands next to the results.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import interpolate

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.clip_score import ClipScorer, open_clip_scorer
from improved_ldm.evaluation.counterparts import evaluate_counterparts, load_counterparts
from improved_ldm.evaluation.judge import Judge
from improved_ldm.evaluation.networks import load_judge
from improved_ldm.evaluation.scores import RealFeatures
from improved_ldm.exits import ArgumentParser, exit_on_error
from improved_ldm.provenance import device_name, launch_command, write_json
from improved_ldm.settings import parse_config
from improved_ldm.trainer.config import RunConfig

CONFIG = Path(__file__).parent / "configs" / "emoji_64_128.yaml"
AMONG = 5  # things among which the asked one is looked for


def thing_and_style(caption: str) -> tuple[str, str]:
    """The parts of a caption "thing, style"."""
    thing, _, style = caption.rpartition(", ")
    return thing, style


@dataclass(frozen=True)
class Namer:
    """Names the style and the thing of images.

    Args:
        judge: Judge of styles.
        styles: Name of each class of the judge.
        clip: CLIP pair that compares images with captions.
        things: All things that a caption may name.
    """

    judge: Judge
    styles: list[str]
    clip: ClipScorer
    things: list[str]

    @torch.no_grad()
    def shares_right(self, pixels: torch.Tensor, captions: list[str]) -> dict[str, float]:
        """Shares of images (images, 3, height, width) in [−1, 1] whose style and thing are those of the captions."""
        side = self.judge.config.sample_size
        resized = interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(-1, 1)
        found = [self.styles[label] for label in self.judge.class_and_flip(resized)[0]]
        things, styles = zip(*map(thing_and_style, captions), strict=True)
        nearest = self._nearest_things(pixels, styles) == torch.tensor(
            [[self.things.index(thing)] for thing in things]
        )
        return {
            "style_right": sum(map(str.__eq__, found, styles)) / len(captions),
            "thing_right": nearest[:, 0].float().mean().item(),
            f"thing_among_{AMONG}": nearest.any(1).float().mean().item(),
        }

    def _nearest_things(self, pixels: torch.Tensor, styles: tuple[str, ...]) -> torch.Tensor:
        """Places (images, AMONG) of the things whose captions, in the style of each image, match it best."""
        embedded = {
            style: self.clip.embed_prompts([f"{thing}, {style}" for thing in self.things]) for style in self.styles
        }
        scores = [embedded[style] @ image for image, style in zip(self.clip.embed(pixels), styles, strict=True)]
        return torch.stack(scores).topk(AMONG).indices.cpu()


def open_namer(source: str, style_judge: str, clip: str, things: list[str]) -> Namer:
    """Open the networks that name styles and things.

    Args:
        source: Data set of the judge.
        style_judge: Folder of the judge of styles.
        clip: Folder of the CLIP pair.
        things: All things that a caption may name.

    Raises:
        ValueError: If `style_judge` is not the folder of a judge.
        MissingWeightsError: If the CLIP pair is not available.
    """
    judge = load_judge(style_judge)
    if judge is None:
        raise ValueError(f"`style_judge` is {style_judge!r}; it must be the folder of a judge from `train_judge.py`.")
    styles = open_rows(source, "train", label_column="style").class_names
    return Namer(judge, styles, open_clip_scorer(clip), things)


def main(argv: list[str]):
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pipeline", default="runs/emoji/model", help="folder of the colour model")
    parser.add_argument("--style_judge", default="runs/emoji/style_judge", help="folder of the judge of styles")
    parser.add_argument("--clip", default="runs/emoji/clip", help="folder of the CLIP pair")
    parser.add_argument("--output", type=Path, default=Path("runs/emoji/metrics.json"), help="file of the results")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first sample")
    arguments = parser.parse_args(argv)

    pipeline = ImprovedLDMPipeline.from_pretrained(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    data, side = parse_config(RunConfig, [], CONFIG).data, pipeline.default_size[0]
    seen, held_out = (
        load_counterparts(open_rows(data.source, split), side).matching(data.caption_pattern)
        for split in ("train", "test")
    )
    things = sorted({thing_and_style(caption)[0] for caption in seen.captions})
    namer = open_namer(data.source, arguments.style_judge, arguments.clip, things)

    record = {"real": namer.shares_right(held_out.pixels, held_out.captions)}
    places = torch.linspace(0, len(seen.captions) - 1, len(held_out.captions)).round().long().tolist()
    for name, real in {"seen": seen.part(places), "held_out": held_out}.items():
        shares, samples = evaluate_counterparts(pipeline, real, arguments.seed)
        manifold = RealFeatures(namer.clip.embed(real.pixels)).manifold_scores(namer.clip.embed(samples))
        record[name] = namer.shares_right(samples, real.captions) | shares | {"coverage": manifold["coverage"]}
    for name, numbers in record.items():
        print(name, {key: round(value, 3) for key, value in numbers.items()})
    write_json(arguments.output, record | {"device": device_name(pipeline.device), "command": launch_command()})


if __name__ == "__main__":
    with exit_on_error("not measured"):
        main(sys.argv[1:])
