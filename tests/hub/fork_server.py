"""A process that has imported the libraries once and is forked for each script that a test runs.

It reads an order a line: `{"run": [script, argument, …], "output": file, "environment": {…}, "seconds": limit}` is
answered with the number of the process, `{"wait": number}` with its exit code.
"""

import json
import os
import runpy
import signal
import sys
import traceback

import datasets  # noqa: F401
import diffusers  # noqa: F401

import improved_ldm.hub.publish
import improved_ldm.trainer.finish  # noqa: F401


def run(order: dict) -> int:
    """Run a script as its command does; returns the exit code."""
    signal.alarm(order["seconds"])
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(order["environment"])
    sys.argv = order["run"]
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
            sys.stdout.flush()
            os._exit(code)
        print(answer, flush=True)
