"""Publish a trained folder on the Hugging Face Hub, as a tagged version.

Usage: python training/publish.py --pipeline runs/x --repo user/name --version v0.1
       [--variant ema|fp16] [--private true] [--base user/base] [--replace true]

Sign in with `hf auth login`, or set HF_TOKEN. A run with stages becomes one version per stage; `main` moves to the
last. An adapter whose base is a local folder needs `--base`, the repository where that base is published.
"""

import logging
import sys

from improved_ldm.bounds import LocalPath, Text
from improved_ldm.exits import exit_on_error
from improved_ldm.hub.content import Variant
from improved_ldm.hub.publish import loading_lines, publish
from improved_ldm.settings import Section, parse_config_or_exit


class Config(Section):
    """What is published, and where."""

    pipeline: LocalPath
    """Folder of a finished run."""
    repo: Text
    """`user/name` on the Hub."""
    version: Text
    """Tag of the version, such as v0.1."""
    variant: Variant | None = None
    """Weights to publish next to the plain ones."""
    private: bool = False
    """Require a private repository."""
    base: Text | None = None
    """`user/name` where the base of an adapter is published."""
    replace: bool = False
    """Replace files of the repository that were not published by this script."""


def main(argv: list[str]):
    config = parse_config_or_exit(Config, argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("improved_ldm").setLevel(logging.INFO)
    folder, repo, base = config.pipeline, config.repo, config.base
    versions = publish(folder, repo, config.version, config.variant, config.private, base, config.replace)
    print("\n".join(loading_lines(folder, repo, versions, base)))


if __name__ == "__main__":
    with exit_on_error("not published"):
        main(sys.argv[1:])
