"""Train a judge on your labelled images: a classifier of what an image shows and whether it is mirrored.

Usage: accelerate launch training/train_judge.py [--config FILE] [--section.key value …]

Without arguments it trains on the images that ship with the package.
"""

import sys

from improved_ldm.exits import exit_on_error
from improved_ldm.settings import parse_config_or_exit
from improved_ldm.trainer.judge_run import train_judge
from improved_ldm.trainer.lock import released_locks
from improved_ldm.trainer.network_config import JudgeRunConfig


def main(argv: list[str]):
    with released_locks():
        train_judge(parse_config_or_exit(JudgeRunConfig, argv))


if __name__ == "__main__":
    with exit_on_error("not trained", "training.batch_size"):
        main(sys.argv[1:])
