"""How a script ends when it cannot continue: with one line from one process and exit status 1."""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

MAX_LINE = 2000  # characters of a message
# Packages whose own errors are caused by their input; those of Python are `OSError` and `ValueError`.
EXPECTED_PACKAGES = ("improved_ldm", "datasets", "huggingface_hub", "httpx", "httpx2", "PIL", "pyarrow", "safetensors")
LAUNCHER_TIME = 10  # seconds within which the launcher ends all processes after the first one has ended


@contextmanager
def exit_on_error(what: str, batch_key: str | None = None) -> Iterator[None]:
    """End a script with one line if its input is wrong or not available, or if it is interrupted.

    Any other error is a bug and keeps its traceback.

    Args:
        what: Outcome at the start of the line, such as "not trained".
        batch_key: Key of the batch size, which the line suggests to lower if memory runs out.
    """
    try:
        yield
    except KeyboardInterrupt:
        leave("interrupted; the same command resumes from there")
    except Exception as error:
        if is_out_of_memory(error):
            remedy = "" if batch_key is None else f"lower `--{batch_key}`: "
            leave(f"{what}: out of memory; {remedy}{error}")
        if not is_expected(error):
            raise
        leave(f"{what}: {error}")


class ArgumentParser(argparse.ArgumentParser):
    """A command line parser whose errors end the script with one line, like every other error."""

    def error(self, message: str):
        leave(f"{self.prog}: {message}; --help lists the options")


def is_expected(error: Exception) -> bool:
    """Whether an error is caused by a script's input and not by a bug."""
    if isinstance(error, OSError | ValueError):
        return True
    return any(kind.__module__.partition(".")[0] in EXPECTED_PACKAGES for kind in type(error).__mro__)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the machine or an accelerator ran out of memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def leave(message: str):
    """End this process with a one-line message on stderr and exit status 1.

    If there are several processes, only the first one prints immediately. The others wait for the launcher to end
    them; a process that is not ended has failed alone, and prints its line.
    """
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(LAUNCHER_TIME + min(rank, LAUNCHER_TIME))
        message = f"process {rank}: {message}"
    sys.exit(one_line(message))


def one_line(message: str) -> str:
    """A message without line breaks, truncated if it is too long."""
    line = " ".join(message.split())
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} …"
