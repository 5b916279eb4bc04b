"""Publish a trained folder on the Hugging Face Hub, as a tagged version.

Usage: python training/publish.py --pipeline runs/x --repo user/name --version v0.1
       [--variant ema|fp16] [--private true] [--base user/base]

Sign in with `hf auth login`, or set HF_TOKEN. A run in stages becomes one version a stage.
An adapter whose base is a folder here needs `--base`, where that base is published.
"""

import logging
import sys
from pathlib import Path

from improved_ldm.hub.content import Variant
from improved_ldm.hub.publish import publish
from improved_ldm.hub.repository import HubError
from improved_ldm.trainer.config import Section, exit_on_error, parse_config_or_exit


class Config(Section):
    """What is published, and where."""

    pipeline: Path  # the folder of a finished run
    repo: str  # user/name
    version: str  # the tag
    variant: Variant | None = None  # weights beside the plain ones
    private: bool = False
    base: str | None = None  # user/name where an adapter's base is published


def main(argv: list[str]):
    config = parse_config_or_exit(Config, argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("improved_ldm").setLevel(logging.INFO)
    with exit_on_error("not published", HubError):
        versions = publish(config.pipeline, config.repo, config.version, config.variant, config.private, config.base)
    for version in versions:
        print(f'DiffusionPipeline.from_pretrained("{config.repo}", revision="{version}")')


if __name__ == "__main__":
    main(sys.argv[1:])
