"""How a run is stopped from outside: signals, and the agreement of all processes to stop at the same step."""

import contextlib
import signal
from collections.abc import Iterator
from typing import TypeVar

import torch

from improved_ldm.trainer.processes import on_any_process
from improved_ldm.trainer.run import Run

Item = TypeVar("Item")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedWaiting(KeyboardInterrupt):
    """A signal to stop that arrived while the run was waiting for data."""


class Stop:
    """Whether a signal to stop has arrived; a second one ends the process."""

    def __init__(self):
        self.received, self.waiting = False, False
        self.handlers = {name: signal.getsignal(name) for name in STOP_SIGNALS}

    def restore(self):
        """Restore the earlier handlers of the signals."""
        for name, handler in self.handlers.items():
            signal.signal(name, handler)

    def receive(self, *_):
        """Record a signal; a process that waits for data stops waiting."""
        self.received = True
        self.restore()
        if self.waiting and torch.utils.data.get_worker_info() is None:  # workers leave it to the main process
            raise StoppedWaiting

    def ending(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items of an iterator; a signal ends the wait for the next."""
        while True:
            self.waiting = True
            try:
                item = next(items)
            finally:
                self.waiting = False
            yield item


@contextlib.contextmanager
def stop_signals():
    """Records the first interrupt or terminate signal in the `Stop` that it yields."""
    stop = Stop()
    for name in STOP_SIGNALS:
        signal.signal(name, stop.receive)
    try:
        yield stop
    finally:
        stop.restore()


def agree_to_stop(run: Run, stop: Stop, step: int) -> bool:
    """Whether any process has received a signal to stop; several processes check this at log steps only."""
    if run.accelerator.num_processes == 1:
        return stop.received
    if step % run.config.training.log_every:
        return False
    return on_any_process(run.accelerator, stop.received)
