"""The demo on a public network: behind a reverse proxy with a prefix, and cleanup after a visit."""

import asyncio
import shutil
import threading
import time
from concurrent.futures import Future

import pytest
from gradio_client import Client
from playwright.sync_api import expect

PREFIX = "/improved"
PATIENCE = 60  # seconds

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no `chromium` on the PATH"),
]


@pytest.fixture(scope="module")
def demo(run_demo):
    """The address of a demo with a URL prefix, and its temporary folder."""
    with run_demo("--root_path", PREFIX, "--host", "localhost", "--queue", "5") as demo:
        yield demo


@pytest.fixture(scope="module")
def address(demo):
    """The address of a reverse proxy that behaves like the nginx configuration in the README."""
    upstream = demo[0].split("/")[2]

    async def forward(reader, writer):
        first, *headers = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, path, version = first.split()
        if not path.startswith(f"{PREFIX}/"):
            missed.append(path)
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
            return writer.close()
        (host,) = (line.partition(": ")[2] for line in headers if line.lower().startswith("host: "))
        kept = [line for line in headers if not line.lower().startswith(("host: ", "connection: "))]
        added = [f"Host: {upstream}", "Connection: close", f"X-Forwarded-Host: {host}", "X-Forwarded-Proto: http"]
        there, back = await asyncio.open_connection(*upstream.split(":"))
        lines = [f"{method} {path.removeprefix(PREFIX)} {version}", *kept, *added, "", ""]
        back.write("\r\n".join(lines).encode("latin-1"))
        pipes = [asyncio.create_task(_pipe(*ends)) for ends in ((reader, back), (there, writer))]
        await asyncio.wait(pipes, return_when=asyncio.FIRST_COMPLETED)
        for end in (back, writer):  # if one side disconnects, close the other side
            end.close()

    async def serve():
        async with await asyncio.start_server(forward, "127.0.0.1", 0) as server:
            started.set_result(server.sockets[0].getsockname()[1])
            await server.serve_forever()

    missed, started = [], Future()
    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    yield f"http://127.0.0.1:{started.result(PATIENCE)}{PREFIX}/"
    assert set(missed) <= {"/favicon.ico"}  # the browser requests it from the root before it reads the page


async def _pipe(reader, writer):
    """Forward data as it arrives, because an event must not wait for the next one."""
    try:
        while part := await reader.read(2**16):
            writer.write(part)
            await writer.drain()
    except OSError:
        pass  # the other end has disconnected


def _drawings(folder):
    """The image files besides those that the page opens with."""
    files = folder.glob("improved_ldm_demo_*/*.png")
    return [file for file in files if file.stem not in ("plain", "asked")]


def _draw(page):
    page.click("#draw")
    expect(page.locator("#gallery .thumbnail-item img")).to_have_count(2)
    for name in ("plain", "asked"):
        expect(page.locator(f"#{name} img")).to_be_visible()


def _wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_behind_a_prefix_the_page_opens_and_draws(open_page, address):
    with open_page(address) as page:
        _draw(page)
        loaded = "image => image.complete && image.naturalWidth"
        assert page.locator("#asked img").evaluate(loaded) == 128


def test_the_drawings_go_when_the_tab_is_closed(open_page, address, demo):
    _, folder = demo
    _wait_until(lambda: _drawings(folder) == [])
    with open_page(address) as page:
        _draw(page)
        assert len(_drawings(folder)) == 2
    _wait_until(lambda: _drawings(folder) == [])


def test_a_refused_value_is_one_line_of_the_log(demo):
    url, folder = demo
    log = folder / "log"
    before = log.read_text(encoding="utf-8").splitlines()
    with pytest.raises(ValueError, match="`guidance_scale` is 'much'"):
        Client(url, verbose=False).predict(guidance_scale="much", api_name="/draw")
    added = log.read_text(encoding="utf-8").splitlines()[len(before) :]
    assert added == ["refused: `guidance_scale` is 'much'; it must be a number from 1 to 10."]


def test_a_demo_that_is_ended_leaves_no_folder(run_demo):
    with run_demo() as (url, folder):
        Client(url, verbose=False).predict(num_inference_steps=1, api_name="/draw")
        assert list(folder.glob("improved_ldm_demo_*"))
    assert list(folder.glob("improved_ldm_demo_*")) == []
