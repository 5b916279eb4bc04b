"""Reads datasets from a Hub that is busy, silent or cut off: retries for a while, then fails with a one-line error.

Requests are retried where they are sent, below `datasets` and `huggingface_hub`. The final error is one that these
libraries do not retry, so that their retries and ours do not multiply.
"""

import functools
import logging
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from huggingface_hub import constants, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

# The client's default settings, including its offline mode, are only available from a private module.
from huggingface_hub.utils._http import default_client_factory

logger = logging.getLogger(__name__)
Item = TypeVar("Item")

RETRY_SECONDS = 600  # after the first failure, including waits for Retry-After
RETRY_VARIABLE = "IMPROVED_LDM_RETRY_SECONDS"  # environment variable that overrides it
UNKNOWN_HOST_SECONDS = 60  # limit for a host that has never answered, whose name may be wrong
LONGEST_PAUSE = 60  # seconds between two tries, unless the host asks for more
BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are temporary
PASSING = (httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ProxyError)
MIN_PROGRESS = 2**16  # bytes; a connection that breaks off after more than this counts as a new failure
SLOWEST = 1024  # bytes per second; a slower body is cut off
TIMEOUTS_TO_JUDGE = 6  # waiting time for a body, in timeouts, before its speed is checked
LONGEST_WAIT = 1.0  # seconds; a signal is handled at the end of a wait at the latest
LONGEST_TIMEOUT = 3  # limit, in timeouts, if a library asks for a longer one


class RemoteReadError(OSError):
    """A dataset cannot be read from its host; the message is one line that names the host and what to do."""


def read_patiently(items: Iterator[Item]) -> Iterator[Item]:
    """The items of an iterator that reads from the Hub, such as that of a streamed dataset.

    A thread fetches them one by one, on demand. While the main thread waits for this thread it still reacts to Ctrl-C,
    which it would not do while it waits inside a library's C++ code.

    Args:
        items: the iterator.

    Raises:
        RemoteReadError: if the Hub refuses, or fails for longer than `RETRY_SECONDS`.
    """
    orders, results = queue.SimpleQueue(), queue.SimpleQueue()
    thread = threading.Thread(target=_fetch, args=(items, orders, results), daemon=True)
    thread.start()
    waiting = False
    try:
        while True:
            with reading_hub():
                waiting = True
                orders.put(True)
                item, error = _result(results)
                waiting = False
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
            yield item
    finally:
        orders.put(False)
        if waiting:  # interrupted
            stop_retrying()
            thread.join(LONGEST_TIMEOUT * constants.HF_HUB_DOWNLOAD_TIMEOUT)


def _result(results: queue.SimpleQueue) -> tuple[Any, BaseException | None]:
    """The next result. The waits are short, because a signal that comes as one starts is handled only at its end."""
    while True:
        with suppress(queue.Empty):
            return results.get(timeout=LONGEST_WAIT)


def _fetch(items: Iterator, orders: queue.SimpleQueue, results: queue.SimpleQueue):
    while orders.get():
        try:
            results.put((next(items), None))
        except BaseException as error:
            results.put((None, error))


def stop_retrying():
    """End the retries of all threads that read from the Hub, because nobody waits for what they read."""
    _abandoned.set()


@contextmanager
def reading_hub():
    """Context in which reads from the Hub are retried for a limited time.

    Raises:
        RemoteReadError: if the Hub refuses, or fails for longer than `RETRY_SECONDS`.
        ValueError: if the environment variable for that time does not hold a number.
    """
    _use_patient_client()
    _abandoned.clear()
    try:
        yield
    except FileNotFoundError:
        raise
    except HfHubHTTPError as error:  # its message has several lines
        raise RemoteReadError(f"reading from the Hub failed: {' '.join(str(error).split())}") from error


@functools.cache
def _use_patient_client():
    """Make this process, and those that it forks, retry when the Hub fails to send a dataset."""
    _retry_seconds()
    set_client_factory(_patient_client)


def _patient_client() -> httpx.Client:
    client = default_client_factory()
    client.send = functools.partial(_send, client.send)
    return client


def _send(send: Callable[..., httpx.Response], request: httpx.Request, *, stream: bool = False, **options: Any):
    """Send a request like `httpx.Client.send`; one that reads a dataset is retried and its body completed."""
    if not _reads_dataset(request):
        return send(request, stream=stream, **options)
    timeout, asked = constants.HF_HUB_DOWNLOAD_TIMEOUT, request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: min(asked.get(name) or timeout, LONGEST_TIMEOUT * timeout)
        for name in ("connect", "read", "write", "pool")
    }
    request.headers["Accept-Encoding"] = "identity"  # so that positions in the body are positions in the file
    tries = _Tries(request.url)
    answer = functools.partial(_answer, send, tries, **options)
    response = answer(request)
    response.stream = _Body(answer, tries, request, response)
    if not stream:
        try:
            response.read()
        finally:
            response.close()
    return response


def _reads_dataset(request: httpx.Request) -> bool:
    is_hub = str(request.url).startswith(f"{constants.ENDPOINT}/")  # not the counter of `datasets`' users
    return is_hub and "/datasets/" in request.url.path and request.method in ("GET", "HEAD")


def _answer(send: Callable[..., httpx.Response], tries: "_Tries", request: httpx.Request, **options: Any):
    """The response to a request, without its body; retried while the host is busy."""
    while True:
        try:
            response = send(request, stream=True, **options)
        except PASSING as error:
            tries.failed(error.request.url, _reason(error))
            continue
        _answered.add(_host(response.url))
        if response.status_code not in BUSY:
            return response
        asked = response.headers.get("Retry-After", "")
        response.close()
        reason = f"{response.status_code} {response.reason_phrase}".strip()
        tries.failed(response.url, reason, int(asked) if asked.isdigit() else 0)


class _Body(httpx.SyncByteStream):
    """The body of a response; if it breaks off or arrives too slowly, the rest is requested.

    Args:
        answer: function that sends a request and returns the response.
        tries: tries of the request.
        request: request that was sent.
        response: response to the request.
    """

    def __init__(self, answer, tries: "_Tries", request: httpx.Request, response: httpx.Response):
        self.answer, self.tries, self.request = answer, tries, request
        self.part, self.etag = response.stream, response.headers.get("ETag")
        first, _, self.last = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
        self.position = int(first or 0)  # bytes from the start of the file

    def __iter__(self) -> Iterator[bytes]:
        while True:
            received = 0
            try:
                for chunk in _fast_enough(self.part):
                    received += len(chunk)
                    self.position += len(chunk)
                    yield chunk
            except PASSING as error:
                if received >= MIN_PROGRESS:
                    self.tries.reset()
                self.close()
                self.tries.failed(self.request.url, _reason(error))
                self._ask_for_rest()
            else:
                self.tries.succeeded()
                return

    def _ask_for_rest(self):
        self.request.headers["Range"] = f"bytes={self.position}-{self.last}"
        response = self.answer(self.request)
        if self.etag != response.headers.get("ETag") or response.status_code not in (200, 206):
            response.close()
            raise RemoteReadError(
                f"{self.request.url.path} on {_host(self.request.url)} changed while it was read; the same "
                "command resumes from the last checkpoint."
            )
        whole = response.status_code == 200
        self.part = _Tail(response.stream, self.position) if whole else response.stream

    def close(self):
        self.part.close()


class _Tail(httpx.SyncByteStream):
    """The rest of a body from a given byte on, for a host that only sends whole files."""

    def __init__(self, body: httpx.SyncByteStream, position: int):
        self.body, self.position = body, position

    def __iter__(self) -> Iterator[bytes]:
        to_skip = self.position
        for chunk in self.body:
            yield chunk[to_skip:]
            to_skip = max(0, to_skip - len(chunk))

    def close(self):
        self.body.close()


def _fast_enough(body: httpx.SyncByteStream) -> Iterator[bytes]:
    """The chunks of a body; raises a timeout if they arrive too slowly."""
    waited, received, chunks = 0.0, 0, iter(body)
    while True:
        started = time.monotonic()
        chunk = next(chunks, None)
        if chunk is None:
            return
        waited, received = waited + time.monotonic() - started, received + len(chunk)
        yield chunk
        if waited > TIMEOUTS_TO_JUDGE * constants.HF_HUB_DOWNLOAD_TIMEOUT:
            if received < SLOWEST * waited:
                raise httpx.ReadTimeout(f"{received} bytes in {waited:.0f} s")
            waited, received = 0.0, 0


class _Tries:
    """Counts and times the tries of a request, waits between them and logs them.

    Args:
        url: URL to read.
    """

    def __init__(self, url: httpx.URL):
        self.url = url
        self.reset()

    def reset(self):
        """Restart the count."""
        self.count, self.began = 0, time.monotonic()

    def succeeded(self):
        _given_up.discard(_host(self.url))

    def failed(self, url: httpx.URL, reason: str, asked: int = 0):
        """Wait for the next try.

        Args:
            url: URL that failed, on the host that `self.url` redirects to.
            reason: reason of the failure.
            asked: seconds that the host asks to wait.

        Raises:
            RemoteReadError: if the time is over, or the host asks for more than is left.
        """
        host = _host(url)
        if self.count == 0:
            self.began = time.monotonic()
        self.count += 1
        limit = _retry_seconds() if host in _answered else min(UNKNOWN_HOST_SECONDS, _retry_seconds())
        pauses = _pauses(limit)
        passed = time.monotonic() - self.began
        pause = max(pauses[self.count - 1], asked) if self.count <= len(pauses) else None
        origin = _host(self.url)
        if pause is None or passed + pause > limit or origin in _given_up:
            _given_up.add(origin)
            wish = f"; the host asks to wait {asked} s" if asked > limit else ""
            raise RemoteReadError(
                f"{host} cannot be read ({reason}){wish}: {self.count} tries of {self.url.path} in {passed:.0f} s. "
                f"The same command resumes when the host answers again; {RETRY_VARIABLE} ({limit:g} s) is the limit."
            )
        self._say(host, reason, f"try {self.count} of {len(pauses) + 1}, next in {pause} s")
        if _abandoned.wait(pause):
            raise RemoteReadError(f"{host} cannot be read ({reason}); interrupted.")

    def _say(self, host: str, reason: str, what: str):
        failures = _failures[host]
        if self.count == 1:
            _failures[host] = failures = failures + 1
        if self.count > 1 or failures.bit_count() == 1:  # a host that fails often and recovers does not flood the log
            often = f"; failure {failures} of this host" if failures > 1 else ""
            logger.warning("reading from %s failed (%s), %s%s", host, reason, what, often)


_answered: set[str] = set()  # hosts that have answered
_given_up: set[str] = set()  # hosts that failed until the limit; the next read from them has one try
_failures: Counter[str] = Counter()  # number of failures by host, in this process
_abandoned = threading.Event()  # set when nobody waits for the next item


def _retry_seconds() -> float:
    text = os.environ.get(RETRY_VARIABLE, RETRY_SECONDS)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ValueError(f"{RETRY_VARIABLE} is {text!r}; it must be a number of seconds, 0 or more.")
    return seconds


def _pauses(limit: float) -> list[int]:
    """Seconds to wait before each further try; their sum is at most the limit."""
    pauses, pause = [], 1
    while sum(pauses) + pause <= limit:
        pauses.append(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    return pauses


def _host(url: httpx.URL) -> str:
    return url.netloc.decode()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__
