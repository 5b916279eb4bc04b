"""The cache of latents, text tokens, classes and controls: shards on disk, and batches of their rows."""

import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from improved_ldm.conditioning.control import control_columns
from improved_ldm.conditioning.text import own_positions, unique_prompts
from improved_ldm.data.buckets import Buckets, fill_lines, rare_lines
from improved_ldm.data.cache_columns import Column, TextColumn
from improved_ldm.data.fingerprint import file_stamp, place_files
from improved_ldm.data.latents import EncodedBatch, SampleEncoder
from improved_ldm.data.order import BatchPlan, PlannedBatch
from improved_ldm.data.tally import given_by_source, given_state
from improved_ldm.manifest import find_damage, has_manifest, write_manifest
from improved_ldm.output import writing
from improved_ldm.provenance import write_json

CacheDtype = Literal["fp16", "fp32"]
DESCRIPTION = "cache.json"
ROWS_PER_SHARD = 4096
CAPTIONS_AT_ONCE = 256


def cache_name(description: dict[str, Any], places: list[str]) -> str:
    """A folder name that changes with everything that the content of a cache depends on.

    Args:
        description: settings that the content depends on.
        places: places of images and models; for local ones the names, sizes and times of their files count too.
    """
    stamps = [(str(file), *file_stamp(file)) for place in places for file in place_files(place)]
    text = json.dumps([description, places, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_cache(
    folder: Path,
    batches: Iterable[dict[str, Any]],
    encoder: SampleEncoder,
    rank: int = 0,
    dtype: CacheDtype = "fp16",
):
    """Encode batches into the shards of one rank, each of one latent shape.

    Equal captions are stored once per shard, and of each only its own tokens.

    Args:
        folder: existing folder for the shards.
        batches: batches from `make_loader`, a finite number.
        encoder: encoder of the batches.
        rank: rank of this process, which is part of the shards' names.
        dtype: precision of latents and text. With `fp16`, a tensor with values beyond its range is stored as bfloat16.

    Raises:
        OutputError: if a shard cannot be written.
    """
    pending: dict[torch.Size, list[dict[str, Any]]] = {}
    numbers = itertools.count()

    def write(parts: list[dict[str, Any]]):
        file = folder / f"rank{rank:04d}-shard{next(numbers):05d}.safetensors"
        tensors = _pack(parts, encoder, dtype)
        with writing(file):
            save_file(tensors, file)

    for batch in batches:
        latents = _stored(encoder.latents(batch.pop("pixels"), batch["seed"]), dtype).cpu()
        parts = pending.setdefault(latents.shape[1:], [])
        parts.append({**batch, "latents": latents})
        if sum(len(part["control"]) for part in parts) >= ROWS_PER_SHARD:
            write(pending.pop(latents.shape[1:]))
    for parts in pending.values():
        write(parts)


def _stored(values: torch.Tensor, dtype: CacheDtype) -> torch.Tensor:
    """Values in the precision of a cache; NaN and infinity stay as they are."""
    if dtype == "fp32":
        return values.float()
    largest = values.detach().float().abs().nan_to_num(0, 0).amax()
    return values.to(torch.bfloat16 if largest > torch.finfo(torch.float16).max else torch.float16)


def _pack(batches: list[dict[str, Any]], encoder: SampleEncoder, dtype: CacheDtype) -> dict[str, torch.Tensor]:
    """The tensors of a shard."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([batch[name] for batch in batches]).contiguous()

    parts = [batch["latents"] for batch in batches]
    one_dtype = parts[0].dtype if len({part.dtype for part in parts}) == 1 else torch.bfloat16
    latents = torch.cat([part.to(one_dtype) for part in parts]).contiguous()
    tensors = {"latents": latents, "control": joined("control"), "seed": joined("seed")}
    sources = [batch.get("source", torch.zeros(len(batch["seed"]))) for batch in batches]
    tensors["source"] = torch.cat(sources).to(torch.int32)
    if encoder.text_encoder is None:
        return tensors | {"class_labels": joined("label")}
    captions, index = unique_prompts([caption for batch in batches for caption in batch["caption"]])
    return tensors | {"text_index": index} | _pack_text(captions, encoder, dtype)


def _pack_text(captions: list[str], encoder: SampleEncoder, dtype: CacheDtype) -> dict[str, torch.Tensor]:
    """The tokens of captions one after the other, where each one begins, and their pooled vectors."""
    states, counts, pooled = [], [], []
    for start in range(0, len(captions), CAPTIONS_AT_ONCE):
        text = encoder.text(captions[start : start + CAPTIONS_AT_ONCE])
        is_own = text.attention_mask | (own_positions(text.attention_mask) & ~text.attention_mask.any(1, keepdim=True))
        states.append(text.hidden_states[is_own].cpu())
        counts.append(is_own.sum(1).cpu())
        pooled.append(text.pooled.cpu())
    return {
        "text.hidden_states": _stored(torch.cat(states), dtype),
        "text.offsets": F.pad(torch.cat(counts).cumsum(0), (1, 0)),
        "text.length": torch.tensor(text.hidden_states.shape[1]),
        "text.pooled": _stored(torch.cat(pooled), dtype),
    }


def write_skipped_rows(folder: Path, skipped: dict[str, int], rank: int = 0):
    """Write how many rows of the set were skipped, by reason, next to the shards of one rank."""
    file = folder / f"rank{rank:04d}-skipped.json"
    file.write_text(json.dumps(skipped, ensure_ascii=False), encoding="utf-8")


class LatentCache:
    """Random access to the rows that `write_cache` wrote; the files are mapped, not read into memory.

    The rows are in the order of their seeds, which does not depend on the processes that wrote them.
    `skipped_rows` counts the rows of the set that are not in the cache, by reason. `groups`, (rows,) int, is the
    number of each row's latent shape in `shapes`; `sources`, (rows,) int, is the number of the set of each row.

    Args:
        folder: folder of the shards.

    Raises:
        ValueError: if the folder holds no shards.
    """

    def __init__(self, folder: Path):
        shards = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
        if not shards:
            raise ValueError(f"the cache {folder} holds no shards.")
        sizes = [len(shard["latents"]) for shard in shards]
        order = torch.cat([shard["seed"] for shard in shards]).argsort(stable=True).numpy()
        self.shard_of = np.repeat(np.arange(len(shards)), sizes)[order]
        self.row_of = np.concatenate([np.arange(size) for size in sizes])[order]
        self.shapes = sorted({tuple(shard["latents"].shape[1:]) for shard in shards})
        group_of_shard = np.array([self.shapes.index(tuple(shard["latents"].shape[1:])) for shard in shards])
        self.groups = group_of_shard[self.shard_of]
        # what is small is in memory; the rest is mapped
        self.small = {
            name: torch.cat([shard[name] for shard in shards])[order]
            for name in ("control", "class_labels", "source", "text_index")
            if name in shards[0]
        }
        self.sources = self.small.pop("source").numpy().astype(np.int64)
        self.text_index = self.small.pop("text_index", None)
        self.latents = Column([shard["latents"] for shard in shards])
        self.text = None if self.text_index is None else TextColumn(shards)
        counts = (json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*-skipped.json"))
        self.skipped_rows = dict(sum(map(Counter, counts), Counter()))

    def __len__(self) -> int:
        return len(self.groups)

    def bucket_lines(self, buckets: Buckets, batch_size: int) -> Iterator[str]:
        """What the cache holds of the buckets, one line each; an image counts as often as the cache holds it."""
        control = control_columns(self.small["control"])
        sizes = torch.stack([control.target_height, control.target_width], 1).int().tolist()
        originals = torch.stack([control.original_height, control.original_width], 1)
        counts = Counter(map(tuple, sizes))
        yield from fill_lines(counts, buckets.beyond(originals.numpy()), buckets)
        yield from rare_lines(counts, batch_size)

    def rows(self, indices: torch.Tensor) -> EncodedBatch:
        """The rows at the given indices, (batch,) int, in the same order; all of one group."""
        shard_of, row_of = (places[indices.numpy()].tolist() for places in (self.shard_of, self.row_of))
        small = {name: values[indices] for name, values in self.small.items()}
        latents = self.latents.rows(shard_of, row_of)
        text = None if self.text is None else self.text.rows(shard_of, self.text_index[indices].tolist())
        return EncodedBatch(latents, small["control"], text, small.get("class_labels"))


class CachedLoader:
    """Endless batches from a cache, in the order of a `BatchPlan`.

    Args:
        cache: the cache.
        batch_size: rows per batch and rank; batches of rare buckets have fewer.
        seed: seed of the order.
        rank: rank of this process.
        world_size: number of processes, which take the batches of the plan in turn.
        weights: shares of the sources in the rows, relative to each other; default: equal.
    """

    def __init__(
        self,
        cache: LatentCache,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
    ):
        self.cache, self.batch_size, self.rank, self.world_size = cache, batch_size, rank, world_size
        self._of_source = [np.flatnonzero(cache.sources == source) for source in range(cache.sources.max() + 1)]
        self.plan = BatchPlan([cache.groups[rows] for rows in self._of_source], batch_size, seed, weights)
        self.given: Counter[int] = Counter()

    def __iter__(self) -> Iterator[EncodedBatch]:
        for batch in self.plan:
            if (self.plan.batches - 1) % self.world_size == self.rank:
                self.given.update(batch.sources.tolist())
                yield self.cache.rows(torch.from_numpy(self._numbers(batch)))

    def _numbers(self, batch: PlannedBatch) -> np.ndarray:
        """The numbers in the cache, (batch,) int, of the rows of a batch."""
        numbers = np.empty_like(batch.rows)
        for source in np.unique(batch.sources):
            at = batch.sources == source
            numbers[at] = self._of_source[source][batch.rows[at]]
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """The position in the plan, its layout and, on the first rank, the skipped rows of the set."""
        return {
            "plan": self.plan.state_dict(),
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            **given_state(self.given),
            "skipped_rows": self.cache.skipped_rows if self.rank == 0 else {},
        }

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken.

        Raises:
            ValueError: if the state has another batch size or number of processes.
        """
        for name in ("batch_size", "world_size"):
            if state[name] != (value := getattr(self, name)):
                raise ValueError(f"the run was stopped with `{name}` {state[name]}; it cannot resume with {value}.")
        self.plan.load_state_dict(state["plan"])
        self.given = given_by_source(state)


def publish_cache(unfinished: Path, folder: Path):
    """Write the manifest of a finished cache and rename it to `folder`, unless another run already wrote that one."""
    write_manifest(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(unfinished)  # another run finished it first


def find_cache_damage(folder: Path) -> str | None:
    """What is wrong with a cache, or None; without a manifest it is only checked that the shards can be read."""
    if has_manifest(folder):
        return find_damage(folder)
    shards = sorted(folder.glob("*.safetensors"))
    for shard in shards:
        try:
            load_file(shard)
        except (OSError, SafetensorError) as error:
            return f"{shard.name} cannot be read ({error})"
    return None if shards else "it holds no shards"


def write_description(folder: Path, description: dict[str, Any]):
    """Record in a cache what it was made from."""
    write_json(folder / DESCRIPTION, description)


def read_description(folder: Path) -> dict[str, Any]:
    """What a cache was made from.

    Raises:
        ValueError: if the cache does not say it.
    """
    file = folder / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"it has no {DESCRIPTION}, which says what it was made from")
    return json.loads(file.read_text(encoding="utf-8"))


def description_differences(folder: Path, needed: dict[str, Any]) -> list[str]:
    """What a cache was made from that differs from what a run needs, as one phrase per key.

    Raises:
        ValueError: if the cache does not say what it was made from.
    """
    found = read_description(folder)
    needed = json.loads(json.dumps(needed))  # tuples become lists
    return [
        f"`{key}` is {found.get(key)!r}; the run needs {value!r}"
        for key, value in needed.items()
        if found.get(key) != value
    ]
