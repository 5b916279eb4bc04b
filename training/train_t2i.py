"""Train a text-to-image model; stages of the run may change the kind of condition.

Usage: accelerate launch training/train_t2i.py [--config FILE] [--section.key value …]

Without arguments it trains the quickstart on the images that ship with the package.
"""

import sys
from pathlib import Path

from improved_ldm.exits import exit_on_error
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.lock import released_locks
from improved_ldm.trainer.train_stages import train_stages

QUICKSTART = Path(__file__).parent / "configs" / "quickstart.yaml"


def main(argv: list[str]):
    with released_locks():
        train_stages(parse_config_or_exit(RunConfig, argv, QUICKSTART), "text")


if __name__ == "__main__":
    with exit_on_error("not trained", "training.batch_size"):
        main(sys.argv[1:])
