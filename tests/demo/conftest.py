"""A running demo and a browser."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

import improved_ldm

ROOT = Path(improved_ldm.__file__).parents[1]
PATIENCE = 120  # seconds


@pytest.fixture(scope="module")
def run_demo(tmp_path_factory):
    """Runs the demo's command in a folder without a quickstart, and gives its address and the folder of its log.

    This folder is also the temporary folder of the demo.
    """

    @contextmanager
    def run(*options):
        folder = tmp_path_factory.mktemp("demo")
        port = _free_port()
        url, log = f"http://127.0.0.1:{port}/", folder / "log"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        command = [sys.executable, "-m", "improved_ldm.demo", "--port", str(port), *options]
        with (
            log.open("w", encoding="utf-8") as output,
            subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
        ):
            try:
                _wait_for(url, process, log)
                yield url, folder
            finally:
                process.terminate()

    return run


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(url, process, log):
    for _ in range(10 * PATIENCE):
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            return urllib.request.urlopen(url).close()
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"no answer after {PATIENCE} s: {log.read_text(encoding='utf-8')}")


@pytest.fixture(scope="module")
def browser():
    """A browser that caches the page's scripts between visits, with long timeouts for a busy machine."""
    expect.set_options(timeout=1000 * PATIENCE)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        context = chromium.new_context(viewport={"width": 1280, "height": 800})
        context.set_default_timeout(1000 * PATIENCE)
        yield context
        chromium.close()


@pytest.fixture
def open_page(browser):
    """Opens a page and checks for console errors, failed requests and requests to other servers at the end."""

    @contextmanager
    def visit(address, query=""):
        page = browser.new_page()
        problems = []
        page.on("console", lambda message: message.type == "error" and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("response", lambda response: response.status >= 400 and problems.append(response.url))
        page.on("request", lambda request: request.url.startswith((address, "data:")) or problems.append(request.url))
        page.goto(address + query)
        page.locator("#view [name=crop]").wait_for()
        yield page
        page.close()
        assert problems == []

    return visit
