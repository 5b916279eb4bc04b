"""Render the card of every member of the family in every size, as it stands before weights are published.

Usage: python training/render_cards.py

Models are made without weights; recipe and command are those of the configurations for the paper's two data sets.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.hub.card import render_card
from improved_ldm.models.denoiser import Denoiser
from improved_ldm.trainer.components import build_denoiser, build_objective
from improved_ldm.trainer.config import RunConfig, parse_config

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
SIZES = ("S/2", "B/2", "L/2", "XL/2")
LAUNCH = ("accelerate", "launch", "--multi_gpu", "--num_processes", "16")  # the paper's batch of 2048 in both recipes


@dataclass(frozen=True)
class Recipe:
    """How a member is trained.

    Args:
        script: that trains it.
        config: its configuration.
        conditions: what the data set or the text encoder tells the denoiser.
        prompt: for the lines of use.
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


def family_cards(name: str) -> dict[str, str]:
    """The cards of a member of the family by file name, one a size; each has a table of all its sizes."""
    recipe, models, rows = RECIPES[name], {}, []
    for size in SIZES:
        folder = f"runs/{name}-{size.replace('/', '-')}"
        arguments = ["--denoiser.name", name, "--denoiser.size", size, "--output_dir", folder]
        config = parse_config(RunConfig, arguments, ROOT / recipe.config)
        pipeline = meta_pipeline(config, recipe.conditions)
        command = shlex.join([*LAUNCH, recipe.script, "--config", recipe.config, *arguments])
        models[folder] = pipeline, config.model_dump(mode="json"), {"command": command}
        row = {"size": size, "summary": pipeline.denoiser.summary, "parameters": pipeline.denoiser.num_parameters()}
        rows.append(row | {"multiply_adds": multiply_adds(pipeline.denoiser, config.text.max_tokens)})
    return {
        f"{Path(folder).name}.md": f"{render_card(folder, *model, recipe.prompt, sizes=rows)}\n"
        for folder, model in models.items()
    }


def meta_pipeline(config: RunConfig, conditions: dict[str, int]) -> ImprovedLDMPipeline:
    """The pipeline of a run without weights, and without the text encoder, which a card does not look at."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        vae = AutoencoderKL(block_out_channels=[128, 256, 512, 512], **blocks)  # Stable Diffusion's: factor 8
        denoiser = build_denoiser(config, vae, **conditions)
    return ImprovedLDMPipeline(vae, build_objective(config).sampling_scheduler(), **{denoiser.component: denoiser})


def multiply_adds(denoiser: Denoiser, max_tokens: int) -> float:
    """Of one evaluation for one image, with a text of `max_tokens` where the denoiser reads text.

    Args:
        denoiser: on the meta device.
        max_tokens: tokens a prompt.
    """
    config, conditions = denoiser.config, {}
    if config.text_dim:
        conditions["encoder_hidden_states"] = torch.empty(1, max_tokens, config.text_dim, device="meta")
    latents = torch.empty(1, config.in_channels, config.sample_size, config.sample_size, device="meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        denoiser.eval()(latents, torch.empty(1), **conditions)
    return counter.get_total_flops() / 2


def main():
    CARDS.mkdir(exist_ok=True)
    for name in RECIPES:
        for file, text in family_cards(name).items():
            (CARDS / file).write_text(text)
            print(CARDS / file)


if __name__ == "__main__":
    main()
