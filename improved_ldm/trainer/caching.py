"""The cache of a run: found, loaded or written."""

import contextlib
import glob
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from improved_ldm.conditioning.control import CONTROL_LAYOUT
from improved_ldm.data.buckets import Buckets
from improved_ldm.data.cache import (
    cache_name,
    description_differences,
    find_cache_damage,
    publish_cache,
    read_description,
    write_cache,
    write_description,
    write_skipped_rows,
)
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.data.loader import make_pass
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.tally import skipped_rows
from improved_ldm.data.transforms import TRANSFORM_VERSION, ImageTransform
from improved_ldm.naming import loading
from improved_ldm.output import writing
from improved_ldm.places import is_hub_id, resolve, shareable_place
from improved_ldm.seeds import derive_seed
from improved_ldm.trainer.bars import Bar
from improved_ldm.trainer.config import RunConfig
from improved_ldm.trainer.lock import Owner
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run

CACHE_BATCH_SIZE = 256
FORMAT = 2  # of the shards; caches of another format are written anew


def filled_cache(
    run: Run, mixture: Mixture, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None
) -> Path:
    """The folder of the cache of a run: a finished one, or its own, which is written if missing or damaged.

    Raises:
        ValueError: if a finished cache does not fit the run.
        OutputError: if a cache cannot be written.
    """
    config = run.config
    needed = _description(config, encoder, transform, buckets)
    if config.cache.pretrained is not None:
        folder = on_main_process(lambda: _pretrained(config.cache.pretrained, needed))
        made_of = ", ".join(read_description(folder).get("data", ["a set that it does not name"]))
        place = config.cache.pretrained
        run.say(f"the samples come from the cache {place}, made of {made_of}; `data` is not encoded again")
        return folder
    parts = config.model_dump(include={"seed", "data", "transform"}) | needed
    for key in ("accept_changes", "num_workers", "shuffle_window"):
        del parts["data"][key]  # these do not change the content
    parts |= {"passes": config.cache.passes, "dtype": config.cache.dtype, "order": "by seed"}
    parts["samples"] = TRANSFORM_VERSION
    parts["encoded_in"] = [str(model.dtype) for model in (encoder.vae, encoder.text_encoder) if model is not None]
    places = [*config.data.places, resolve(config.autoencoder.pretrained)]
    if encoder.text_encoder is not None:
        places.append(resolve(config.text.pretrained))
    parent = Path(config.cache.folder) if config.cache.folder else run.folder / "cache"
    folder = parent / cache_name(parts, places)
    if not on_main_process(lambda: _is_usable(folder, run)):
        passes = _passes(run, mixture, transform, buckets, skipped := {})
        described = needed | {"data": [shareable_place(place) for place in config.data.places]}
        _write_cache(folder, run, passes, skipped, encoder, described)
    return folder


def _description(
    config: RunConfig, encoder: SampleEncoder, transform: ImageTransform, buckets: Buckets | None
) -> dict[str, Any]:
    """What the rows of a cache depend on besides the images; a cache with other values does not fit the run."""
    autoencoder, text = config.autoencoder, config.text
    described = {
        "format": FORMAT,
        "autoencoder": [shareable_place(autoencoder.pretrained), autoencoder.subfolder],
        "text": None,
        "sizes": list(buckets.sizes if buckets else [transform.sample_size]),
        "sources": len(config.data.places),
        "control": CONTROL_LAYOUT,
        "measured": sorted(transform.measured),
    }
    if encoder.text_encoder is not None:
        described["text"] = [shareable_place(text.pretrained), text.max_tokens]
    return described


def _pretrained(place: str, needed: dict[str, Any]) -> Path:
    """The folder of a finished cache, which is downloaded if it is on the Hub.

    Raises:
        ValueError: if it is damaged, or does not fit the run.
    """
    with loading("cache.pretrained", place):
        folder = Path(snapshot_download(place, repo_type="dataset") if is_hub_id(place) else place)
        differences = description_differences(folder, needed)
        if differences:
            raise ValueError("; ".join(differences))
        if damage := find_cache_damage(folder):
            raise ValueError(f"it is damaged: {damage}")
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
    passes: Iterator,
    skipped: dict[str, int],
    encoder: SampleEncoder,
    description: dict[str, Any],
):
    """Encode a cache in a folder of this run's own, and rename it when it is complete."""
    accelerator = run.accelerator
    unfinished = on_main_process(lambda: _begin_cache(folder, run))
    try:
        with contextlib.closing(passes) as batches:
            write_cache(unfinished, batches, encoder, accelerator.process_index, run.config.cache.dtype)
        write_skipped_rows(unfinished, skipped, accelerator.process_index)
        accelerator.wait_for_everyone()
        on_main_process(lambda: _publish(unfinished, folder, description))
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


def _publish(unfinished: Path, folder: Path, description: dict[str, Any]):
    with writing(folder):
        write_description(unfinished, description)
        publish_cache(unfinished, folder)


def _passes(
    run: Run, mixture: Mixture, transform: ImageTransform, buckets: Buckets | None, skipped: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """Every image as often as the cache holds it, with new crops and flips each time; counts skipped rows."""
    config, accelerator = run.config, run.accelerator
    with Bar(run.say, "encoding the cache", "images", shown=accelerator.is_local_main_process) as bar:
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
