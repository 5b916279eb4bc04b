"""Turn a published checkpoint into a folder that `from_pretrained` loads.

Usage: python -m improved_ldm.convert SOURCE IN OUT [--config FILE] [--conditioning disentangled]
"""

import logging
import sys
from pathlib import Path

from improved_ldm.convert.files import read_checkpoint, read_config
from improved_ldm.convert.sources import DIFFUSERS, SOURCES, from_published
from improved_ldm.exits import ArgumentParser, exit_on_error


def main(argv: list[str]):
    parser = ArgumentParser(
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
        help="JSON with the source's own constructor arguments; default: config.json next to the weights or, without "
        "one, the source's defaults, which are those of the published XL/2 at 256 pixels",
    )
    parser.add_argument("--conditioning", choices=["published", "disentangled"], default="published")
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        raise FileExistsError(f"OUT is {str(arguments.folder)!r}, which exists already; it must be a new folder.")
    logging.basicConfig(format="%(message)s")
    state_dict, config = read_checkpoint(arguments.checkpoint)
    if arguments.config is not None:
        config = read_config(arguments.config)
    denoiser = from_published(arguments.source, state_dict, config, arguments.conditioning)
    denoiser.save_pretrained(arguments.folder)
    print(
        f"{type(denoiser).__name__}, {denoiser.summary}, {denoiser.num_parameters():,} parameters: {arguments.folder}"
    )


if __name__ == "__main__":
    with exit_on_error("not converted"):
        main(sys.argv[1:])
