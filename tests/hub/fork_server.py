"""A process that imports the libraries once and is forked for each script that a test runs.

It reads one order per line. `{"run": [script, argument, …], "output": file, "environment": {…}, "seconds": limit}` is
answered with the process id, `{"wait": id}` with the exit code.
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

import improved_ldm.hub.publish
import improved_ldm.trainer.finish  # noqa: F401


def run(order: dict) -> int:
    """Run a script as from the command line and return its exit code."""
    signal.alarm(order["seconds"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["environment"])
    # a process that is not forked reads it when it imports the library
    constants.HF_HUB_DOWNLOAD_TIMEOUT = int(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT", 10))
    sys.argv, sys.orig_argv = order["run"], ["python", *order["run"]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        elif (answer := os.fork()) == 0:
            code = run(order)
            for child in multiprocessing.active_children():  # as the interpreter does at exit
                child.terminate()
                child.join()
            sys.stdout.flush()
            os._exit(code)
        print(answer, flush=True)
