"""A connection to the Hub's double: requests, answers, and the faults that come between."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, body: dict | None = None):
        super().__init__(message)
        self.status, self.code, self.body = status, code, body or {}


@dataclass
class Fault:
    """The next requests that match are answered with an error.

    Args:
        method: of the request.
        pattern: found in its path.
        status: of the answer.
        times: how many requests.
        headers: of the answer.
        lost_answer: whether the request is carried out all the same.
    """

    method: str
    pattern: str
    status: int
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    lost_answer: bool = False


@dataclass(frozen=True)
class Request:
    """A line of the log."""

    method: str
    path: str
    status: int


class Connection(BaseHTTPRequestHandler):
    """Reads requests and sends what `dispatch` answers: status, answer and headers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass  # the server keeps a log of its own

    def do_any(self):
        path = urlsplit(self.path).path
        fault = self.server.take_fault(self.command, path)
        try:
            body = b"".join(self._body())
            if self.command == "PUT" and not self.server.takes_upload():
                self._read(1)  # until the client is gone
            if fault and not fault.lost_answer:
                raise Refusal(fault.status, "out of order")
            status, answer, headers = self.dispatch(path, body)
            if fault:
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
        self._send(status, answer, headers)

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

    def _send(self, status: int, answer: Any, headers: dict[str, str]):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
