"""Runs that cannot write, or are not alone, end with one line of advice; earlier files stay intact."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from improved_ldm.hub.repository import HubError
from improved_ldm.manifest import find_damage
from improved_ldm.trainer.lock import LOCK, Owner, lock_folder, released_locks
from tests.scripts import ScriptProcess, launch, wait_for
from tests.trainer.conftest import load_script

ENDLESS = {"training.steps": 100_000, "cache.passes": 0}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 24 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def assert_one_line(process: ScriptProcess, *parts: str) -> str:
    """Check that a run ends with status 1 and a one-line error that contains these parts."""
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 1, output
    assert "Traceback" not in output
    line = output.splitlines()[-1]
    assert line.startswith("not trained: ")
    for part in parts:
        assert part in line, line
    return output


def whole_checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoints/step-*") if find_damage(path) is None)


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoints_whole_and_the_run_goes_on_when_there_is_room(arguments, small_disk):
    words = arguments(**ENDLESS | {"output_dir": small_disk / "run"})
    process = launch(words)
    wait_for(small_disk / "run" / "checkpoints" / "step-00000002", process)
    filler = small_disk / "filler"
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))
    output = assert_one_line(process, "No space left on device", "MiB are free", "Make room")
    whole = whole_checkpoints(small_disk / "run")
    assert whole, output
    assert whole == sorted(path.name for path in small_disk.glob("run/checkpoints/*")), "nothing half-written stays"
    assert not (small_disk / "run" / LOCK).exists()
    filler.unlink()
    reached = int(whole[-1][5:])
    load_script("train_t2i").main([*words, f"--training.steps={reached + 1}", f"--output_dir={small_disk / 'run'}"])
    assert whole_checkpoints(small_disk / "run")[-1] == f"step-{reached + 1:08d}"


@pytest.mark.slow
def test_a_disk_that_is_full_while_the_cache_is_written(arguments, small_disk, tmp_path):
    (small_disk / "filler").write_bytes(bytes(23 * 2**20))
    process = launch(arguments(**{"cache.folder": small_disk / "cache", "cache.passes": 60}))
    assert_one_line(process, "safetensors cannot be written", "No space left on device")
    assert not list((small_disk / "cache").iterdir())


@pytest.mark.slow
def test_a_read_only_folder(arguments, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert_one_line(
        launch(arguments(output_dir=small_disk / "run")), "`output_dir`", "Read-only file system", "Choose another"
    )


@pytest.mark.parametrize("below", ["", "run"], ids=["itself", "above"])
def test_a_file_in_place_of_the_folder(arguments, tmp_path, below):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(OSError, match=r"`output_dir` is '.*file.*'; a file is in its place\. Choose another"):
        load_script("train_t2i").main(arguments(output_dir=tmp_path / "file" / below))
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(arguments, tmp_path):
    first = launch(arguments(**ENDLESS))
    try:
        wait_for(tmp_path / "run" / "checkpoints" / "step-00000002", first)
        assert_one_line(
            launch(arguments(**ENDLESS)), f"process {first.pid} of", "is training in", "wait for it, or stop it"
        )
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGINT)
        output = first.communicate(timeout=120)[0]
    assert "stopped after step" in output
    assert "of 100000; the same command resumes from there" in output
    assert whole_checkpoints(tmp_path / "run")[-1] == max(
        path.name for path in tmp_path.glob("run/checkpoints/step-*")
    )
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.slow
def test_two_runs_write_one_cache_at_the_same_time(arguments, tmp_path):
    shared = {"cache.folder": tmp_path / "caches", "cache.passes": 4}
    gone = Owner(socket.gethostname(), 2**22 + 1, 1)
    processes = [launch(arguments(f"{name}/run", **shared)) for name in ("one", "other")]
    for process in processes:
        output = process.communicate(timeout=240)[0]
        assert process.returncode == 0, output
    (cache,) = (tmp_path / "caches").iterdir()
    assert find_damage(cache) is None
    left = cache.with_name(f"{cache.name}.unfinished-by-{gone}")
    cache.rename(left)
    load_script("train_t2i").main(arguments("third", **shared))
    assert [path.name for path in (tmp_path / "caches").iterdir()] == [cache.name]


@pytest.mark.parametrize(
    "content", [b"", b'{"host": "', b"[]", bytes(40), None], ids=["empty", "cut", "list", "zeros", "gone"]
)
def test_a_lock_without_a_living_process_is_taken_over(tmp_path, content):
    gone = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": 1}).encode()
    (tmp_path / LOCK).write_bytes(gone if content is None else content)
    said = []
    with released_locks():
        lock_folder(tmp_path, said.append)
        assert json.loads((tmp_path / LOCK).read_bytes())["pid"] == os.getpid()
        lock_folder(tmp_path, said.append)
    assert len(said) == 1 and "taken over" in said[0]
    assert not list(tmp_path.iterdir())


def test_a_lock_of_another_machine_is_respected(tmp_path):
    lock = tmp_path / LOCK
    lock.write_text('{"host": "elsewhere", "pid": 1, "started": 1}', encoding="utf-8")
    with pytest.raises(
        BlockingIOError, match=r"process 1 of elsewhere is training in .*: if it has ended, delete .*run\.lock"
    ):
        lock_folder(tmp_path, print)
    assert lock.exists()


def test_a_lock_is_released_whatever_happens(arguments, tmp_path):
    with pytest.raises(HubError):  # it is offline
        load_script("train_t2i").main(arguments(**{"hub.repo": "user/name", "hub.push_every": 1}))
    assert (tmp_path / "run" / "config.yaml").exists() and not (tmp_path / "run" / LOCK).exists()


def test_an_owner_is_read_from_its_name():
    owner = Owner.this_process()
    assert Owner.from_text(str(owner)) == owner and not owner.is_gone
    assert Owner.from_text("anything") is None
    assert Owner("my-host.local", 3, 4) == Owner.from_text("my-host.local-3-4")


def test_a_killed_process_that_nobody_waits_for_is_gone():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = Owner(socket.gethostname(), child.pid, int(psutil.Process(child.pid).create_time()))
    assert not owner.is_gone
    child.kill()
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert owner.is_gone
    child.wait()
    assert owner.is_gone


def test_a_lock_that_names_no_process_is_taken_over(tmp_path):
    lock, said = tmp_path / "run.lock", []
    for pid in ("-1", "4294967296", '"x"', "1.5"):
        lock.write_text(f'{{"host": "{socket.gethostname()}", "pid": {pid}, "started": 0}}', encoding="utf-8")
        with released_locks():
            lock_folder(tmp_path, said.append)
    lock.symlink_to(tmp_path / "nowhere")
    with released_locks():
        lock_folder(tmp_path, said.append)
    assert len(said) == 5 and all("is taken over" in line for line in said)
    assert not list(tmp_path.iterdir())
