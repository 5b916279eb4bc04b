"""Open the demo in a browser.

Usage: python -m improved_ldm.demo [FOLDER_OR_ID] [--port PORT] [--share]

As the `app.py` of a Space on the Hub this file needs no argument.
"""

import argparse
import sys
from pathlib import Path

import torch

from improved_ldm.demo.bundled import BUNDLED, about_bundled, load_bundled
from improved_ldm.pipeline import ImprovedLDMPipeline

QUICKSTART = "runs/quickstart"  # where the quickstart leaves its pipeline
MAX_PORT = 2**16 - 1


def main(argv: list[str]):
    parser = argparse.ArgumentParser(
        prog="python -m improved_ldm.demo", description="Draw from a pipeline in a browser and steer it by hand."
    )
    parser.add_argument(
        "pipeline",
        metavar="FOLDER_OR_ID",
        nargs="?",
        default=default_pipeline(),
        help=f"a trained folder or a Hub id, or {BUNDLED}, the tiny pipeline of this package; default: %(default)s",
    )
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also open a public link, through Gradio's server")
    arguments = parser.parse_args(argv)
    try:
        from improved_ldm.demo.page import build_demo
    except ModuleNotFoundError as error:
        sys.exit(f'the demo needs {error.name}: pip install "improved_ldm[demo]"')
    try:
        pipeline = load_pipeline(arguments.pipeline)
    except (OSError, ValueError) as error:
        sys.exit(f"{arguments.pipeline!r} does not load: {error}")
    about = about_bundled() if arguments.pipeline == BUNDLED else ""
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    demo = build_demo(pipeline, arguments.pipeline, about)
    try:
        demo.launch(server_port=arguments.port, share=arguments.share)
    except OSError as error:
        sys.exit(f"port {arguments.port} is in use; choose another with `--port`" if arguments.port else str(error))


def default_pipeline() -> str:
    """What the quickstart left, if it was run here, else what ships with the package."""
    return QUICKSTART if (Path(QUICKSTART) / "model_index.json").is_file() else BUNDLED


def load_pipeline(place: str) -> ImprovedLDMPipeline:
    """The pipeline of a folder, a Hub id or this package.

    Raises:
        OSError: where there is no pipeline.
        ValueError: for a pipeline of another family.
    """
    if place == BUNDLED:
        return load_bundled()
    name = ImprovedLDMPipeline.load_config(place).get("_class_name")
    if name != ImprovedLDMPipeline.__name__:
        raise ValueError(f"it is a {name}; it must be an {ImprovedLDMPipeline.__name__}.")
    return ImprovedLDMPipeline.from_pretrained(place)


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PORT:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number from 1 to {MAX_PORT}")
    return int(text)


if __name__ == "__main__":
    main(sys.argv[1:])
