"""Rows and a transform joined into batches for a trainer."""

from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torchdata.stateful_dataloader import StatefulDataLoader

from improved_ldm.conditioning.control import control_tensor
from improved_ldm.data.sources import Row, Rows, RowStream
from improved_ldm.data.transforms import ImageTransform


class SampleStream(torch.utils.data.IterableDataset):
    """The rows of a stream, transformed; resumable as the stream is.

    Args:
        rows: the stream of rows.
        transform: applied to every row with the row's own seed.
    """

    def __init__(self, rows: RowStream, transform: ImageTransform):
        self.rows, self.transform = rows, transform

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self._sample, self.rows)

    def _sample(self, row: Row) -> dict[str, Any]:
        pixels, control = self.transform(row.image, Random(row.seed), row.size)
        return {"pixels": pixels, "control": control, "caption": row.caption, "label": row.label}

    def state_dict(self) -> dict[str, Any]:
        """The state of the rows."""
        return self.rows.state_dict()

    def load_state_dict(self, state: dict[str, Any]):
        """Let the next iteration start where `state_dict` was taken."""
        self.rows.load_state_dict(state)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Join samples into a batch.

    Args:
        samples: dicts of pixels, control, caption and label, one a sample.

    Returns:
        pixels: (batch, 3, height, width) float32 in [-1, 1].
        control: (batch, `NUM_CONTROL`) float32.
        caption: list of strings; absent if captions are not read.
        label: (batch,) int64; absent if labels are not read.
    """
    batch = {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "control": control_tensor([sample["control"] for sample in samples]),
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
) -> StatefulDataLoader:
    """Batches of one rank. Its `state_dict` resumes the very next batch, with the same number of workers and ranks.

    Args:
        rows: the opened set.
        transform: from image to sample.
        batch_size: samples a batch. Only one pass (`repeat=False`) may end with smaller batches, one a worker.
        seed, shuffle_window, repeat, rank, world_size: see `RowStream`.
        num_workers: processes that read and transform; 0 does it in this one.

    Returns:
        The loader; its batches are those of `collate`. Keep one state a rank, and the loader out of accelerate's
        `prepare`, which would split it again.
    """
    stream = RowStream(rows, seed, shuffle_window, repeat, rank, world_size, min_size=transform.decode_size)
    return StatefulDataLoader(
        SampleStream(stream, transform),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        # its iterator draws a seed; it must not come from the global generator, whose state a trainer owns
        generator=torch.Generator().manual_seed(seed),
    )
