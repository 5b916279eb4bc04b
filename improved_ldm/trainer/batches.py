"""The batches of a run, from a cache of latents or encoded during training; and a first look at the data."""

import contextlib
import glob
import json
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from improved_ldm.conditioning.control import CONTROL_LAYOUT
from improved_ldm.data.fingerprint import data_changes, data_fingerprint
from improved_ldm.data.latents import (
    CachedLoader,
    EncodingLoader,
    LatentCache,
    SampleEncoder,
    cache_name,
    find_cache_damage,
    publish_cache,
    write_cache,
    write_skipped_rows,
)
from improved_ldm.data.loader import make_loader
from improved_ldm.data.sources import Rows, RowStream, open_rows
from improved_ldm.data.stream import skipped_rows
from improved_ldm.data.transforms import MEASURES, ImageTransform
from improved_ldm.naming import DATA_KEYS, naming_keys
from improved_ldm.output import writing
from improved_ldm.places import resolve
from improved_ldm.provenance import write_text
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.checkpoints import DATA, kept_file
from improved_ldm.trainer.config import DataConfig, SharedConfig
from improved_ldm.trainer.lock import Owner
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run

SURVEYED_ROWS = 256
CACHE_BATCH_SIZE = 256


@dataclass(frozen=True)
class Survey:
    """What the first rows of a set show.

    Args:
        captions: distinct captions, in order of appearance.
        original_side: median of the images' shorter sides, pixels.
    """

    captions: list[str]
    original_side: int


def open_data(config: DataConfig, takes_text: bool) -> Rows:
    """Open the set of a run, with captions or with class labels.

    Raises:
        FileNotFoundError, ValueError: as in `open_rows`, with the names of the configuration's keys.
    """
    columns = {
        "caption_column": config.caption_column,
        "caption_weights": config.caption_weights,
        "caption_template": config.caption_template,
        "label_column": config.label_column if config.caption_template else None,
    }
    if not takes_text:
        columns = {"caption_column": None, "label_column": config.label_column, "num_classes": config.num_classes}
    with naming_keys(**DATA_KEYS):
        return open_rows(config.source, config.split, config.name, config.image_column, **columns)


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


def open_batches(
    run: Run, rows: Rows, encoder: SampleEncoder, control_inputs: Collection[str] = ()
) -> CachedLoader | EncodingLoader:
    """The loader of one rank's training batches; prints what is read.

    Args:
        run: configuration, folder and processes.
        rows: the opened set.
        encoder: encoder of images and captions to latents and tokens.
        control_inputs: control inputs of the denoiser; those that can be measured in the samples are measured.

    Returns:
        An endless, resumable loader of `EncodedBatch`.

    Raises:
        ValueError: if the run resumes and its data has changed.
        OutputError: if a cache cannot be written.
    """
    config, accelerator = run.config, run.accelerator
    rank, world_size = accelerator.process_index, accelerator.num_processes
    on_main_process(lambda: _check_same_data(run, rows))
    run.say(rows.description)
    transform = image_transform(config, control_inputs)
    if config.cache.passes:
        cache = LatentCache(_filled_cache(run, rows, encoder, transform))
        return CachedLoader(cache, config.training.batch_size, config.seed, rank, world_size)
    loader = make_loader(
        rows,
        transform,
        config.training.batch_size,
        config.seed,
        config.data.shuffle_window,
        repeat=True,
        rank=rank,
        world_size=world_size,
        num_workers=config.data.num_workers,
    )
    return EncodingLoader(loader, encoder)


def image_transform(config: SharedConfig, control_inputs: Collection[str] = ()) -> ImageTransform:
    """The transform of a run's training images, with the measurements that these control inputs need."""
    return ImageTransform(**config.transform.model_dump(), measured=MEASURES.keys() & control_inputs)


def _check_same_data(run: Run, rows: Rows):
    """Record the state of the data in the run's folder; refuse to resume with data that has changed.

    Raises:
        ValueError: if the data has changed since the newest checkpoint, and `data.accept_changes` is false.
    """
    source, file = run.config.data.source, run.folder / DATA
    now, kept = data_fingerprint(source, rows.files), kept_file(run.folder / "checkpoints", DATA)
    changes = data_changes(json.loads(kept.read_text(encoding="utf-8")), now) if kept else None
    if changes and not run.config.data.accept_changes:
        raise ValueError(
            f"`data.source` {source} has changed since the newest checkpoint: {changes}. Restore it, resume with the "
            "changed data with `--data.accept_changes true`, or choose another `--output_dir`."
        )
    if changes:
        run.say(f"{source} has changed since the newest checkpoint: {changes}; training resumes with the changed data")
    write_text(file, json.dumps(now))


def _filled_cache(run: Run, rows: Rows, encoder: SampleEncoder, transform: ImageTransform) -> Path:
    """The folder of the cache of a configuration, which is written first if it is missing or damaged."""
    config = run.config
    parts = config.model_dump(include={"seed", "data", "transform", "autoencoder", "text"})
    for section, key in (("text", "padding"), ("text", "noise_scale"), ("data", "accept_changes")):
        del parts[section][key]  # these do not change the content
    parts |= {"passes": config.cache.passes, "has_text": encoder.text_encoder is not None, "order": "by seed"}
    parts |= {
        "control": CONTROL_LAYOUT,
        "measured": sorted(transform.measured),
    }  # a cache with other columns has another name, so it is not used
    places = [config.data.source, resolve(config.autoencoder.pretrained), resolve(config.text.pretrained)]
    parent = Path(config.cache.folder) if config.cache.folder else run.folder / "cache"
    folder = parent / cache_name(parts, places)
    if not on_main_process(lambda: _is_usable(folder, run)):
        _write_cache(folder, run, rows, encoder, transform)
    return folder


def _is_usable(folder: Path, run: Run) -> bool:
    """Whether a cache exists and is intact; a damaged one is reported and removed."""
    if not folder.exists():
        return False
    damage = find_cache_damage(folder)
    if damage is not None:
        run.say(f"the cache {folder} is damaged: {damage}; it is written again")
        with writing(folder):
            shutil.rmtree(folder)
    return damage is None


def _write_cache(folder: Path, run: Run, rows: Rows, encoder: SampleEncoder, transform: ImageTransform):
    """Encode a cache in a folder of this run's own, and rename it when it is complete."""
    accelerator = run.accelerator
    unfinished = on_main_process(lambda: _begin_cache(folder, run))
    try:
        skipped = {}
        with contextlib.closing(_passes(run, rows, transform, skipped)) as batches:
            write_cache(unfinished, batches, encoder, accelerator.process_index)
        write_skipped_rows(unfinished, skipped, accelerator.process_index)
        accelerator.wait_for_everyone()
        on_main_process(lambda: _publish(unfinished, folder))
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _begin_cache(folder: Path, run: Run) -> Path:
    """A new folder that no other process writes to; unfinished folders of processes that have ended are removed."""
    stem = f"{folder.name}.unfinished-by-"
    with writing(folder.parent):
        for left in folder.parent.glob(f"{glob.escape(stem)}*"):
            owner = Owner.from_text(left.name.removeprefix(stem))
            if owner is not None and (owner.is_gone or owner.is_this_process):
                run.say(f"{left} was left by a process that has ended; it is removed")
                shutil.rmtree(left)
        unfinished = folder.parent / f"{stem}{Owner.this_process()}"
        unfinished.mkdir(parents=True)
    return unfinished


def _publish(unfinished: Path, folder: Path):
    with writing(folder):
        publish_cache(unfinished, folder)


def _passes(run: Run, rows: Rows, transform: ImageTransform, skipped: dict[str, int]):
    """Every image as often as the cache holds it, with new crops and flips each time; counts skipped rows."""
    config, accelerator = run.config, run.accelerator
    with tqdm(unit="img", desc="encoding", disable=not accelerator.is_local_main_process) as bar:
        for number in range(config.cache.passes):
            loader = make_loader(
                rows,
                transform,
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
            skipped.update(skipped_rows(loader.state_dict()))
