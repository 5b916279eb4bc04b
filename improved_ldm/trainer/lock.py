"""One run per folder: a lock that names the process that holds it, taken over if that process has ended."""

import atexit
import contextlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

LOCK = "run.lock"
CLOCK_SECONDS = 2  # by which an adjusted clock may change the start time of a process

_held: set[Path] = set()


@dataclass(frozen=True)
class Owner:
    """A process, with its start time to distinguish it from later ones with the same id.

    Args:
        host: name of its machine.
        pid: process id on that machine.
        started: start time, whole seconds since 1970.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def this_process(cls) -> "Owner":
        """The current process."""
        return cls(socket.gethostname(), os.getpid(), int(psutil.Process().create_time()))

    @property
    def is_this_process(self) -> bool:
        """Whether it is the current process."""
        return self.is_here and self.pid == os.getpid() and not self.is_gone

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return self.host == socket.gethostname()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended; False for a process on another machine."""
        if not self.is_here:
            return False
        try:
            process = psutil.Process(self.pid)
            if process.status() == psutil.STATUS_ZOMBIE:  # killed in a container whose first process never waits
                return True
            return abs(process.create_time() - self.started) > CLOCK_SECONDS
        except psutil.NoSuchProcess:
            return True

    def __str__(self) -> str:
        return f"{self.host}-{self.pid}-{self.started}"

    @classmethod
    def from_text(cls, text: str) -> "Owner | None":
        """The inverse of `str`, or None."""
        try:
            host, pid, started = text.rsplit("-", 2)
            return cls(host, int(pid), int(started))
        except ValueError:
            return None


def lock_folder(folder: Path, say: Callable[[str], object]):
    """Lock a run's folder for this process until `released_locks` or the process ends; a second call changes nothing.

    Args:
        folder: folder of the run; it is created if it is missing.
        say: called with a message if a lock is taken over.

    Raises:
        OSError: if the folder cannot be written, or another process holds it.
    """
    lock, owner = (folder / LOCK).absolute(), Owner.this_process()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while not _create(lock, owner):
            try:
                holder = _read(lock)
            except FileNotFoundError:  # released just now
                continue
            if holder is not None and holder.is_this_process:
                break
            if holder is not None and not holder.is_gone:
                raise BlockingIOError(_refusal(folder, holder))
            say(f"{folder} was left locked by {_name(holder)}, which has ended; the lock is taken over")
            lock.unlink(missing_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"`output_dir` is {str(folder)!r}; a file is in its place. Choose another `--output_dir`."
        ) from None
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(
            f"`output_dir` is {str(folder)!r}; it cannot be written ({error.strerror}). "
            "Choose another `--output_dir`, or free space and make the folder writable."
        ) from error
    if not _held:
        atexit.register(_release_all)
    _held.add(lock)


@contextlib.contextmanager
def released_locks() -> Iterator[None]:
    """Release all locks of this process at the end, even after an error."""
    try:
        yield
    finally:
        _release_all()


def _create(lock: Path, owner: Owner) -> bool:
    """Create a lock that is complete from the moment it exists; False if there is one already."""
    draft, text = lock.with_name(f"{lock.name}.{owner}"), json.dumps(asdict(owner))
    try:
        draft.write_text(text, encoding="utf-8")
        with contextlib.suppress(OSError):  # no hard links, or the lock exists, which the next line finds
            os.link(draft, lock)
            return True
        with lock.open("x", encoding="utf-8") as file:
            file.write(text)
        return True
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)


def _read(lock: Path) -> Owner | None:
    """The process that holds a lock; None if the file does not name one."""
    try:
        content = lock.read_bytes()
    except FileNotFoundError:
        if lock.is_symlink():  # a broken link
            return None
        raise
    try:
        owner = Owner(**json.loads(content))
        return owner if isinstance(owner.pid, int) and 0 < owner.pid < 2**31 and owner.started >= 0 else None
    except (ValueError, TypeError):
        return None


def _release_all():
    while _held:
        lock = _held.pop()
        with contextlib.suppress(OSError):  # the folder may be gone
            if (holder := _read(lock)) is not None and holder.is_this_process:
                lock.unlink()


def _name(holder: Owner | None) -> str:
    return "an unknown process" if holder is None else f"process {holder.pid} of {holder.host}"


def _refusal(folder: Path, holder: Owner) -> str:
    remedy = "wait for it, or stop it" if holder.is_here else f"if it has ended, delete {folder / LOCK}"
    return f"{_name(holder)} is training in {str(folder)!r}: {remedy}, or choose another `--output_dir`."
