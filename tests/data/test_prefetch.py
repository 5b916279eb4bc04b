import threading
import time
from itertools import islice

import pytest
import torch

from improved_ldm.data.latents import EncodedBatch
from improved_ldm.data.prefetch import Prefetcher

CPU = torch.device("cpu")


class Numbers:
    """Batches that hold their number; the state is the number of the next one."""

    def __init__(self, fails_at=None, seconds=0.0):
        self.number, self.fails_at, self.seconds = 0, fails_at, seconds

    def __iter__(self):
        while True:
            time.sleep(self.seconds)
            if self.number == self.fails_at:
                raise OSError("the disk is gone")
            self.number += 1
            yield EncodedBatch(torch.full((1, 1, 1, 1), self.number - 1.0), torch.zeros(1, 1))

    def state_dict(self):
        return {"number": self.number}

    def load_state_dict(self, state):
        self.number = state["number"]


def numbers(batches, count):
    return [int(batch.latents) for batch in islice(batches, count)]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_batches_come_in_order_and_the_state_is_that_of_the_last_one_given(count):
    prefetcher = Prefetcher(Numbers(), count, CPU)
    batches = iter(prefetcher)
    for number in range(20):
        assert numbers(batches, 1) == [number]
        time.sleep(0.002)  # the thread is ahead
        assert prefetcher.state_dict() == {"number": number + 1}
    resumed = Prefetcher(Numbers(), count, CPU)
    resumed.load_state_dict(prefetcher.state_dict())
    assert numbers(iter(resumed), 3) == [20, 21, 22]


def test_an_error_is_raised_at_its_batch():
    prefetcher = Prefetcher(Numbers(fails_at=4), 3, CPU)
    batches = iter(prefetcher)
    assert numbers(batches, 4) == [0, 1, 2, 3]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert prefetcher.state_dict() == {"number": 4}


def test_the_thread_ends_with_its_iterator():
    before = threading.active_count()
    batches = iter(Prefetcher(Numbers(), 2, CPU))
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before


def test_preparation_and_use_overlap():
    batches = iter(Prefetcher(Numbers(seconds=0.05), 2, CPU))
    next(batches)
    start = time.perf_counter()
    for _ in range(8):
        time.sleep(0.05)
        next(batches)
    assert time.perf_counter() - start < 0.7  # of 0.8 s one after the other


def test_the_state_before_the_first_batch_is_that_of_the_loader():
    prefetcher = Prefetcher(Numbers(), 2, CPU)
    prefetcher.load_state_dict({"number": 5})
    assert prefetcher.state_dict() == {"number": 5}
