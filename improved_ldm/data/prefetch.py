"""Batches that are prepared in the background while the device trains on earlier ones."""

import copy
import queue
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

from improved_ldm.data.cache import CachedLoader
from improved_ldm.data.latents import EncodedBatch, EncodingLoader
from improved_ldm.data.retries import stop_retrying
from improved_ldm.data.watched import WatchedLoader

ENDING = 5.0  # seconds that a thread has to end
POLL = 0.1  # seconds after which a waiting thread looks whether it is to end


class Prefetcher:
    """Prepares the next batches of a loader in a thread; their order and the state are those of the loader.

    An error of the loader is raised at the batch at which it arose. On a GPU the batches are encoded and copied on a
    stream of their own.

    Args:
        loader: the loader.
        ahead: number of batches that are prepared ahead, at least 1.
        device: device that the batches are moved to.
    """

    def __init__(self, loader: CachedLoader | EncodingLoader | WatchedLoader, ahead: int, device: torch.device):
        self.loader, self.ahead, self.device = loader, ahead, device
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[EncodedBatch]:
        """The batches; when the iterator is closed, the thread ends."""
        ready: queue.Queue = queue.Queue(self.ahead)
        stop = threading.Event()
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        settings = (ready, stop, stream, torch.get_num_threads())
        thread = threading.Thread(target=self._prepare, args=settings, name="prefetch", daemon=True)
        thread.start()
        try:
            while True:
                batch, state, done = _next(ready)
                if isinstance(batch, BaseException):
                    raise batch
                if batch is None:
                    return
                if stream is not None:
                    _hand_over(batch, done, self.device)
                self._state = state
                yield batch
        finally:
            stop.set()
            stop_retrying()
            thread.join(ENDING)  # it may be waiting for the network

    def _prepare(self, ready: queue.Queue, stop: threading.Event, stream: "torch.cuda.Stream | None", threads: int):
        """Fill the queue with batches, the state after each, and the event that marks a batch's end on the stream."""
        torch.set_num_threads(threads)  # which a new thread does not inherit
        batches, item = iter(self.loader), (None, None, None)
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                while not stop.is_set():
                    batch = next(batches, None)
                    if batch is None:
                        break
                    batch = batch.to(self.device)
                    item = (
                        batch,
                        copy.deepcopy(self.loader.state_dict()),
                        None if stream is None else stream.record_event(),
                    )
                    _put(ready, item, stop)
                    item = (None, None, None)
        except BaseException as error:  # raised where the batch is needed
            item = (error, None, None)
        finally:
            if hasattr(batches, "close"):
                batches.close()  # in the thread that has run it
        _put(ready, item, stop)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader after the last batch that was given."""
        return self.loader.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.loader.load_state_dict(state)
        self._state = state


def _next(ready: queue.Queue) -> tuple:
    while True:
        try:
            return ready.get(timeout=POLL)  # a signal is handled between two waits
        except queue.Empty:
            continue


def _put(ready: queue.Queue, item: tuple, stop: threading.Event):
    while not stop.is_set():
        try:
            return ready.put(item, timeout=POLL)
        except queue.Full:
            continue


def _hand_over(batch: EncodedBatch, done: "torch.cuda.Event", device: torch.device):
    """Let the stream of training wait for a batch, whose memory is kept until that stream has used it."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(done)
    for tensor in batch.tensors().values():
        tensor.record_stream(stream)
