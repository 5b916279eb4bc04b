"""The batches of a run, from a cache of latents or encoded during training."""

import contextlib
import glob
import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from improved_ldm.conditioning.control import CONTROL_LAYOUT
from improved_ldm.data.buckets import Buckets
from improved_ldm.data.fingerprint import data_changes, data_fingerprint
from improved_ldm.data.indexed import index_lines
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
from improved_ldm.data.loader import index_sources, make_loader, make_pass
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.tally import skipped_rows
from improved_ldm.data.transforms import MEASURES, ImageTransform
from improved_ldm.output import writing
from improved_ldm.places import resolve
from improved_ldm.provenance import write_text
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.checkpoints import DATA, kept_file
from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.data import run_buckets
from improved_ldm.trainer.lock import Owner
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run

CACHE_BATCH_SIZE = 256


def open_batches(
    run: Run, mixture: Mixture, encoder: SampleEncoder, control_inputs: Collection[str] = ()
) -> CachedLoader | EncodingLoader:
    """The loader of one rank's training batches; prints what is read.

    Args:
        run: configuration, folder and processes.
        mixture: the opened sets.
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
    on_main_process(lambda: _check_same_data(run, mixture))
    for description in mixture.descriptions():
        run.say(description)
    transform, buckets = image_transform(config, control_inputs), run_buckets(config.transform)
    if config.cache.passes:
        cache = LatentCache(_filled_cache(run, mixture, encoder, transform, buckets))
        return CachedLoader(cache, config.training.batch_size, config.seed, rank, world_size, mixture.shares)
    indexed = index_sources(mixture, buckets)
    for source, found in zip(mixture.sources, indexed or (), strict=False):
        for line in index_lines(source.name, found, buckets, config.training.batch_size):
            run.say(line)
    loader = make_loader(
        mixture,
        transform,
        config.training.batch_size,
        config.seed,
        config.data.shuffle_window,
        rank=rank,
        world_size=world_size,
        num_workers=config.data.num_workers,
        buckets=buckets,
        indexed=indexed,
    )
    return EncodingLoader(loader, encoder)


def image_transform(config: SharedConfig, control_inputs: Collection[str] = ()) -> ImageTransform:
    """The transform of a run's training images, with the measurements that these control inputs need."""
    fields = config.transform.model_dump(exclude={"buckets", "bucket_step", "max_aspect"})
    return ImageTransform(**fields, measured=MEASURES.keys() & control_inputs)


def _check_same_data(run: Run, mixture: Mixture):
    """Record the state of the data in the run's folder; refuse to resume with data that has changed.

    Raises:
        ValueError: if the data has changed since the newest checkpoint, and `data.accept_changes` is false.
    """
    places, file = run.config.data.places, run.folder / DATA
    now = [data_fingerprint(place, rows.files) for place, rows in zip(places, mixture.rows, strict=True)]
    changes = "; ".join(
        f"`data.source` {place} has changed since the newest checkpoint: {change}"
        for place, change in zip(places, map(data_changes, _fingerprints_before(run, len(now)), now), strict=True)
        if change
    )
    if changes and not run.config.data.accept_changes:
        raise ValueError(
            f"{changes}. Restore it, resume with the changed data with `--data.accept_changes true`, or choose "
            "another `--output_dir`."
        )
    if changes:
        run.say(f"{changes}; training resumes with the changed data")
    write_text(file, json.dumps(now[0] if len(now) == 1 else now))


def _fingerprints_before(run: Run, count: int) -> list[dict[str, Any]]:
    """The fingerprints of the sets at the newest checkpoint; empty ones if there is none, or other sets were read."""
    kept = kept_file(run.folder / "checkpoints", DATA)
    before = json.loads(kept.read_text(encoding="utf-8")) if kept else {}
    before = before if isinstance(before, list) else [before]
    return before if len(before) == count else [{}] * count


def _filled_cache(
    run: Run, mixture: Mixture, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None
) -> Path:
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
    places = [*config.data.places, resolve(config.autoencoder.pretrained), resolve(config.text.pretrained)]
    parent = Path(config.cache.folder) if config.cache.folder else run.folder / "cache"
    folder = parent / cache_name(parts, places)
    if not on_main_process(lambda: _is_usable(folder, run)):
        _write_cache(folder, run, _passes(run, mixture, transform, buckets, skipped := {}), skipped, encoder)
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


def _write_cache(folder: Path, run: Run, passes: Iterator, skipped: dict[str, int], encoder: SampleEncoder):
    """Encode a cache in a folder of this run's own, and rename it when it is complete."""
    accelerator = run.accelerator
    unfinished = on_main_process(lambda: _begin_cache(folder, run))
    try:
        with contextlib.closing(passes) as batches:
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


def _passes(
    run: Run, mixture: Mixture, transform: ImageTransform, buckets: Buckets | None, skipped: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Every image as often as the cache holds it, with new crops and flips each time; counts skipped rows."""
    config, accelerator = run.config, run.accelerator
    with tqdm(unit="img", desc="encoding", disable=not accelerator.is_local_main_process) as bar:
        for number, rows in enumerate(mixture.rows):
            of_source = {}
            for repetition in range(config.cache.passes):
                loader = make_pass(
                    rows,
                    transform,
                    CACHE_BATCH_SIZE,
                    derive_seed(config.seed, repetition, *((number,) if number else ())),
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                    num_workers=config.data.num_workers,
                    buckets=buckets,
                )
                for batch in loader:
                    bar.update(len(batch["pixels"]))
                    yield batch | {"source": torch.full_like(batch["source"], number)}
                of_source = skipped_rows(loader.state_dict())
            skipped.update(Counter(skipped) + Counter(of_source))
