"""Work that one process of a run does for all."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
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
