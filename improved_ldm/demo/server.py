"""Restrict Gradio's server to what a page without uploads needs, and refuse everything else."""

import inspect
import logging
import os
import re
from pathlib import Path
from typing import Any, NoReturn

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from improved_ldm.demo.limits import shown
from improved_ldm.demo.pictures import PictureFolder
from improved_ldm.exits import one_line

MAX_BODY = 64 * 2**10  # bytes of a request; a page of text and numbers sends 1 or 2 kB
MAX_SESSIONS = 1000  # visits in memory at once
API = "/gradio_api/"
FILE = f"{API}file="
# Methods and paths that a page without files needs. Uploads, streams, proxies, recordings, component servers, calls
# that bypass the queue, deep links, monitoring and the development tools are closed.
OPEN = {
    "POST": rf"/login/?|{API}(call/(v2/)?[^/]+/?|queue/join|cancel|reset/?)",
    "GET": rf"(?!{API}|/monitoring).*|{API}(call/(v2/)?[^/]+/[^/]+|queue/(data|status)|heartbeat/[^/]+"
    r"|(info|user|token|app_id|login_check|openapi\.json)/?|startup-events|theme\.css)",
}

logger = logging.getLogger("improved_ldm.demo")


def refuse(message: str) -> NoReturn:
    """Send a client a one-line error, and log the same line without a traceback."""
    line = _line(message)
    logger.warning("refused: %s", line)
    raise gr.Error(line, print_exception=False)


def warn(message: str):
    """Show a visitor a one-line warning."""
    gr.Warning(_line(message))


def _line(message: str) -> str:
    return one_line(message).replace("<", "‹")  # a browser renders it as HTML, other clients as plain text


class Page(gr.Blocks):
    """Blocks without uploads, with a server that is closed except for what they need.

    Only `launch` closes the server. In another application, the page has all routes that Gradio mounts there.

    Args:
        pictures: The only files that are served. They are removed when the page closes.
        kwargs: Further arguments of `gradio.Blocks`.
    """

    def __init__(self, pictures: PictureFolder, **kwargs: Any):
        super().__init__(**kwargs)
        self.pictures = pictures
        gr.set_static_paths([pictures.path])  # served directly, without a copy in Gradio's cache

    def launch(self, *args: Any, app_kwargs: dict[str, Any] | None = None, **kwargs: Any):
        """Open the page like `gradio.Blocks.launch`, on a server that accepts no files and no large requests."""
        app_kwargs = dict(app_kwargs or {})
        app_kwargs["middleware"] = [
            Middleware(ClosedRoutes, folder=self.pictures.path),
            *app_kwargs.get("middleware", []),
        ]
        defaults = {"run_history": False, "enable_monitoring": False, "state_session_capacity": MAX_SESSIONS}
        return super().launch(*args, app_kwargs=app_kwargs, **defaults | kwargs)

    def close(self, *args: Any, **kwargs: Any):
        """Close the server and remove the images."""
        super().close(*args, **kwargs)
        self.pictures.clear()

    def validate_inputs(self, block_fn, inputs: list[Any]):
        """Refuse a wrong number of inputs, and files, which Gradio would fetch before calling a function."""
        expected = len(block_fn.inputs)
        if len(inputs) != expected:
            refuse(f"`{block_fn.name}` takes {expected} inputs; {len(inputs)} were sent.")
        for name, value in zip(inspect.signature(block_fn.fn).parameters, inputs, strict=False):
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            is_file = isinstance(value, dict) and bool({"path", "meta"} & value.keys())
            if is_file or any(isinstance(part, dict | list) for part in parts):
                refuse(f"`{name}` is {shown(value)}; it must be text, a number or a flat record, not a file.")


class ClosedRoutes:
    """ASGI middleware that passes on only requests to `OPEN` paths and images, with at most `MAX_BODY` bytes.

    Args:
        app: Application that receives the requests.
        folder: Folder of the images.
    """

    def __init__(self, app: ASGIApp, folder: Path):
        self.app = app
        self.folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = await _read_body(receive)
        if not self._is_open(scope):
            return await PlainTextResponse("This page does not accept this request.", 403)(scope, receive, send)
        if body is None:
            return await PlainTextResponse(f"A request can have at most {MAX_BODY} bytes.", 413)(scope, receive, send)
        await self._answer(scope, _after(body, receive), send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send):
        """Let Gradio answer. It fails only for an unknown function or visit, which is logged in one line."""
        has_begun = False

        async def send_on(message: Message):
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except Exception as error:  # errors of sampling are raised in the queue, not here
            kind, text = type(error).__name__, shown(str(error))
            logger.warning("refused: %s %s: %s: %s", scope["method"], shown(scope["path"]), kind, text)
            if has_begun:
                return await send({"type": "http.response.body"})  # the last part
            answer = PlainTextResponse(
                "The request names a function, a parameter or a visit that does not exist.", 400
            )
            await answer(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if method == "GET" and path.startswith(FILE):
            return Path(os.path.abspath(path.removeprefix(FILE))).is_relative_to(self.folder)
        return re.fullmatch(OPEN.get(method, ""), path) is not None


async def _read_body(receive: Receive) -> list[Message] | None:
    """The messages of a request's body, or None if it is too large.

    A large body is read to its end, because a client receives no response before it has sent everything.
    """
    messages, size, more = [], 0, True
    while more:
        message = await receive()
        size += len(message.get("body", b""))
        more = message.get("more_body", False)
        if size <= MAX_BODY:
            messages.append(message)
    return messages if size <= MAX_BODY else None


def _after(messages: list[Message], receive: Receive) -> Receive:
    """A `receive` function that returns the messages already read, then new ones."""
    waiting = iter(messages)

    async def receive_next() -> Message:
        return next(waiting, None) or await receive()

    return receive_next
