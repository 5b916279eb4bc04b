"""A loader that notes the ranges of the control in the batches that it gives."""

from collections.abc import Iterator
from typing import Any

from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.data.cache import CachedLoader
from improved_ldm.data.latents import EncodedBatch, EncodingLoader

SEEN = "control_seen"  # key of a state


class WatchedLoader:
    """Gives the batches of a loader and adds their control to ranges; resumable like the loader.

    Args:
        loader: the loader.
        ranges: the ranges, which are widened in place.
    """

    def __init__(self, loader: CachedLoader | EncodingLoader, ranges: ControlRanges):
        self.loader, self.ranges = loader, ranges

    def __iter__(self) -> Iterator[EncodedBatch]:
        for batch in self.loader:
            self.ranges.add(batch.control)
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader, and the ranges so far."""
        return {"loader": self.loader.state_dict(), SEEN: self.ranges.record()}

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken; a state of earlier versions has no ranges."""
        self.loader.load_state_dict(state["loader"] if SEEN in state else state)
        self.ranges.widen(ControlRanges(state.get(SEEN)))
