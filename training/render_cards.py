"""Render one card per member of the family, for models whose weights are not published yet.

Usage: python training/render_cards.py

Each card has the recipe and the command of the paper's size, and a table of all sizes. Models are built without
weights, from the configurations of the paper's two data sets.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.exits import ArgumentParser, exit_on_error
from improved_ldm.hub.card import render_card
from improved_ldm.models.cost import multiply_adds
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.settings import parse_config
from improved_ldm.trainer.components import build_denoiser, build_objective
from improved_ldm.trainer.config import RunConfig

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
SIZES = ("S/2", "B/2", "L/2", "XL/2")
PAPER_SIZE = "XL/2"
LAUNCH = ("accelerate", "launch", "--multi_gpu", "--num_processes", "16")  # the paper's batch of 2048 in both recipes


@dataclass(frozen=True)
class Recipe:
    """How a member is trained.

    Args:
        script: training script.
        config: configuration file.
        conditions: constructor arguments of the denoiser that follow from the data set or the text encoder.
        prompt: prompt or class label of the usage example.
    """

    script: str
    config: str
    conditions: dict[str, int]
    prompt: str | int


IMAGENET = Recipe(
    "training/train_class_conditional.py", "training/configs/imagenet_256.yaml", {"num_classes": 1000}, 207
)
CC12M = Recipe(
    "training/train_t2i.py",
    "training/configs/cc12m_256.yaml",
    {"text_dim": 768},  # of CLIP-L
    "a red bicycle against a white wall",
)
RECIPES = {"unet": CC12M, "dit": IMAGENET, "mdt": IMAGENET, "pixart": CC12M, "mmdit": CC12M}


def family_card(name: str) -> str:
    """The card of a member of the family: the recipe for `PAPER_SIZE`, and a table of all sizes."""
    recipe, folder = RECIPES[name], f"runs/{name}"
    arguments = {size: ["--denoiser.name", name, "--denoiser.size", size, "--output_dir", folder] for size in SIZES}
    configs = {size: parse_config(RunConfig, given, ROOT / recipe.config) for size, given in arguments.items()}
    pipelines = {size: meta_pipeline(config, recipe.conditions) for size, config in configs.items()}
    command = shlex.join([*LAUNCH, recipe.script, "--config", recipe.config, *arguments[PAPER_SIZE]])
    card = render_card(
        folder,
        pipelines[PAPER_SIZE],
        configs[PAPER_SIZE].model_dump(mode="json"),
        {"command": command},
        recipe.prompt,
        sizes=[size_row(size, pipelines[size].denoiser, configs[size].text.max_tokens) for size in SIZES],
    )
    return f"{card}\n"


def size_row(size: str, denoiser: Denoiser, max_tokens: int) -> dict[str, Any]:
    """A row of the table of sizes."""
    return {
        "size": size,
        "summary": denoiser.summary,
        "parameters": denoiser.num_parameters(),
        "multiply_adds": multiply_adds(denoiser, max_tokens),
    }


def meta_pipeline(config: RunConfig, conditions: dict[str, int]) -> ImprovedLDMPipeline:
    """The pipeline of a run without weights and without the text encoder, which the card does not need."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=[128, 256, 512, 512], **blocks)  # Stable Diffusion's: factor 8
        denoiser = build_denoiser(config, vae, **conditions)
    return ImprovedLDMPipeline(vae, build_objective(config).sampling_scheduler(), **{denoiser.component: denoiser})


def main(argv: list[str]):
    ArgumentParser(description=__doc__.partition("\n")[0]).parse_args(argv)
    CARDS.mkdir(exist_ok=True)
    for name in RECIPES:
        file = CARDS / f"{name}.md"
        file.write_text(family_card(name), encoding="utf-8")
        print(file)


if __name__ == "__main__":
    with exit_on_error("not rendered"):
        main(sys.argv[1:])
