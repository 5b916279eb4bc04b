"""The cache of latents and text tokens: encoded once, in half precision, and read in any order."""

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from improved_ldm.conditioning.text import TextTokens, own_positions, unique_prompts
from improved_ldm.data.fingerprint import file_stamp, place_files
from improved_ldm.data.latents import EncodedBatch, SampleEncoder
from improved_ldm.data.order import BatchPlan, PlannedBatch
from improved_ldm.manifest import find_damage, has_manifest, write_manifest
from improved_ldm.output import writing

ROWS_PER_SHARD = 4096
CAPTIONS_AT_ONCE = 256
DESCRIPTION = "cache.json"  # what a cache was made from
PER_ROW = ("control", "class_labels")


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
    folder: Path, batches: Iterable[dict[str, Any]], encoder: SampleEncoder, rank: int = 0, in_half: bool = True
):
    """Encode batches into the shards of one rank; a shard holds latents of one size, and equal captions once.

    Args:
        folder: existing folder for the shards.
        batches: batches from `make_pass`, a finite number.
        encoder: encoder of the batches.
        rank: rank of this process, which is part of the shards' names.
        in_half: store latents and text in half precision.

    Raises:
        OutputError: if a shard cannot be written.
    """
    waiting, shards = defaultdict(list), 0

    def write(batches: list[dict[str, Any]]):
        nonlocal shards
        file = folder / f"rank{rank:04d}-shard{shards:05d}.safetensors"
        tensors = _pack(batches, encoder, in_half)
        with writing(file):
            save_file(tensors, file)
        shards += 1

    for batch in batches:
        latents = encoder.latents(batch.pop("pixels"), batch["seed"]).cpu()
        of_size = waiting[latents.shape[1:]]
        of_size.append({**batch, "latents": latents})
        if sum(len(part["control"]) for part in of_size) >= ROWS_PER_SHARD:
            write(waiting.pop(latents.shape[1:]))
    for of_size in waiting.values():
        write(of_size)


def _pack(batches: list[dict[str, Any]], encoder: SampleEncoder, in_half: bool) -> dict[str, torch.Tensor]:
    """The tensors of a shard: those of an `EncodedBatch`, with the own tokens of all captions joined."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([batch[name] for batch in batches]).contiguous()

    latents, control, seeds = map(joined, ("latents", "control", "seed"))
    sources = torch.cat([batch.get("source", torch.zeros_like(batch["seed"])) for batch in batches])
    tensors = {"latents": latents, "control": control, "seed": seeds, "source": sources}
    if encoder.text_encoder is None:
        tensors["class_labels"] = joined("label")
    else:
        captions, index = unique_prompts([caption for batch in batches for caption in batch["caption"]])
        parts = [encoder.text(captions[i : i + CAPTIONS_AT_ONCE]) for i in range(0, len(captions), CAPTIONS_AT_ONCE)]
        tensors |= {"text_index": index, **own_tokens(TextTokens.concatenate(parts).to("cpu"))}
    halved = ("latents", "text.hidden_states", "text.pooled") if in_half else ()
    return {name: _half(value) if name in halved else value for name, value in tensors.items()}


def own_tokens(text: TextTokens) -> dict[str, torch.Tensor]:
    """The own tokens of prompts, one after the other, and how many each prompt has.

    A prompt without a token of its own keeps its first one, which `pad_tokens` reads then.
    """
    first = text.own_first()
    kept = own_positions(text.attention_mask)
    return {
        "text.hidden_states": first.hidden_states[kept],
        "text.counts": text.attention_mask.sum(1),
        "text.pooled": text.pooled,
    }


def _half(values: torch.Tensor) -> torch.Tensor:
    """The values in float16, or in bfloat16 if some are beyond its range."""
    fits = not values.numel() or values.abs().max() <= torch.finfo(torch.float16).max
    return values.to(torch.float16 if fits else torch.bfloat16).contiguous()


def write_skipped_rows(folder: Path, skipped: dict[str, int], rank: int = 0):
    """Write how many rows of the set were skipped, by reason, next to the shards of one rank."""
    file = folder / f"rank{rank:04d}-skipped.json"
    file.write_text(json.dumps(skipped, ensure_ascii=False), encoding="utf-8")


class LatentCache:
    """Random access to the rows that `write_cache` wrote; the files are mapped, not read into memory.

    The rows are in the order of their seeds, which does not depend on the processes that wrote them.

    Args:
        folder: folder of the shards.

    Attributes:
        groups: (rows,) int, number of the latents' size of each row; rows of one group fit into one batch.
        sources: (rows,) int, number of the set that each row is from.
        skipped_rows: number of rows of the sets that are not in the cache, by reason.

    Raises:
        ValueError: if the folder holds no shards.
    """

    def __init__(self, folder: Path):
        shards = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
        if not shards:
            raise ValueError(f"the cache {folder} holds no shards.")
        sizes = [len(shard["latents"]) for shard in shards]
        order = np.argsort(np.concatenate([shard.pop("seed").numpy() for shard in shards]), kind="stable")
        self._shard = np.repeat(np.arange(len(shards)), sizes)[order]
        self._place = np.concatenate([np.arange(size) for size in sizes])[order]
        shapes = [tuple(shard["latents"].shape[1:]) for shard in shards]
        self.groups = np.array([sorted(set(shapes)).index(shape) for shape in shapes])[self._shard]
        self.sources = np.concatenate([shard.pop("source").numpy() for shard in shards])[order]
        self._shards = [_Shard(shard) for shard in shards]
        counts = (json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*-skipped.json"))
        self.skipped_rows = dict(sum(map(Counter, counts), Counter()))

    def __len__(self) -> int:
        return len(self._shard)

    def rows(self, indices: torch.Tensor | np.ndarray) -> EncodedBatch:
        """The rows at the given indices, (batch,) int, all of one group, in the same order.

        Latents and text are in the precision in which they are stored; the text is as long as the longest of these
        prompts.
        """
        places = list(zip(self._shard[indices].tolist(), self._place[indices].tolist(), strict=True))
        rows = [(self._shards[shard], place) for shard, place in places]
        named = {
            name: torch.stack([shard.tensors[name][place] for shard, place in rows]) for name in rows[0][0].per_row
        }
        if rows[0][0].has_text:
            named |= _joined_text([shard.text(place) for shard, place in rows])
        return EncodedBatch.from_tensors(named)


class _Shard:
    """The tensors of a shard, and where the tokens of each prompt are."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.per_row = [name for name in ("latents", *PER_ROW) if name in tensors]
        self.has_text = "text_index" in tensors
        if self.has_text:
            self.index, self.counts = tensors["text_index"].tolist(), tensors["text.counts"].tolist()
            self.ends = np.cumsum([max(1, count) for count in self.counts]).tolist()

    def text(self, place: int) -> tuple[torch.Tensor, int, torch.Tensor]:
        """The stored tokens of a row's prompt (tokens, text_dim), how many are its own, and the pooled vector."""
        prompt = self.index[place]
        start = self.ends[prompt - 1] if prompt else 0
        hidden_states = self.tensors["text.hidden_states"][start : self.ends[prompt]]
        return hidden_states, self.counts[prompt], self.tensors["text.pooled"][prompt]


def _joined_text(prompts: list[tuple[torch.Tensor, int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Prompts as tensors of an `EncodedBatch`, with zeros after the tokens of the shorter ones."""
    hidden_states, counts, pooled = zip(*prompts, strict=True)
    if len({tokens.dtype for tokens in hidden_states}) > 1:  # from shards of both kinds of half precision
        hidden_states = [tokens.float() for tokens in hidden_states]
    padded = torch.nn.utils.rnn.pad_sequence(hidden_states, batch_first=True)
    mask = torch.arange(padded.shape[1]) < torch.tensor(counts)[:, None]
    return {"text.hidden_states": padded, "text.attention_mask": mask, "text.pooled": torch.stack(pooled)}


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
                yield self.cache.rows(self._numbers(batch))

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
            "given": {str(source): count for source, count in self.given.items()},
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
        self.given = Counter({int(source): count for source, count in state["given"].items()})


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
