"""Turn a published checkpoint into a folder that `from_pretrained` loads.

Usage: python -m improved_ldm.convert SOURCE IN OUT [--config FILE] [--conditioning disentangled]
"""

import argparse
import json
import logging
import sys
from pathlib import Path

from improved_ldm.convert.files import read_checkpoint
from improved_ldm.convert.sources import DIFFUSERS, SOURCES, from_published


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m improved_ldm.convert",
        description="Turn a published checkpoint into a folder that from_pretrained loads.",
        epilog=f"The classes of diffusers are {', '.join(DIFFUSERS)}.",
    )
    parser.add_argument(
        "source", metavar="SOURCE", choices=[*SOURCES, "diffusers"], help=", ".join([*SOURCES, "diffusers"])
    )
    parser.add_argument(
        "checkpoint", metavar="IN", type=Path, help="a .safetensors, .pt, .pth, .ckpt or .bin file, or a folder"
    )
    parser.add_argument("folder", metavar="OUT", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--config",
        type=Path,
        help="JSON with the source's own constructor arguments; default: config.json beside the weights, and where "
        "there is none the source's defaults, which are those of the published XL/2 at 256 pixels",
    )
    parser.add_argument("--conditioning", choices=["published", "disentangled"], default="published")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        parser.error(f"{str(arguments.folder)!r} exists already.")
    logging.basicConfig(format="%(message)s")
    try:
        state_dict, config = read_checkpoint(arguments.checkpoint)
        if arguments.config is not None:
            config = json.loads(arguments.config.read_text())
        denoiser = from_published(arguments.source, state_dict, config, arguments.conditioning)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    denoiser.save_pretrained(arguments.folder)
    print(
        f"{type(denoiser).__name__}, {denoiser.summary}, {denoiser.num_parameters():,} parameters: {arguments.folder}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
