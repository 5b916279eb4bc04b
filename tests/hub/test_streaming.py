"""Runs that stream a dataset from a Hub that is busy, closes connections, stalls, or stays unreachable."""

import hashlib
import io
import json
import signal
import tarfile
import threading
import time
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from tests.hub.minihub import Fault
from tests.scripts import ROOT, SECONDS
from tests.trainer.conftest import arguments, images  # noqa: F401  fixtures

SHARDS = 6
NAME = "user/data"
CLIENTS = ROOT / "tests" / "hub" / "clients.py"
TRAIN = ROOT / "training" / "train_t2i.py"
SHORT = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "IMPROVED_LDM_RETRY_SECONDS": "8"}
SHARD_3 = r"resolve/.*/train-00003\.parquet"


@pytest.fixture
def dataset(hub, images) -> str:  # noqa: F811
    """The id of a dataset of parquet shards on the Hub."""
    table = pq.read_table(images / "train.parquet")
    rows = len(table) // SHARDS
    put(hub, {f"data/train-{i:05d}.parquet": parquet(table.slice(i * rows, rows)) for i in range(SHARDS)})
    return NAME


@pytest.fixture
def webdataset(hub, images) -> str:  # noqa: F811
    """The id of a dataset of one large tar on the Hub."""
    rows = pq.read_table(images / "train.parquet").to_pylist()
    put(hub, {"train-00000.tar": tar(rows)})
    return NAME


def parquet(table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def tar(rows: list[dict]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for number, row in enumerate(rows):
            for suffix, content in (("png", row["image"]["bytes"]), ("txt", row["text"].encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def put(hub, files: dict[str, bytes]):
    """Make a dataset of these files."""
    hub.store.create("dataset", NAME, private=False)
    blobs = {}
    for path, content in files.items():
        sha256 = hashlib.sha256(content).hexdigest()
        hub.store.contents[sha256] = content
        blobs[path] = hub.store.large(sha256)
    hub.store.commit(hub.repository(NAME, "dataset"), "main", blobs, "data")


@pytest.fixture
def streamed(clients, tmp_path):
    """Reads a dataset in its own process; returns the result and the output."""

    def read(name: str, code: int = 0, num_workers: int = 0, **environment: str) -> tuple[list | None, str]:
        file = tmp_path / "rows.json"
        file.unlink(missing_ok=True)
        options = json.dumps({"name": name, "file": str(file), "num_workers": num_workers})
        output = clients.run(CLIENTS, "stream", options, code=code, **{**SHORT, **environment})
        return (json.loads(file.read_text(encoding="utf-8")) if file.exists() else None), output

    return read


def host(hub) -> str:
    return hub.url.removeprefix("http://")


PASSING = {
    "busy": [Fault("GET", SHARD_3, 503, times=2)],
    "asks to wait": [Fault("GET", SHARD_3, 429, headers={"Retry-After": "3"})],
    "cut": [Fault("GET", SHARD_3, body="cut", sent=500, times=2)],
    "reset": [Fault("GET", SHARD_3, body="cut")],
    "stalled": [Fault("GET", SHARD_3, body="stall", sent=500)],
    "silent": [Fault("GET", SHARD_3, body="silence")],
    "trickling": [Fault("GET", SHARD_3, body="trickle", sent=500)],
    "out of order when opened": [
        Fault("HEAD", "README", 500),
        Fault("GET", "/api/datasets/user/data/tree", 502),
        Fault("GET", "/api/datasets/user/data", 504, times=2),
    ],
    "silent when opened": [Fault("GET", "/api/datasets/user/data", body="silence")],
}


@pytest.mark.parametrize(
    "fault", [pytest.param(fault, marks=pytest.mark.slow) if "trickl" in fault else fault for fault in PASSING]
)
def test_rows_are_the_same_after_faults_that_pass(hub, dataset, streamed, fault):
    whole, _ = streamed(dataset)
    hub.faults = [Fault(**vars(each)) for each in PASSING[fault]]
    again, output = streamed(dataset)
    assert again == whole and len(whole[0]) == 96
    assert not any(each.times for each in hub.faults)
    assert f"reading from {host(hub)} failed" in output and "try 1 of 4, next in" in output
    if fault == "asks to wait":
        assert "(429 Too Many Requests), try 1 of 4, next in 3 s" in output


@pytest.mark.slow
def test_a_tar_that_is_cut_again_and_again_is_read_whole(hub, webdataset, streamed):
    whole, _ = streamed(webdataset)
    hub.faults = [
        Fault("GET", r"\.tar", body="cut", sent=70_000, times=2),
        Fault("GET", r"\.tar", body="cut", sent=20_000),
        Fault("GET", r"\.tar", 503),
        Fault("GET", r"\.tar", body="stall", sent=100),
    ]
    again, output = streamed(webdataset)
    assert again == whole and len(whole[0]) == 96
    assert not any(each.times for each in hub.faults)
    assert f"reading from {host(hub)} failed" in output


LASTING = {
    "busy": (Fault("GET", SHARD_3, 503, times=99), "503 Service Unavailable"),
    "cut": (Fault("GET", SHARD_3, body="cut", sent=10, times=99), "closed connection"),
    "stalled": (Fault("GET", SHARD_3, body="stall", sent=10, times=99), "timed out"),
    "silent": (Fault("GET", SHARD_3, body="silence", times=99), "timed out"),
    "asks for an hour": (Fault("GET", SHARD_3, 429, headers={"Retry-After": "3600"}), "asks to wait 3600 s"),
}


@pytest.mark.parametrize(
    ("fault", "num_workers"),
    [
        ("asks for an hour", 0),
        *(pytest.param(fault, 0, marks=pytest.mark.slow) for fault in LASTING if fault != "asks for an hour"),
        *(pytest.param(fault, 2, marks=pytest.mark.slow) for fault in ("busy", "stalled")),
    ],
)
def test_a_lasting_fault_ends_with_one_line(hub, dataset, streamed, fault, num_workers):
    hub.faults, reason = [LASTING[fault][0]], LASTING[fault][1]
    rows, output = streamed(dataset, code=1, num_workers=num_workers)
    last = output.strip().splitlines()[-1]
    assert rows is None and last.startswith(f"not read: {host(hub)} cannot be read (") and reason in last
    assert "train-00003.parquet" in last and "The same command resumes when the host answers again" in last
    assert "Traceback" not in output
    assert ("try 1 of 4" in output) == (fault != "asks for an hour")


@pytest.fixture
def train(clients, arguments, tmp_path):  # noqa: F811
    """Trains from the Hub in its own process; returns the weights, or None if there are none, and the output."""

    def run(
        output: str,
        code: int = 0,
        num_workers: int = 0,
        signal_at: threading.Event | None = None,
        steps: int = 14,
        **environment: str,
    ) -> tuple[bytes | None, str]:
        options = {"data.source": NAME, "cache.passes": 0, "data.shuffle_window": 12, "training.steps": steps}
        argv = arguments(output, **options, **{"training.checkpoint_every": 5, "data.num_workers": num_workers})
        process = clients.start(TRAIN, *argv, **{**SHORT, **environment})
        if signal_at is not None:
            assert signal_at.wait(SECONDS)
            process.send_signal(signal.SIGINT)
        said = process.communicate()[0]
        assert process.returncode == code, said
        weights = tmp_path / output / "transformer" / "diffusion_pytorch_model.safetensors"
        return (weights.read_bytes() if weights.exists() else None), said

    return run


def requests_of_shard_3(hub, train, output: str, **options) -> tuple[bytes, int]:
    """The weights of a run, and how often it asks for the shard."""
    before = len(hub.log)
    weights, _ = train(output, **options)
    asked = [request for request in hub.log[before:] if request.method == "GET" and "train-00003" in request.path]
    return weights, len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_goes_on_from_a_dead_hub_to_the_same_weights(hub, dataset, train, tmp_path, num_workers):
    _, of_first_steps = requests_of_shard_3(hub, train, "short", num_workers=num_workers, steps=6)
    whole, of_run = requests_of_shard_3(hub, train, "whole", num_workers=num_workers)
    assert of_run > of_first_steps
    passing = [Fault("GET", SHARD_3, 503), Fault("GET", SHARD_3, body="cut", sent=300)]
    hub.faults = [replace(fault, after=of_first_steps) for fault in passing]
    recovered, output = train("recovered", num_workers=num_workers)
    assert recovered == whole and "try 1 of 4, next in 1 s" in output

    for body, status in (("stall", None), (None, 503)):
        folder = f"dead-{body}"
        hub.faults = [Fault("GET", SHARD_3, status, times=99, after=of_first_steps, body=body, sent=300)]
        weights, output = train(folder, code=1, num_workers=num_workers)
        assert weights is None and "Traceback" not in output
        assert output.strip().splitlines()[-1].startswith(f"not trained: {host(hub)} cannot be read (")
        checkpoints = [path.name for path in (tmp_path / folder / "checkpoints").iterdir()]
        assert checkpoints and all(name.startswith("step-") for name in checkpoints)
        hub.faults = []
        assert train(folder, num_workers=num_workers)[0] == whole


@pytest.mark.slow
@pytest.mark.parametrize("body", ["stall", "silence"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ctrl_c_ends_a_run_that_waits_for_a_silent_hub(hub, dataset, train, body, num_workers):
    _, of_first_steps = requests_of_shard_3(hub, train, "short", num_workers=num_workers, steps=6)
    hub.faults = [Fault("GET", SHARD_3, times=99, after=of_first_steps, body=body)]
    output, seconds = interrupted(hub, train, num_workers)
    assert output.strip().splitlines()[-1].startswith("stopped after step ") and "Traceback" not in output
    assert seconds < 20
    hub.faults = []
    assert train("run", num_workers=num_workers)[0] == train("whole", num_workers=num_workers)[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/api/datasets/user/data", SHARD_3])
def test_ctrl_c_ends_a_run_before_its_first_step(hub, dataset, train, path):
    hub.faults = [Fault("GET", path, times=99, body="silence")]
    output, seconds = interrupted(hub, train)
    assert output.strip().splitlines()[-1] == "interrupted; the same command resumes from there"
    assert seconds < 20 and "Traceback" not in output


def interrupted(hub, train, num_workers: int = 0) -> tuple[str, float]:
    """Interrupt a run once the Hub stalls; returns its output and the seconds until it ended."""
    began, patient = [], {"HF_HUB_DOWNLOAD_TIMEOUT": "10", "IMPROVED_LDM_RETRY_SECONDS": "600"}
    noted = threading.Thread(target=lambda: hub.stalled.wait(SECONDS) and began.append(time.monotonic()))
    noted.start()
    _, output = train("run", code=1, num_workers=num_workers, signal_at=hub.stalled, **patient)
    noted.join()
    return output, time.monotonic() - began[0]
