"""Joins rows and transforms into batches for training."""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from random import Random
from typing import Any, Protocol

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from improved_ldm.conditioning.control import control_tensor
from improved_ldm.data.buckets import Buckets
from improved_ldm.data.indexed import IndexedSource, IndexedStream
from improved_ldm.data.mixed_streams import BatchedRows, MixedRows
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.rows import Row, Rows
from improved_ldm.data.stream import RowStream
from improved_ldm.data.tally import given_by_source, given_state
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.naming import naming_part
from improved_ldm.resolution import side_of


class RowBatches(Protocol):
    """Batches of rows that fit together, and the position in them."""

    def __iter__(self) -> Iterator[list[Row]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]): ...


class SampleStream(torch.utils.data.IterableDataset):
    """Batches of transformed rows; resumable like the rows.

    Args:
        batches: batches of rows, all of one group.
        transforms: transform of the images of each group, with the seed of each row.
    """

    def __init__(self, batches: RowBatches, transforms: Sequence[ImageTransform]):
        self.batches, self.transforms = batches, transforms
        self.given: Counter[int] = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for rows in self.batches:
            self.given.update(row.source for row in rows)
            yield collate(list(map(self._sample, rows)))

    def _sample(self, row: Row) -> dict[str, Any]:
        pixels, control = self.transforms[row.group](row.image, Random(row.seed), row.size)
        about = {"caption": row.caption, "label": row.label, "seed": row.seed, "source": row.source}
        return {"pixels": pixels, "control": control, **about}

    def state_dict(self) -> dict[str, Any]:
        """The state of the rows, and how many samples were given, by source."""
        return {"rows": self.batches.state_dict(), **given_state(self.given)}

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.batches.load_state_dict(state["rows"])
        self.given = given_by_source(state)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples into a batch.

    Args:
        samples: dicts of pixels, control, caption, label, seed and source, one per sample.

    Returns:
        pixels: (batch, 3, height, width) uint8.
        control: (batch, `NUM_CONTROL`) float32.
        caption: list of strings; absent if captions are not read.
        label: (batch,) int64; absent if labels are not read.
        seed: (batch,) int64, for random numbers that a sample needs after its pixels.
        source: (batch,) int64, number of the set that a sample is from.
    """
    batch = {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "control": control_tensor([sample["control"] for sample in samples]),
        "seed": torch.tensor([sample["seed"] for sample in samples]),
        "source": torch.tensor([sample["source"] for sample in samples]),
    }
    if samples[0]["caption"] is not None:
        batch["caption"] = [sample["caption"] for sample in samples]
    if samples[0]["label"] is not None:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    return batch


def make_loader(
    rows: Rows | Mixture,
    transform: ImageTransform,
    batch_size: int,
    seed: int = 0,
    shuffle_window: int = 1024,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    buckets: Buckets | None = None,
    indexed: Sequence[IndexedSource] | None = None,
) -> "SampleLoader":
    """A loader of one rank's endless batches. Its state resumes at the next batch, with as many workers and ranks.

    Sets of known length are shuffled as a whole, anew in each pass. A stream from the Hub is shuffled within windows.

    Args:
        rows: the opened set, or several.
        transform: transform from image to sample.
        batch_size: samples per batch; batches of rare buckets have fewer.
        seed, rank, world_size: see `RowStream`.
        shuffle_window: number of rows of a stream that are shuffled together; with 0 or 1 nothing is shuffled.
        num_workers: number of processes that read and transform; 0 uses the main process.
        buckets: sizes of the samples; None for the size of the transform.
        indexed: the rows of the sets, if `index_sources` has already found them.

    Returns:
        The loader, with batches of `collate`. Save one state per rank, and do not pass the loader to accelerate's
        `prepare`, which would split the batches again.

    Raises:
        ValueError: if there are buckets and a set is a stream.
    """
    mixture, transforms = Mixture.of(rows), bucket_transforms(transform, buckets)
    indexed = indexed or index_sources(mixture, buckets)
    place = {"rank": rank, "world_size": world_size}
    min_sizes = [one.decode_size for one in transforms]
    weights = mixture.shares
    if indexed is not None:
        batches: RowBatches = IndexedStream(
            indexed, batch_size, seed, weights, shuffle_window > 1, **place, min_sizes=min_sizes
        )
    else:
        streams = [
            RowStream(one, seed, shuffle_window, **place, min_size=min_sizes[0], batch_size=batch_size)
            for one in mixture.rows
        ]
        batches = BatchedRows(MixedRows(streams, weights) if len(streams) > 1 else streams[0], batch_size)
    return SampleLoader(SampleStream(batches, transforms), num_workers, seed)


def make_pass(
    rows: Rows,
    transform: ImageTransform,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    buckets: Buckets | None = None,
) -> "SampleLoader":
    """A loader of one rank's share of a single pass over a set, in the order of the set.

    Args:
        rows: the opened set.
        transform: transform from image to sample.
        batch_size: samples per batch; the last batch of each bucket and worker may have fewer.
        seed: seed of the rows' own seeds.
        rank, world_size, num_workers, buckets: see `make_loader`.
    """
    transforms = bucket_transforms(transform, buckets)
    stream = RowStream(
        rows,
        seed,
        shuffle_window=1,
        repeat=False,
        rank=rank,
        world_size=world_size,
        min_size=transform.decode_size if buckets is None else None,
        batch_size=batch_size,
    )
    return SampleLoader(SampleStream(BatchedRows(stream, batch_size, buckets), transforms), num_workers, seed)


def first_batches(
    rows: Rows, transform: ImageTransform, count: int, batch_size: int, buckets: Buckets | None = None
) -> Iterator[dict[str, Any]]:
    """The batches of `collate` of the first rows of a set that are used, read once from its beginning.

    Args:
        rows: the opened set.
        transform: transform from image to sample.
        count: largest number of rows.
        batch_size: samples per batch; the last batch of each bucket may have fewer.
        buckets: see `make_loader`.
    """
    min_size = transform.decode_size if buckets is None else None
    first = islice(RowStream(rows, shuffle_window=1, repeat=False, min_size=min_size), count)
    yield from SampleStream(BatchedRows(first, batch_size, buckets), bucket_transforms(transform, buckets))


def bucket_transforms(transform: ImageTransform, buckets: Buckets | None) -> list[ImageTransform]:
    """The transform of each bucket; one alone without buckets."""
    if buckets is None:
        return [transform]
    target = transform.target_scale
    # rounding makes some buckets of the last stage larger than the square, which is the target
    targets = [target and max(target, size, key=side_of) for size in buckets.sizes]
    return [
        replace(transform, resolution=size, target_scale=own) for size, own in zip(buckets.sizes, targets, strict=True)
    ]


def index_sources(mixture: Mixture, buckets: Buckets | None = None) -> list[IndexedSource] | None:
    """The rows of sets of known length and their buckets; None if one of them is a stream.

    Raises:
        ValueError: if there are buckets and a set is a stream, or no row of a set is used.
    """
    if streams := [rows for rows in mixture.rows if rows.table is None]:
        if buckets is not None:
            raise ValueError(
                f"`transform.buckets` is true, but a set is read as a stream ({streams[0].description}), so the sizes "
                "of its images are not known before they are read. Download and unpack the set and give its folder as "
                "`data.source`, or encode it first with `cache.passes` 1."
            )
        return None
    found = []
    for source in mixture.sources:
        with naming_part(source.name):
            found.append(IndexedSource.of(source.rows, buckets))
    return found


def _end_quietly(_: int):
    """Keep a worker from printing an error when an interrupted main process closes the connection."""
    print_error = sys.excepthook

    def hook(kind: type[BaseException], *error):
        if not issubclass(kind, ConnectionError | EOFError):
            print_error(kind, *error)

    sys.excepthook = hook


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


class SampleLoader(StatefulDataLoader):
    """A loader of the batches of a stream, which raises the errors of workers with their original messages.

    Args:
        samples: the stream.
        num_workers: number of processes that read and transform; 0 uses the main process.
        seed: seed of the loader's generator; the global one, which training uses, stays as it is.
    """

    def __init__(self, samples: SampleStream, num_workers: int, seed: int):
        with warnings.catch_warnings():  # torchdata calls a function that PyTorch has deprecated
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")
            super().__init__(
                samples,
                batch_size=None,  # the stream makes the batches
                num_workers=num_workers,
                worker_init_fn=_end_quietly,
                collate_fn=_as_it_is,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator().manual_seed(seed),
            )

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
