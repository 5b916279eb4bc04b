"""Train a contrastive text-and-image pair (CLIP) on your captioned images.

The folder it writes loads with `CLIPModel`, `CLIPTextModel`, `CLIPTokenizer` and `CLIPImageProcessor`. The text tower
can condition a denoiser; the pair can score how well samples follow their prompts.

Usage: accelerate launch training/train_clip.py [--config FILE] [--section.key value …]

Without arguments it trains on the images that ship with the package.
"""

import sys

from improved_ldm.exits import exit_on_error
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.clip_run import train_clip
from improved_ldm.trainer.lock import released_locks
from improved_ldm.trainer.network_config import ClipRunConfig


def main(argv: list[str]):
    with released_locks():
        train_clip(parse_config_or_exit(ClipRunConfig, argv))


if __name__ == "__main__":
    with exit_on_error("not trained", "training.batch_size"):
        main(sys.argv[1:])
