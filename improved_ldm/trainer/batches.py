"""The batches of a run, from a cache of latents or encoded during training."""

import json
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from improved_ldm.autoencoder import encoding_copy
from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.data.cache import CachedLoader, LatentCache
from improved_ldm.data.fingerprint import data_changes, data_fingerprint
from improved_ldm.data.indexed import index_lines
from improved_ldm.data.latents import EncodingLoader, SampleEncoder
from improved_ldm.data.loader import SampleLoader, index_sources, make_loader
from improved_ldm.data.mixture import Mixture
from improved_ldm.data.prefetch import Prefetcher
from improved_ldm.data.transforms import MEASURES, ImageTransform
from improved_ldm.data.watched import WatchedLoader
from improved_ldm.provenance import write_text
from improved_ldm.trainer.caching import filled_cache
from improved_ldm.trainer.checkpoints import DATA, kept_file
from improved_ldm.trainer.components import compute_dtype, in_dtype
from improved_ldm.trainer.data import run_buckets
from improved_ldm.trainer.processes import on_main_process
from improved_ldm.trainer.run import Run
from improved_ldm.trainer.task_config import TaskConfig

Loader = CachedLoader | EncodingLoader | WatchedLoader


def open_batches(
    run: Run,
    mixture: Mixture,
    encoder: SampleEncoder,
    control_inputs: Collection[str] = (),
    control_seen: ControlRanges | None = None,
) -> Loader | Prefetcher:
    """The loader of one rank's training batches; prints what is read.

    Args:
        run: configuration, folder and processes.
        mixture: the opened sets.
        encoder: encoder of images and captions to latents and tokens.
        control_inputs: control inputs of the denoiser; those that can be measured in the samples are measured.
        control_seen: ranges that are widened to the control of the batches.

    Returns:
        An endless, resumable loader of `EncodedBatch`.

    Raises:
        ValueError: if the run resumes and its data has changed.
        OutputError: if a cache cannot be written.
    """
    loader = _open_loader(run, mixture, encoder_of_run(run, encoder), control_inputs)
    if control_seen is not None:
        loader = WatchedLoader(loader, control_seen)
    if is_trained(encoder.text_encoder):  # batches that are prepared ahead would be encoded with earlier weights
        return loader
    return prefetched(run, loader)


def prefetched(run: Run, loader: Loader) -> Loader | Prefetcher:
    """A loader whose batches are prepared ahead, as many as the run's configuration says."""
    ahead = run.config.training.prefetch
    return Prefetcher(loader, ahead, run.accelerator.device) if ahead else loader


def encoder_of_run(run: Run, encoder: SampleEncoder) -> SampleEncoder:
    """An encoder in the precision of a run: copies, except of a text encoder that is trained."""
    device, config = run.accelerator.device, run.config
    encoder = replace(encoder, vae=encoding_copy(encoder.vae, compute_dtype(config.autoencoder.dtype, device)))
    if is_trained(encoder.text_encoder):
        return encoder
    return replace(encoder, text_encoder=in_dtype(encoder.text_encoder, compute_dtype(config.text.dtype, device)))


def is_trained(text_encoder: PreTrainedModel | None) -> bool:
    """Whether a text encoder has an adapter that is trained with the denoiser."""
    return text_encoder is not None and any(parameter.requires_grad for parameter in text_encoder.parameters())


def _open_loader(
    run: Run, mixture: Mixture, encoder: SampleEncoder, control_inputs: Collection[str]
) -> CachedLoader | EncodingLoader:
    config, accelerator = run.config, run.accelerator
    announce(run, mixture)
    transform, buckets = image_transform(config, control_inputs), run_buckets(config.transform)
    if config.cache.passes or config.cache.pretrained:
        cache = LatentCache(filled_cache(run, mixture, encoder, transform, buckets))
        for line in cache.bucket_lines(buckets, config.training.batch_size) if buckets else ():
            run.say(line)
        place = (accelerator.process_index, accelerator.num_processes)
        return CachedLoader(cache, config.training.batch_size, config.seed, *place, mixture.shares)
    return EncodingLoader(sample_loader(run, mixture, transform), encoder)


def announce(run: Run, mixture: Mixture):
    """Print what is read, after a check that a run resumes with the data it began with.

    Raises:
        ValueError: if the data has changed.
    """
    on_main_process(lambda: _check_same_data(run, mixture))
    for description in mixture.descriptions():
        run.say(description)


def sample_loader(run: Run, mixture: Mixture, transform: ImageTransform) -> SampleLoader:
    """The loader of one rank's training images and what belongs to them, not encoded; prints what it finds.

    Raises:
        ValueError: if there are buckets and a set is a stream, or no row of a set is used.
    """
    config, buckets = run.config, run_buckets(run.config.transform)
    indexed = index_sources(mixture, buckets)
    named = zip((source.name for source in mixture.sources), indexed or (), strict=False)
    for line in index_lines(named, buckets, config.training.batch_size):
        run.say(line)
    return make_loader(
        mixture,
        transform,
        config.training.batch_size,
        config.seed,
        config.data.shuffle_window,
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        num_workers=config.data.num_workers,
        buckets=buckets,
        indexed=indexed,
    )


def image_transform(config: TaskConfig, control_inputs: Collection[str] = ()) -> ImageTransform:
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
