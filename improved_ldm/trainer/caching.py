"""The cache of a run: found, taken over from elsewhere, or written before training."""

import contextlib
import glob
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm

from improved_ldm.conditioning.control import CONTROL_LAYOUT
from improved_ldm.data.buckets import Buckets
from improved_ldm.data.cache import (
    DESCRIPTION,
    cache_name,
    find_cache_damage,
    publish_cache,
    write_cache,
    write_skipped_rows,
)
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.loader import make_pass
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.tally import skipped_rows
from improved_ldm.data.transforms import ImageTransform
from improved_ldm.naming import loading
from improved_ldm.output import writing
from improved_ldm.places import is_hub_id, resolve, shareable_place, shareable_record
from improved_ldm.provenance import write_json
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.config import SharedConfig
from improved_ldm.trainer.lock import Owner
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run

CACHE_BATCH_SIZE = 256
UNREAD = {  # keys that the content of a cache does not depend on
    "text": ("padding", "noise_scale"),
    "data": ("accept_changes", "num_workers", "shuffle_window"),
}


def cache_folder(
    run: Run, mixture: Mixture, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None
) -> Path:
    """The folder of a run's cache; one that is missing or damaged is written first.

    Raises:
        ValueError: if `cache.pretrained` does not load or was made with other settings.
        OutputError: if the cache cannot be written.
    """
    if run.config.cache.pretrained is not None:
        return on_main_process(lambda: _pretrained_cache(run, encoder, transform, buckets))
    return _filled_cache(run, mixture, encoder, transform, buckets)


def _pretrained_cache(run: Run, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None) -> Path:
    """The folder of a finished cache, downloaded if it is on the Hub, after a check that it suits the run."""
    place = run.config.cache.pretrained
    with loading("cache.pretrained", place):
        folder = Path(snapshot_download(place, repo_type="dataset") if is_hub_id(place) else place)
        made_with = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    damage = find_cache_damage(folder)
    if damage is not None:
        raise ValueError(f"`cache.pretrained` is {place!r}, which is damaged: {damage}.")
    needed = _needed_of_cache(run.config, encoder, transform, buckets)
    differences = [
        f"{name} is {made_with.get(name)!r}, the run has {value!r}"
        for name, value in needed.items()
        if made_with.get(name) != value
    ]
    if differences:
        raise ValueError(f"`cache.pretrained` is {place!r}, which does not suit the run: {'; '.join(differences)}.")
    run.say(f"training on the cache {shareable_place(place)}")
    return folder


def _needed_of_cache(
    config: SharedConfig, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None
) -> dict[str, Any]:
    """What a run needs its cache to hold, as JSON values that do not name local folders."""
    has_text = encoder.text_encoder is not None
    needed = {
        "autoencoder": [config.autoencoder.pretrained, config.autoencoder.subfolder],
        "text": [config.text.pretrained, config.text.max_tokens] if has_text else None,
        "sizes": list(buckets.sizes if buckets else [transform.sample_size]),
        "control": CONTROL_LAYOUT,
        "measured": sorted(transform.measured),
        "num_sources": len(config.data.places),
    }
    return json.loads(json.dumps(shareable_record(needed)))


def _filled_cache(
    run: Run, mixture: Mixture, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None
) -> Path:
    """The folder of the cache of a configuration, which is written first if it is missing or damaged."""
    config = run.config
    parts = config.model_dump(include={"seed", "data", "transform", "autoencoder", "text"})
    for section, keys in UNREAD.items():
        for key in keys:
            del parts[section][key]
    parts |= {"passes": config.cache.passes, "dtype": config.cache.dtype, "has_text": encoder.text_encoder is not None}
    # a cache with other columns or in another format has another name, so it is not used
    parts |= {"control": CONTROL_LAYOUT, "measured": sorted(transform.measured), "format": "own tokens"}
    places = [*config.data.places, resolve(config.autoencoder.pretrained), resolve(config.text.pretrained)]
    parent = Path(config.cache.folder) if config.cache.folder else run.folder / "cache"
    folder = parent / cache_name(parts, places)
    if not on_main_process(lambda: _is_usable(folder, run)):
        skipped, needed = {}, _needed_of_cache(config, encoder, transform, buckets)
        _write_cache(folder, run, _passes(run, mixture, transform, buckets, skipped), skipped, encoder, needed)
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


def _write_cache(
    folder: Path,
    run: Run,
    passes: Iterator[dict[str, Any]],
    skipped: dict[str, int],
    encoder: SampleEncoder,
    needed: dict[str, Any],
):
    """Encode a cache in a folder of this run's own, and rename it when it is complete.

    Args:
        folder: folder of the complete cache.
        run: configuration and processes.
        passes: batches of images.
        skipped: numbers of skipped rows, which `passes` fills.
        encoder: encoder of the batches.
        needed: what a run needs to find in the cache.
    """
    accelerator = run.accelerator
    unfinished = on_main_process(lambda: _begin_cache(folder, run))
    try:
        with contextlib.closing(passes) as batches:
            write_cache(
                unfinished, batches, encoder, accelerator.process_index, in_half=run.config.cache.dtype == "fp16"
            )
        write_skipped_rows(unfinished, skipped, accelerator.process_index)
        accelerator.wait_for_everyone()
        on_main_process(lambda: _publish(unfinished, folder, needed))
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


def _publish(unfinished: Path, folder: Path, needed: dict[str, Any]):
    with writing(folder):
        write_json(unfinished / DESCRIPTION, needed)
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
