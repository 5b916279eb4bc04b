"""The batches of a run: from a cache of latents, or encoded as they stream; and a first look at the data."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from improved_ldm.data.latents import (
    CachedLoader,
    EncodingLoader,
    LatentCache,
    SampleEncoder,
    cache_name,
    publish_cache,
    write_cache,
)
from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import Rows, RowStream
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.embedded import resolve
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.run import Run

SURVEYED_ROWS = 256
CACHE_BATCH_SIZE = 256


@dataclass(frozen=True)
class Survey:
    """What the first rows of a set say of it.

    Args:
        captions: different captions, in order of appearance.
        original_side: median of the images' shorter sides, pixels.
    """

    captions: list[str]
    original_side: int


def survey(rows: Rows) -> Survey:
    """Look at the first rows of a set.

    Raises:
        ValueError: if none of their images can be read, or captions are wanted and all are empty.
        CorruptImagesError: if too many of them cannot be read.
    """
    captions, sides = {}, []
    for row in RowStream(rows, shuffle_window=1, repeat=False, min_size=(1, 1)):
        if row.caption:
            captions[row.caption] = None
        sides.append(min(row.size))
        if len(sides) == SURVEYED_ROWS:
            break
    if not sides:
        raise ValueError("the set holds no image that can be read.")
    if rows.caption_column is not None and not captions:
        raise ValueError(f"column {rows.caption_column!r} holds no caption in the first {len(sides)} rows.")
    return Survey(list(captions), int(torch.tensor(sides).median()))


def open_batches(run: Run, rows: Rows, encoder: SampleEncoder) -> CachedLoader | EncodingLoader:
    """The loader of a run's training batches, one rank's share.

    Args:
        run: configuration, folder and processes.
        rows: the opened set.
        encoder: from images and captions to latents and tokens.

    Returns:
        An endless, resumable loader of `EncodedBatch`.
    """
    config, accelerator = run.config, run.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    if config.cache.passes:
        cache = LatentCache(_filled_cache(run, rows, encoder))
        return CachedLoader(cache, config.training.batch_size, config.seed, rank, world_size)
    loader = make_loader(
        rows,
        image_transform(config),
        config.training.batch_size,
        config.seed,
        config.data.shuffle_window,
        repeat=True,
        rank=rank,
        world_size=world_size,
        num_workers=config.data.num_workers,
    )
    return EncodingLoader(loader, encoder, derive_seed(config.seed, rank))


def image_transform(config: SharedConfig) -> ImageTransform:
    """The transform of a run's training images."""
    return ImageTransform(**config.transform.model_dump())


def _filled_cache(run: Run, rows: Rows, encoder: SampleEncoder) -> Path:
    """The folder of the cache that the configuration asks for, written first if it is not there."""
    config, accelerator = run.config, run.accelerator
    parts = config.model_dump(include={"seed", "data", "transform", "autoencoder", "text"})
    for key in ("padding", "noise_scale"):  # decided after the cache
        del parts["text"][key]
    parts |= {"passes": config.cache.passes, "has_text": encoder.text_encoder is not None}
    places = [config.data.source, resolve(config.autoencoder.pretrained), resolve(config.text.pretrained)]
    parent = Path(config.cache.folder) if config.cache.folder else run.folder / "cache"
    folder = parent / cache_name(parts, places)
    if broadcast_object_list([folder.exists()])[0]:  # all processes take the same way
        return folder
    unfinished = parent / f"{folder.name}.unfinished-by-{run.folder.name}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    write_cache(unfinished, _passes(run, rows), encoder, config.seed, accelerator.process_index)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish_cache(unfinished, folder)
    accelerator.wait_for_everyone()
    return folder


def _passes(run: Run, rows: Rows):
    """Every image as often as the cache keeps it, with fresh crops and flips each time."""
    config, accelerator = run.config, run.accelerator
    with tqdm(unit="img", desc="encoding", disable=not accelerator.is_local_main_process) as bar:
        for number in range(config.cache.passes):
            loader = make_loader(
                rows,
                image_transform(config),
                CACHE_BATCH_SIZE,
                derive_seed(config.seed, number),
                shuffle_window=1,
                repeat=False,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                num_workers=config.data.num_workers,
            )
            for batch in loader:
                bar.update(len(batch["pixels"]))
                yield batch
