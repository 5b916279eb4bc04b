"""What the processes of a run do together: work of one of them for all, and flags that any of them can raise."""

from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

Result = TypeVar("Result")


def on_main_process(work: Callable[[], Result]) -> Result:
    """Call a function on the main process; all processes return its result, or raise its error.

    Raises:
        OSError, ValueError: if the function raises one.
    """
    result = error = None
    if PartialState().is_main_process:
        try:
            result = work()
        except (OSError, ValueError) as failure:
            error = failure
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise error
    return result


def on_any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether a flag is true on any process; all processes wait for each other."""
    value = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, "sum").item())
