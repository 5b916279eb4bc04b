"""Prepares batches in a background thread while the model trains on earlier ones."""

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from improved_ldm.data.latents import EncodedBatch
from improved_ldm.data.retries import LONGEST_DEAFNESS, stop_retrying

LONGEST_END = 30  # seconds that the end of a run waits for the thread


class Batches(Protocol):
    """An endless loader that can resume at the next batch."""

    def __iter__(self) -> Iterator[EncodedBatch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]): ...


@dataclass(frozen=True)
class _Prepared:
    """A batch on the device, the state of the loader after it, and the CUDA event that marks its completion."""

    batch: EncodedBatch | None = None
    state: dict[str, Any] | None = None
    event: torch.cuda.Event | None = None
    error: BaseException | None = None


class Prefetcher:
    """The batches of a loader in the same order, prepared ahead in a thread; errors are raised at their batch.

    The state is that after the last batch that was given, regardless of those that are prepared.

    Args:
        batches: the loader.
        count: number of batches that are prepared ahead, at least 1.
        device: device of the batches; on a GPU they are prepared on a stream of their own.
    """

    def __init__(self, batches: Batches, count: int, device: torch.device):
        self.batches, self.count, self.device = batches, count, device
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[EncodedBatch]:
        prepared, ended = queue.Queue(self.count), threading.Event()
        thread = threading.Thread(target=self._prepare, args=(prepared, ended), daemon=True)
        thread.start()
        try:
            while True:
                item = _received(prepared)
                if item.error is not None:
                    raise item.error
                self._state = item.state
                yield self._on_this_stream(item)
        finally:
            ended.set()
            stop_retrying()
            thread.join(LONGEST_END)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader after the last batch that was given."""
        return self.batches.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.batches.load_state_dict(state)
        self._state = None

    def _prepare(self, prepared: queue.Queue, ended: threading.Event):
        """Put batches into the queue until the run ends or a batch fails."""
        is_cuda = self.device.type == "cuda"
        stream = torch.cuda.Stream(self.device) if is_cuda else None
        try:
            with torch.cuda.stream(stream) if is_cuda else contextlib.nullcontext():
                for batch in self.batches:
                    on_device = batch.to(self.device)
                    event = stream.record_event() if is_cuda else None
                    if not _sent(prepared, _Prepared(on_device, self.batches.state_dict(), event), ended):
                        return
        except BaseException as error:
            _sent(prepared, _Prepared(error=error), ended)

    def _on_this_stream(self, item: _Prepared) -> EncodedBatch:
        """The batch, after this thread's stream was told to wait for it."""
        if item.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(item.event)
            for tensor in item.batch.tensors().values():
                tensor.record_stream(stream)  # its memory is not reused before this stream has read it
        return item.batch


def _received(prepared: queue.Queue) -> _Prepared:
    """The next item. The waits are short, because a signal that comes as one starts is handled only at its end."""
    while True:
        with contextlib.suppress(queue.Empty):
            return prepared.get(timeout=LONGEST_DEAFNESS)


def _sent(prepared: queue.Queue, item: _Prepared, ended: threading.Event) -> bool:
    """Put an item into the queue when there is room; False if the run ends before."""
    while not ended.is_set():
        with contextlib.suppress(queue.Full):
            prepared.put(item, timeout=LONGEST_DEAFNESS)
            return True
    return False
