"""Joins rows and a transform into batches for training."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from improved_ldm.conditioning.control import control_tensor
from improved_ldm.data.sources import Row, Rows, RowStream
from improved_ldm.data.transforms import ImageTransform


class SampleStream(torch.utils.data.IterableDataset):
    """The rows of a stream, transformed; resumable like the stream.

    Args:
        rows: the stream of rows.
        transform: transform of the images, with the seed of each row.
    """

    def __init__(self, rows: RowStream, transform: ImageTransform):
        self.rows, self.transform = rows, transform

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._sample, self.rows)

    def _sample(self, row: Row) -> dict[str, Any]:
        pixels, control = self.transform(row.image, Random(row.seed), row.size)
        return {"pixels": pixels, "control": control, "caption": row.caption, "label": row.label, "seed": row.seed}

    def state_dict(self) -> dict[str, Any]:
        """The state of the rows."""
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.rows.load_state_dict(state)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples into a batch.

    Args:
        samples: dicts of pixels, control, caption, label and seed, one per sample.

    Returns:
        pixels: (batch, 3, height, width) float32 in [-1, 1].
        control: (batch, `NUM_CONTROL`) float32.
        caption: list of strings; absent if captions are not read.
        label: (batch,) int64; absent if labels are not read.
        seed: (batch,) int64, for random numbers that a sample needs after its pixels.
    """
    batch = {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "control": control_tensor([sample["control"] for sample in samples]),
        "seed": torch.tensor([sample["seed"] for sample in samples]),
    }
    if samples[0]["caption"] is not None:
        batch["caption"] = [sample["caption"] for sample in samples]
    if samples[0]["label"] is not None:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def make_loader(
    rows: Rows,
    transform: ImageTransform,
    batch_size: int,
    seed: int = 0,
    shuffle_window: int = 1024,
    repeat: bool = True,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
) -> "SampleLoader":
    """A loader of one rank's batches. Its state resumes at the next batch, with as many workers and ranks as before.

    Args:
        rows: the opened set.
        transform: transform from image to sample.
        batch_size: samples per batch. A single pass (`repeat=False`) may end with smaller batches, one per worker.
        seed, shuffle_window, repeat, rank, world_size: see `RowStream`.
        num_workers: number of processes that read and transform; 0 uses the main process.

    Returns:
        The loader, with batches of `collate`. Save one state per rank, and do not pass the loader to accelerate's
        `prepare`, which would split the batches again.
    """
    stream = RowStream(
        rows, seed, shuffle_window, repeat, rank, world_size, min_size=transform.decode_size, batch_size=batch_size
    )
    return SampleLoader(
        SampleStream(stream, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        worker_init_fn=_end_quietly,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # the loader's iterator draws a seed; the global generator, which training uses, must not change by that
        generator=torch.Generator().manual_seed(seed),
    )


def _end_quietly(_: int):
    """Keep a worker from printing an error when an interrupted main process closes the connection."""
    print_error = sys.excepthook

    def hook(kind: type[BaseException], *error):
        if not issubclass(kind, ConnectionError | EOFError):
            print_error(kind, *error)

    sys.excepthook = hook


class SampleLoader(StatefulDataLoader):
    """A loader that raises the errors of workers with their original messages."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with _worker_errors():
            yield from super().__iter__()


@contextmanager
def _worker_errors():
    """Restore the message of a worker's error, which PyTorch replaces with a traceback that ends with it."""
    try:
        yield
    except Exception as error:
        if not str(error).startswith("Caught "):
            raise
        *_, last = str(error).splitlines()
        raise type(error)(last.partition(": ")[2] or last) from error
