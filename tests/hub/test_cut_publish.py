"""`training/publish.py` is interrupted at each request in turn: `main` always has the newest finished version."""

import copy
import signal

import numpy as np
import pytest

from tests.hub.conftest import PUBLISH, Clients, publishing
from tests.hub.minihub import Fault, MiniHub
from tests.scripts import SECONDS


@pytest.fixture
def staged_release(hub, clients, trained_folder, tmp_path):
    """A repository with a version v0.1, and the folder of a run in two stages to publish as v0.2."""
    clients.publish(trained_folder("first"), "v0.1")
    trained_folder("run/stage-1-8", seed=1)
    lineage = [{"source": (tmp_path / "run" / "stage-1-8").as_posix(), "steps": 3, "resolution": [8, 16]}]
    return trained_folder("run", seed=2, lineage=lineage)


class Checkpoint:
    """A state of the double to return to. Images sampled from `main` are cached."""

    def __init__(self, hub: MiniHub, clients: Clients):
        self.hub, self.clients = hub, clients
        self.repositories, self.contents = copy.deepcopy(hub.store.repositories), dict(hub.store.contents)
        self.drawings = {}

    def restore(self):
        self.hub.clear()
        self.hub.store.repositories, self.hub.store.contents = copy.deepcopy(self.repositories), dict(self.contents)

    def main(self) -> np.ndarray:
        """An image sampled from the pipeline on `main`."""
        files = tuple(sorted(self.hub.repository("user/model").resolve("main").files.items()))
        if files not in self.drawings:
            self.drawings[files] = self.clients.drawing("user/model")[0]
        return self.drawings[files]


def cut_by_kill(hub: MiniHub, clients: Clients, folder, fault: Fault):
    """Kill a publishing process while it waits for a response."""
    hub.faults = [fault]
    process = clients.start(PUBLISH, *publishing(folder, "v0.2"))
    assert hub.stalled.wait(SECONDS)
    process.kill()
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("answered", [False, True], ids=["lost requests", "lost answers"])
def test_whoever_loads_main_gets_a_finished_version(hub, clients, staged_release, answered):
    before = Checkpoint(hub, clients)
    old = before.main()
    hub.log.clear()
    clients.publish(staged_release, "v0.2")
    requests = list(hub.log)
    new, files = before.main(), hub.repository("user/model").resolve("main").files
    assert not np.array_equal(old, new)
    changes = [number for number, request in enumerate(requests) if request.method in ("POST", "PUT")]
    assert len(changes) > 8
    moved = []
    for number in changes:
        before.restore()
        body = {"body": "stall"} if answered else {"body": "silence"}
        cut_by_kill(hub, clients, staged_release, Fault("", "", after=number, **body))
        found = before.main()
        assert np.array_equal(found, old) or np.array_equal(found, new), requests[number]
        moved.append(np.array_equal(found, new))
        hub.faults = []
        clients.publish(staged_release, "v0.2")
        repository = hub.repository("user/model")
        assert repository.tags.keys() == {"v0.1", "v0.2-stage-1-8", "v0.2"}, requests[number]
        assert repository.resolve("main").files == repository.resolve("v0.2").files == files
    assert moved == sorted(moved) and {*moved} == {False, True}  # it changes once and never back


@pytest.mark.slow
def test_a_connection_that_is_cut_once_is_asked_again(hub, clients, staged_release):
    before = Checkpoint(hub, clients)
    hub.log.clear()
    clients.publish(staged_release, "v0.2")
    files, count = hub.repository("user/model").resolve("main").files, len(hub.log)
    for number in range(count):
        before.restore()
        hub.faults = [Fault("", "", after=number, body="cut")]
        clients.publish(staged_release, "v0.2")
        assert not hub.faults[0].times
        assert hub.repository("user/model").resolve("main").files == files
