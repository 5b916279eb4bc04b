"""Train a class-conditional model; stages of the run may change the kind of condition.

Usage: accelerate launch training/train_class_conditional.py [--config FILE] [--section.key value …]

Without arguments it trains on the ten classes of the images that ship with the package.
"""

import sys
from pathlib import Path

from improved_ldm.exits import exit_on_error
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.lock import released_locks
from improved_ldm.trainer.train_stages import train_stages

DEFAULT = Path(__file__).parent / "configs" / "fashion_classes.yaml"


def main(argv: list[str]):
    with released_locks():
        train_stages(parse_config_or_exit(RunConfig, argv, DEFAULT), "class")


if __name__ == "__main__":
    with exit_on_error("not trained", "training.batch_size"):
        main(sys.argv[1:])
