"""Progress of long work: a bar in a terminal, lines in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from tqdm import tqdm

LINE_SECONDS = 600.0  # between two lines of the same work in a log file


def duration_text(seconds: float) -> str:
    """A duration in words: `42 s`, `7 min 05 s`, `3 h 20 min`, `2 d 04 h`."""
    seconds = round(seconds)
    for large, small, names in ((86_400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if seconds >= large:
            return f"{seconds // large} {names[0]} {seconds % large // small:02d} {names[1]}"
    return f"{seconds} s"


class Bar:
    """Counts work whose length may not be known: a bar in a terminal, otherwise a line at the end and now and then.

    Args:
        say: called with a line.
        label: what is done, such as "encoding".
        unit: what is counted, such as "images".
        total: number that is expected; None if it is not known.
        shown: whether this process shows it.
    """

    def __init__(self, say: Callable[[str], Any], label: str, unit: str, total: int | None = None, shown: bool = True):
        self.say, self.label, self.unit = say, label, unit
        self.count, self.began = 0, time.perf_counter()
        self.line_time, self.in_log = self.began, shown and not sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=label, unit=f" {unit}", disable=not shown or self.in_log)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, error: type[BaseException] | None, *_):
        self.bar.close()
        if self.in_log and error is None:
            self._say_line()

    def update(self, count: int = 1):
        """Count some work that is done."""
        self.count += count
        self.bar.update(count)
        if self.in_log and time.perf_counter() - self.line_time > LINE_SECONDS:
            self._say_line()

    def _say_line(self):
        self.line_time = time.perf_counter()
        self.say(f"{self.label}: {self.count:,} {self.unit} in {duration_text(self.line_time - self.began)}")


@contextmanager
def sampling_bar(pipeline: DiffusionPipeline, say: Callable[[str], Any], label: str) -> Iterator[None]:
    """Show the sampler steps of all calls of a pipeline as one bar."""
    with Bar(say, label, "sampler steps") as bar:

        def counted(timesteps):
            for timestep in timesteps:
                yield timestep
                bar.update()

        pipeline.progress_bar = counted
        try:
            yield
        finally:
            del pipeline.progress_bar
