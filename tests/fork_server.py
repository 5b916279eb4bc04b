"""A process that imports the libraries once and is forked for each script that a test runs.

It reads one order per line and answers it at once:

- `{"run": [script, argument, …], "processes": number, "output": file, "folder": folder, "environment": {…}, "seconds":
  limit}` is answered with the id of the new process. The script may be `-m` and a module. With several processes,
  the new one is torch's launcher, and the script runs in its children.
- `{"poll": id}` is answered with the exit code, or null while the process runs.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import traceback

import datasets  # noqa: F401
import diffusers  # noqa: F401
from huggingface_hub import constants
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import improved_ldm.hub.publish
import improved_ldm.trainer.autoencoder_task
import improved_ldm.trainer.clip_task
import improved_ldm.trainer.finish
import improved_ldm.trainer.judge_task  # noqa: F401


def prepare(order: dict):
    """Give the new process its limit of time, output, folder and environment."""
    signal.alarm(order["seconds"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(order["folder"])
    os.environ.update(order["environment"])
    # a process that is not forked reads it when it imports the library
    constants.HF_HUB_DOWNLOAD_TIMEOUT = int(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", 10))


def run_script(words: list[str]) -> int:
    """Run a script as from the command line and return its exit code."""
    sys.argv, sys.orig_argv = words[words[0] == "-m" :], ["python", *words]
    try:
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, os.path.dirname(words[0]))
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end_children():
    """End the processes that a script left, as the interpreter does at exit."""
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()
    sys.stdout.flush()


def run_rank(words: list[str]):
    """Run the script in a child of the launcher, which sees the exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the launcher's handlers
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run_script(words)
    end_children()
    if code:
        os._exit(code)  # an exception would be reported with its traceback


def launch_ranks(words: list[str], processes: int) -> int:
    """Run a script in several processes, as `torch.distributed.run` does, but forked."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        start_method="fork",
        max_restarts=0,
    )
    try:
        elastic_launch(config, run_rank)(words)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run(order: dict) -> int:
    """Follow an order to run a script, in the new process, and return the exit code."""
    prepare(order)
    several = order["processes"] > 1
    code = launch_ranks(order["run"], order["processes"]) if several else run_script(order["run"])
    end_children()
    return code


def poll(process: int) -> int | None:
    """The exit code of a process, or None while it runs."""
    ended, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            answer = poll(order["poll"])
        elif (answer := os.fork()) == 0:
            os._exit(run(order))
        print(json.dumps(answer), flush=True)
