"""The ranges of the control in the samples that a model was trained on: which variables varied, and how far."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from improved_ldm.conditioning.control import NUM_CONTROL, VARIABLES, Control, control_columns, control_tensor
from improved_ldm.conditioning.control_row import Variable

RESOLVED = 1.0  # smallest difference of an embedded number that sinusoids resolve


class ControlRanges:
    """Smallest and largest value of every quantity of the control table, over all samples that were added.

    Args:
        record: result of `record`; `{}` for a model that has seen nothing, None if what it has seen is not known.

    Raises:
        ValueError: If a variable of the record does not have two values per quantity.
    """

    def __init__(self, record: Mapping[str, Sequence[Sequence[float]]] | None):
        self.is_known, count = record is not None, max(place.stop for place in _PLACES.values())
        self.low, self.high = torch.full((count,), torch.inf), torch.full((count,), -torch.inf)
        for name, values in (record or {}).items():
            if name in _PLACES:
                self._read(name, values)

    def _read(self, name: str, values: Any):
        place = _PLACES[name]
        count = place.stop - place.start
        try:
            low, high = torch.tensor(values, dtype=torch.float32).view(2, count)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"`control_seen` has {values!r} for {name}; it must be two lists of {count} numbers, the smallest and "
                "the largest values."
            ) from error
        self.low[place], self.high[place] = low, high

    def add(self, control: torch.Tensor):
        """Widen the ranges to the samples of a (batch, `NUM_CONTROL`) control; unknown values are left out."""
        columns = control_columns(control)
        quantities = torch.stack([quantity for row in VARIABLES for quantity in row.quantities(columns)])
        is_known = quantities.isfinite()
        self.low = torch.minimum(self.low, quantities.where(is_known, torch.inf).amin(1))
        self.high = torch.maximum(self.high, quantities.where(is_known, -torch.inf).amax(1))

    def record(self) -> dict[str, list[list[float]]] | None:
        """The smallest and the largest values of each variable that was ever known, by name; None if not known."""
        if not self.is_known:
            return None
        ranges = {name: [self.low[place].tolist(), self.high[place].tolist()] for name, place in _PLACES.items()}
        return {name: values for name, values in ranges.items() if values[0] <= values[1]}

    def widen(self, other: "ControlRanges"):
        """Widen the ranges to hold others; they become unknown if those are."""
        self.is_known = self.is_known and other.is_known
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)

    def varied(self, row: Variable) -> bool:
        """Whether a variable took values that a denoiser can tell apart; True if it is not known."""
        place = _PLACES[row.name]
        spread = row.scaled(self.high[place]) - row.scaled(self.low[place])
        return not self.is_known or bool((spread >= RESOLVED).any())

    def holds(self, row: Variable, control: Control) -> bool:
        """Whether the value of a variable in a record is within its range; True if it is not known."""
        asked = torch.cat(row.quantities(control_columns(control_tensor([control]))))
        place = _PLACES[row.name]
        low, high = (row.scaled(bound[place]) for bound in (self.low, self.high))
        near = (row.scaled(asked) >= low - RESOLVED) & (row.scaled(asked) <= high + RESOLVED)
        return not self.is_known or bool((near | asked.isnan()).all())


def _places() -> dict[str, slice]:
    """Where the quantities of each variable are."""
    columns, places, start = control_columns(torch.ones(1, NUM_CONTROL)), {}, 0
    for row in VARIABLES:
        places[row.name] = slice(start, start := start + len(row.quantities(columns)))
    return places


_PLACES = _places()
