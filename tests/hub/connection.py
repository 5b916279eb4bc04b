"""HTTP connections of the Hub's double: requests, responses and injected faults."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any, Literal
from urllib.parse import urlsplit

TRICKLE = 0.2  # seconds between two bytes of a slow response


class Refusal(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {}


@dataclass
class Fault:
    """A fault for the next matching requests: an error response, or an incomplete or slow one.

    Args:
        method: Method of the request; "" matches any method.
        pattern: Regular expression to find in the path of the request.
        status: Status of the response; None keeps the correct response.
        times: Number of requests with the fault.
        after: Number of matching requests that are answered correctly first.
        headers: Headers of the response.
        lost_answer: Whether the request takes effect despite the error.
        body: What happens to the correct body after `sent` bytes: the connection is closed (`cut`), nothing more is
            sent (`stall`), or it is sent byte by byte (`trickle`). With `silence`, not even the headers are sent.
        sent: Number of bytes that are sent before the fault.
    """

    method: str
    pattern: str
    status: int | None = None
    times: int = 1
    after: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    lost_answer: bool = False
    body: Literal["cut", "stall", "trickle", "silence"] | None = None
    sent: int = 0


@dataclass(frozen=True)
class Request:
    """A request in the log."""

    method: str
    path: str
    status: int


class Connection(BaseHTTPRequestHandler):
    """Reads requests and sends the status, answer and headers that `dispatch` returns."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass  # the server has its own log

    def do_any(self):
        path = urlsplit(self.path).path
        fault = self.server.take_fault(self.command, path)
        try:
            body = b"".join(self._body())
            if self.command == "PUT" and not self.server.takes_upload():
                self._read(1)  # wait until the client disconnects
            if fault and fault.body == "silence":
                self._wait_until_gone()
            if fault and fault.status and not fault.lost_answer:
                raise Refusal(fault.status, "out of order")
            status, answer, headers = self.dispatch(path, body)
            if fault and fault.status:
                raise Refusal(fault.status, "the answer is lost")
        except Refusal as refusal:
            status, answer = refusal.status, {"error": str(refusal), **refusal.body}
            headers = {"X-Error-Message": str(refusal), **(fault.headers if fault else {})}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
        except ConnectionError:
            self.close_connection = True
            return
        self.server.log.append(Request(self.command, path, status))
        try:
            self._send(status, answer, headers, fault)
        except ConnectionError:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_any

    def _body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self._read(size)
                self.rfile.readline()
            self.rfile.readline()
        elif size := int(self.headers.get("Content-Length", 0)):
            yield self._read(size)

    def _read(self, size: int) -> bytes:
        content = self.rfile.read(size)
        if len(content) < size:
            raise ConnectionError("the client has gone")
        return content

    def _wait_until_gone(self):
        self.wfile.flush()
        self.server.stalled.set()
        self._read(1)

    def _send(self, status: int, answer: Any, headers: dict[str, str], fault: Fault | None):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        # an empty body would be complete with the headers, and the client would go on
        length = max(len(content), 1) if fault and fault.body in ("cut", "stall") else len(content)
        headers = {"Content-Type": "application/json", "Content-Length": str(length), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.body is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[: fault.sent])
        if fault.body == "stall":
            self._wait_until_gone()
        elif fault.body == "trickle":
            for byte in content[fault.sent :]:
                self.wfile.write(bytes([byte]))
                time.sleep(TRICKLE)
        raise ConnectionError("the connection is cut")
