"""The demo's server for clients other than browsers: named parameters, refusals, and the lifetime of files."""

import json
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx
import pytest
from gradio_client import Client

from improved_ldm.demo import bundled
from improved_ldm.demo.limits import MAX_PROMPT, shown
from improved_ldm.demo.page import build_demo
from improved_ldm.demo.server import MAX_BODY

PATIENCE = 60  # seconds
SIDE = 128  # pixels of the whole image
WHOLE = {"original_size": SIDE, "top": 0, "left": 0, "height": SIDE, "width": SIDE, "flip": False}
FEW = {"num_inference_steps": 2}
DEFAULTS = {"prompt": "a bag", "seed": 7, "guidance_scale": 2, "control_guidance_scale": 1, **FEW, "view": WHOLE}
NAN, INFINITE = float("nan"), float("inf")

NO_NUMBERS = [None, "2", True, [2], {"a": 2}, NAN, INFINITE, -INFINITE, -3]
BAD = [
    *(("view", {"path": path, "meta": meta}) for path, meta in (("x", None), ("x", "s"), ("/etc/passwd", 0))),
    *[("prompt", value) for value in (None, 5, True, NAN, {"a": 1}, ["a coat"], "a" * (MAX_PROMPT + 1))],
    ("prompt", "half a pair \ud800"),
    ("prompt", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}),
    ("prompt", {"path": "http://127.0.0.1:9/x", "meta": {"_type": "gradio.FileData"}}),
    *[("seed", value) for value in (*NO_NUMBERS, "", "<b>", 10**400, 2**31, 1.5)],
    *[("guidance_scale", value) for value in (*NO_NUMBERS, 10**9, 0.99)],
    *[("control_guidance_scale", value) for value in (*NO_NUMBERS, 10**9, 5.01)],
    *[("num_inference_steps", value) for value in (*NO_NUMBERS, 10**9, 0, 101, 2.5)],
    *[("view", value) for value in (None, 5, "whole", [0, 0], {}, {"top": 1}, WHOLE | {"zoom": 2})],
    *[("view", WHOLE | {"original_size": value}) for value in ("9", NAN, INFINITE, 10**9, 0, 0.5, SIDE + 1)],
    *[("view", WHOLE | {extent: value}) for extent in ("height", "width") for value in (None, NAN, 0, 10**9)],
    *[("view", WHOLE | {start: value}) for start in ("top", "left") for value in ("0", NAN, 1, -1, 10**9)],
    *[("view", WHOLE | {"shape": value}) for value in (None, 1, "9x9", ["24x40"])],
    *[("view", WHOLE | {"flip": value}) for value in (None, 1, "yes", [True])],
    ("view", WHOLE | {"original_size": 14, "height": 14, "width": 14, "left": 1}),
]
CLOSED_TO_POSTS = (
    *("upload", "upload?upload_id=a", "component_server", "process_recording", "stream/a", "stream/a/close"),
    *("run/draw", "api/draw", "run-history/connect", "vibe-edit", "undo-vibe-edit", "file=a", "profiling/clear"),
)
CLOSED_TO_GETS = (
    *("file=/etc/passwd", "file=..%2f..%2fetc%2fpasswd", "file=https://127.0.0.1/", "proxy=https://127.0.0.1/"),
    *("file={folder}/../../etc/passwd", "file={folder}%2f..%2f..%2fetc%2fpasswd", "file={folder}x/a.png"),
    *("file={folder}", "file={folder}/", "file={folder}/a.png", "file/etc/passwd", "custom_component/a/b/c/d"),
    *("upload_progress?upload_id=a", "deep_link?session_hash=a", "stream/a/b/1/playlist.m3u8", "dev/reload", "runs"),
)


def load_bundled():
    """The bundled pipeline with few steps, so that its page opens at once."""
    pipe = bundled.load_bundled()
    pipe.register_to_config(default_num_inference_steps=2)
    return pipe


@pytest.fixture(scope="module")
def page():
    """A page of the bundled pipeline, on a server in this process."""
    page = build_demo(load_bundled())
    page.launch(prevent_thread_lock=True, quiet=True)
    yield page
    page.close()


@pytest.fixture(scope="module")
def client(page):
    return Client(page.local_url, verbose=False)


def _post(page, path, **request):
    return httpx.post(f"{page.local_url}gradio_api/{path}", timeout=PATIENCE, **request)


def _call(page, **values) -> tuple[str, object]:
    """Call `/draw` by plain HTTP, with JSON that the client would not send. Returns the event and its data."""
    answer = _post(
        page, "call/v2/draw", content=json.dumps(FEW | values), headers={"content-type": "application/json"}
    )
    lines = _result(page, answer).splitlines()
    return lines[-3].removeprefix("event: "), json.loads(lines[-2].removeprefix("data: "))


def _result(page, answer) -> str:
    """The messages of the server until a call is done."""
    url = f"{page.local_url}gradio_api/call/draw/{answer.json()['event_id']}"
    return httpx.get(url, timeout=PATIENCE).text


def _messages(page, session) -> str:
    """The messages of the server to a visit until no call is pending."""
    return httpx.get(f"{page.local_url}gradio_api/queue/data?session_hash={session}", timeout=PATIENCE).text


def _function(page, name) -> int:
    return next(key for key, event in page.fns.items() if event.name == name)


def _files(page) -> list[Path]:
    """The files besides those that the page opens with."""
    return [file for file in page.pictures.path.iterdir() if file.stem not in ("plain", "asked")]


def _wait_until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_endpoint_and_its_parameters_have_names(client):
    (name, endpoint), *others = client.view_api(print_info=False, return_format="dict")["named_endpoints"].items()
    assert name == "/draw" and others == []
    names = [parameter["parameter_name"] for parameter in endpoint["parameters"]]
    assert names == ["prompt", "seed", "guidance_scale", "control_guidance_scale", "num_inference_steps", "view"]
    assert all(parameter["parameter_has_default"] for parameter in endpoint["parameters"])


def test_a_class_model_draws_a_class_by_its_number_or_name(class_pipeline):
    pipe = class_pipeline()
    pipe.register_to_config(class_names=["boot", "coat", "bag"])
    page = build_demo(pipe)
    page.launch(prevent_thread_lock=True, quiet=True)
    by_number, by_name, unknown = (
        _result(page, _post(page, "call/v2/draw", json={"class_labels": label, "guidance_scale": 2}))
        for label in (2, "bag", "shoe")
    )
    page.close()
    assert "event: complete" in by_number and "event: complete" in by_name
    assert "`class_labels` is 'shoe'; it must be a whole number from 0 to 2." in unknown


def test_a_class_model_is_asked_for_a_class(class_pipeline):
    page = build_demo(class_pipeline())
    names = [
        parameter["parameter_name"] for parameter in page.get_api_info()["named_endpoints"]["/draw"]["parameters"]
    ]
    assert names[0] == "class_labels"


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{shown(value)}" for name, value in BAD])
def test_a_value_out_of_bounds_is_one_line_for_the_client_and_one_in_the_log(page, caplog, capfd, name, value):
    kind, answer = _call(page, **{name: value})
    assert kind == "error" and answer["error"].startswith((f"`{name}` ", f"`{name}."))
    assert not any(part in answer["error"] for part in ("\n", "&#", "&lt;", "<"))
    assert [record.getMessage() for record in caplog.records] == [f"refused: {answer['error']}"]
    assert capfd.readouterr().err == ""
    assert _files(page) == []


def test_the_python_client_hears_the_same_line(client):
    with pytest.raises(ValueError, match=r"`seed` is '7'; it must be a whole number from 0 to 2147483647\."):
        client.predict(seed="7", api_name="/draw")


@pytest.mark.parametrize("values", [{"seed": 7.0}, {"prompt": ""}, {"num_inference_steps": 1}, {"guidance_scale": 10}])
def test_a_value_on_the_bounds_is_drawn(page, values):
    assert _call(page, **values)[0] == "complete"
    page.pictures.clear()


@pytest.mark.parametrize("path", CLOSED_TO_POSTS)
def test_what_the_page_does_not_need_is_closed_to_posts(page, path):
    answer = _post(page, path, files={"files": ("big.bin", b"0" * (8 << 20))})
    assert (answer.status_code, answer.text) == (403, "This page does not accept this request.")


@pytest.mark.parametrize("path", CLOSED_TO_GETS)
def test_what_the_page_does_not_need_is_closed_to_gets(page, path):
    url = f"{page.local_url}gradio_api/{path.format(folder=page.pictures.path)}"
    assert httpx.get(url).status_code == 403


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_request_is_refused(page, chunked):
    content = (b" " * 1000 for _ in range(1000)) if chunked else b" " * (MAX_BODY + 1)
    assert _post(page, "queue/join", content=content).status_code == 413


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("call/nothing", '{"data": []}'),
        ("call/v2/draw", '{"nothing": 1}'),
        ("queue/join", '{"data": [], "fn_index": 1000000000, "session_hash": "a"}'),
    ],
)
def test_a_request_that_cannot_be_is_one_line(page, caplog, capfd, path, content):
    answer = _post(page, path, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "\n" not in answer.text
    assert len(caplog.records) == 1 and capfd.readouterr().err == ""


@pytest.mark.parametrize("chosen", [None, 3, {}, {"index": -1}, {"index": "a"}, {"index": 10**9}, {"index": [0, 1]}])
def test_a_choice_that_is_not_in_the_gallery_is_one_line(page, caplog, capfd, chosen):
    session = secrets.token_hex()
    body = {"data": [None], "fn_index": _function(page, "go_back"), "session_hash": session, "event_data": chosen}
    assert _post(page, "queue/join", json=body).status_code == 200
    assert "the chosen drawing is not one of the 1 in the gallery." in _messages(page, session)
    assert len(caplog.records) == 1 and capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        ({"query": "seed=-1"}, "`seed` is -1; it must be a whole number from 0 to 2147483647."),
        ({"query": "seed=<b>"}, "`seed` is '‹b>'; it must be a whole number"),
        ({"query": "seed=1&seed=2"}, "`seed` is given twice"),
        ({"query": 7}, "it has no query."),
        ({}, "it has no query."),
        (None, "it has no query."),
        (7, "it has no query."),
    ],
)
def test_a_link_that_cannot_be_is_one_line(page, caplog, capfd, opened, message):
    session = secrets.token_hex()
    body = {"data": [], "fn_index": _function(page, "open_link"), "session_hash": session, "event_data": opened}
    assert _post(page, "queue/join", json=body).status_code == 200
    assert f"the link is not opened: {message}" in _messages(page, session)
    assert len(caplog.records) == 1 and capfd.readouterr().err == ""


def test_several_users_at_once_get_what_each_gets_alone(page):
    def draw(seed) -> bytes:
        return Path(_call(page, seed=seed)[1][-1]["path"]).read_bytes()

    seeds = range(4)
    alone = [draw(seed) for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as users:
        together = list(users.map(draw, seeds))
    assert together == alone and len(set(alone)) == len(seeds)
    page.pictures.clear()


@contextmanager
def _visit(page):
    """A page that stays open as in a browser; yields a function that draws on it."""
    session = secrets.token_hex()

    def draw():
        body = {"data": [None, *DEFAULTS.values()], "fn_index": _function(page, "draw"), "session_hash": session}
        assert _post(page, "queue/join", json=body).status_code == 200
        assert '"success":true' in _messages(page, session)

    with httpx.stream("GET", f"{page.local_url}gradio_api/heartbeat/{session}", timeout=PATIENCE):
        yield draw


def test_the_drawings_of_a_visit_end_with_it_and_those_of_others_stay(page):
    with _visit(page) as draw:
        draw()
        staying = set(_files(page))
        with _visit(page) as draw_elsewhere:
            draw_elsewhere()  # the same image
            assert len(_files(page)) == 2 * len(staying) == 4
        _wait_until(lambda: set(_files(page)) == staying)
    _wait_until(lambda: _files(page) == [])


def test_the_drawings_of_a_call_whose_end_is_not_seen_are_removed_after_a_while(monkeypatch):
    monkeypatch.setattr("improved_ldm.demo.page.VISIT", 0.5)
    page = build_demo(load_bundled())
    page.launch(prevent_thread_lock=True, quiet=True)
    assert _call(page)[0] == "complete"
    _wait_until(lambda: _files(page) == [])
    page.close()


def test_a_page_that_closes_leaves_no_drawings():
    page = build_demo(load_bundled())
    page.launch(prevent_thread_lock=True, quiet=True)
    assert _call(page)[0] == "complete" and len(_files(page)) == 2
    page.close()
    assert list(page.pictures.path.iterdir()) == []


def test_a_full_queue_says_so(text_pipeline):
    pipe, may_draw = text_pipeline(), Event()
    page = build_demo(pipe, queue=1)
    pipe.denoiser.register_forward_pre_hook(lambda *_: may_draw.wait(PATIENCE) and None)
    page.launch(prevent_thread_lock=True, quiet=True)
    answers = []
    while not answers or answers[-1].status_code == 200:
        answers.append(_post(page, "call/v2/draw", json={}))
        assert len(answers) < 5
    assert answers[-1].status_code == 503 and "Queue is full. Max size is 1" in answers[-1].text
    may_draw.set()
    assert all("event: complete" in _result(page, answer) for answer in answers[:-1])
    page.close()
