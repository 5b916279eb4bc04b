"""Open the demo in a browser.

Usage: python -m improved_ldm.demo [FOLDER_OR_ID] [--host HOST] [--port PORT] [--root_path PATH] [--queue N] [--share]

It needs no arguments as the `app.py` of a Space on the Hub.
"""

import argparse
import re
import signal
import socket
import sys
from collections.abc import Callable

import torch

from improved_ldm.demo.bundled import BUNDLED, about_bundled, first_prompt, load_bundled
from improved_ldm.demo.limits import MAX_WAITING
from improved_ldm.exits import ArgumentParser, exit_on_error, leave
from improved_ldm.open_pipeline import open_pipeline
from improved_ldm.pipeline import ImprovedLDMPipeline

MAX_PORT = 2**16 - 1
MAX_QUEUE = 1000


def main(argv: list[str]):
    parser = ArgumentParser(
        prog="python -m improved_ldm.demo",
        description="Sample from a pipeline in a browser, with interactive control.",
    )
    parser.add_argument(
        "pipeline",
        metavar="FOLDER_OR_ID",
        nargs="?",
        default=BUNDLED,
        help=f"trained folder or Hub id, or {BUNDLED}, the small colour model of this package; default: %(default)s",
    )
    parser.add_argument("--port", type=_whole_number(MAX_PORT), help="default: the first free port from 7860")
    parser.add_argument(
        "--host",
        type=_host,
        help="IPv4 address or name of this machine; 0.0.0.0 listens on all its addresses; default: 127.0.0.1",
    )
    parser.add_argument(
        "--root_path",
        type=_root_path,
        metavar="PATH",
        help="where a reverse proxy serves the page: a path such as /improved, or the full URL",
    )
    parser.add_argument(
        "--queue",
        type=_whole_number(MAX_QUEUE),
        default=MAX_WAITING,
        metavar="N",
        help="maximum number of waiting requests; further ones are refused; default: %(default)s",
    )
    parser.add_argument(
        "--prompt", default=first_prompt(), metavar="TEXT", help="first prompt of a text model; default: %(default)s"
    )
    parser.add_argument("--share", action="store_true", help="also create a public link through Gradio's server")
    arguments = parser.parse_args(argv)
    try:
        from improved_ldm.demo.page import build_demo
    except ModuleNotFoundError as error:
        sys.exit(f'the demo needs {error.name}: pip install "improved_ldm[demo]"')
    try:
        pipeline = load_pipeline(arguments.pipeline)
    except (OSError, ValueError) as error:
        leave(f"{arguments.pipeline!r} does not load: {error}")
    about = about_bundled() if arguments.pipeline == BUNDLED else ""
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    print("drawing the first images")
    try:
        demo = build_demo(pipeline, arguments.pipeline, about, arguments.queue, arguments.prompt)
    except ValueError as error:
        leave(f"the first images are not drawn: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # exit normally, so that the images are removed
    try:
        demo.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            root_path=arguments.root_path,
            share=arguments.share,
        )
    except OSError as error:
        sys.exit(f"port {arguments.port} is in use; choose another with `--port`" if arguments.port else str(error))


def load_pipeline(place: str) -> ImprovedLDMPipeline:
    """Load the pipeline of a folder, a Hub id or this package.

    Raises:
        OSError: If there is no pipeline.
        ValueError: If the pipeline belongs to another family.
    """
    return load_bundled() if place == BUNDLED else open_pipeline(place)


def _whole_number(maximum: int) -> Callable[[str], int]:
    """Make a parser of whole numbers from 1 to `maximum`."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= maximum:
            raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number from 1 to {maximum}")
        return int(text)

    return read


def _host(text: str) -> str:
    try:
        with socket.socket() as listener:
            listener.bind((text, 0))  # to any free port
        if text:
            return text
    except (OSError, UnicodeError, ValueError):
        pass
    raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an IPv4 address or a name of this machine")


def _root_path(text: str) -> str:
    if not re.fullmatch(r"(https?://[^/\s?#]+)?(/[^/\s?#]+)*/?", text) or text in ("", "/"):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a path such as /improved, or a URL")
    return text.rstrip("/")


if __name__ == "__main__":
    with exit_on_error("not opened"):
        main(sys.argv[1:])
