"""Scripts that run in processes of their own, started by forking a process that has imported the libraries."""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 300  # time limit of a process


class ForkServer:
    """The process that is forked for each script.

    Args:
        environment: Its environment variables, which the scripts inherit.
    """

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self.outputs = tempfile.TemporaryDirectory()

    def ask(self, order: dict) -> int | None:
        """The answer to an order."""
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        words: list[str | Path],
        processes: int = 1,
        folder: Path = ROOT,
        environment: dict[str, str] | None = None,
    ) -> "ScriptProcess":
        """Run a script, or `-m` and a module, with its arguments in a folder.

        With several processes, the one that is returned is the launcher.
        """
        handle, output = tempfile.mkstemp(dir=self.outputs.name)
        os.close(handle)
        order = {"run": [str(word) for word in words], "processes": processes, "output": output}
        order |= {"folder": str(folder), "environment": environment or {}, "seconds": SECONDS}
        return ScriptProcess(self, self.ask(order), Path(output))


class ScriptProcess:
    """A process that runs a script, with the methods of `subprocess.Popen` that the tests use.

    Args:
        server: The process that it was forked from.
        pid: Its process id.
        output: File of what it writes to the standard output and error.
    """

    def __init__(self, server: ForkServer, pid: int, output: Path):
        self.server, self.pid, self.output = server, pid, output
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while the script runs."""
        if self.returncode is None:
            self.returncode = self.server.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float = SECONDS) -> int:
        """Wait for the end and return the exit code."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return self.returncode

    def communicate(self, timeout: float = SECONDS) -> tuple[str, None]:
        """Wait for the end and return the output."""
        self.wait(timeout)
        return self.output.read_text(encoding="utf-8"), None

    def send_signal(self, number: int):
        """Send a signal to the process."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


@functools.cache
def fork_server() -> ForkServer:
    """The process from which scripts without a Hub are forked."""
    return ForkServer(os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def launch(arguments: list[str], script: str = "train_t2i", processes: int = 1) -> ScriptProcess:
    """Start a script of training/."""
    return fork_server().start([ROOT / "training" / f"{script}.py", *arguments], processes)


def wait_for(path: Path, process: ScriptProcess, seconds: float = 120):
    """Wait until a process has made a file."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)
