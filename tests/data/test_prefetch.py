import threading

import pytest
import torch

from improved_ldm.data.latents import EncodingLoader, SampleEncoder
from improved_ldm.data.loader import make_loader
from improved_ldm.data.prefetch import Prefetcher
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform

CPU = torch.device("cpu")


@pytest.fixture
def open_loader(autoencoder):
    """Opens the same loader again and again."""

    def make(workers: int = 0) -> EncodingLoader:
        rows = open_rows("embedded:fashion-mnist", "test", label_column="label")
        loader = make_loader(rows, ImageTransform(8, flip_probability=0.5), batch_size=3, num_workers=workers)
        return EncodingLoader(loader, SampleEncoder(autoencoder))

    return make


def take(batches, count: int) -> list:
    return [next(batches).latents for _ in range(count)]


@pytest.mark.parametrize("ahead", [1, 2, 5])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_and_state_are_those_of_the_loader(open_loader, ahead, workers):
    plain, ahead_of_time = open_loader(workers), Prefetcher(open_loader(workers), ahead, CPU)
    iterator = iter(ahead_of_time)
    for expected, got in zip(take(iter(plain), 3), take(iterator, 3), strict=True):
        assert torch.equal(expected, got)
    resumed = Prefetcher(open_loader(workers), ahead, CPU)
    resumed.load_state_dict(ahead_of_time.state_dict())
    following = iter(resumed)
    assert all(map(torch.equal, take(iterator, 2), take(following, 2)))
    iterator.close(), following.close()


def test_the_thread_ends_with_the_iteration(open_loader):
    iterator = iter(Prefetcher(open_loader(), 2, CPU))
    next(iterator)
    assert "prefetch" in {thread.name for thread in threading.enumerate()}
    iterator.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_an_error_is_raised_at_its_batch(tmp_path):
    class Failing:
        def __iter__(self):
            yield from (EncodedLike(number) for number in range(2))
            raise OSError("the disk is gone")

        def state_dict(self):
            return {}

    class EncodedLike(int):
        def to(self, device):
            return self

    batches = iter(Prefetcher(Failing(), 5, CPU))
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
