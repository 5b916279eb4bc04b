"""Train an autoencoder on your images; a denoiser is then trained on its latents.

Usage: accelerate launch training/train_autoencoder.py [--config FILE] [--section.key value …]

Without arguments it trains on the images that ship with the package.
"""

import sys

from improved_ldm.exits import exit_on_error
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.autoencoder_run import train_autoencoder
from improved_ldm.trainer.lock import released_locks
from improved_ldm.trainer.network_config import AutoencoderRunConfig


def main(argv: list[str]):
    with released_locks():
        train_autoencoder(parse_config_or_exit(AutoencoderRunConfig, argv))


if __name__ == "__main__":
    with exit_on_error("not trained", "training.batch_size"):
        main(sys.argv[1:])
