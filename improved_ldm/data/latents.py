"""Samples that a denoiser trains on: latents, text tokens, class and control; encoded on the fly or cached."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from improved_ldm.autoencoder import encode_images
from improved_ldm.conditioning.text import TextTokens, encode_prompts, unique_prompts
from improved_ldm.data.fingerprint import file_stamp, place_files
from improved_ldm.data.order import BatchPlan, PlannedBatch
from improved_ldm.manifest import find_damage, has_manifest, write_manifest
from improved_ldm.output import writing

ROWS_PER_SHARD = 4096
CAPTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class EncodedBatch:
    """A batch for the denoiser, before padding, noise and dropout, which change every time it is used.

    Args:
        latents: (batch, latent_channels, height, width).
        control: (batch, `NUM_CONTROL`) float32.
        text: tokens of the captions, for a text-conditional model.
        class_labels: (batch,) int, for a class-conditional model.
    """

    latents: torch.Tensor
    control: torch.Tensor
    text: TextTokens | None = None
    class_labels: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The batch as named tensors."""
        named = {"latents": self.latents, "control": self.control}
        if self.text is not None:
            named |= {f"text.{name}": value for name, value in vars(self.text).items()}
        if self.class_labels is not None:
            named["class_labels"] = self.class_labels
        return named

    @classmethod
    def from_tensors(cls, named: dict[str, torch.Tensor]) -> "EncodedBatch":
        """The inverse of `tensors`."""
        text = {name.removeprefix("text."): value for name, value in named.items() if name.startswith("text.")}
        return cls(named["latents"], named["control"], TextTokens(**text) if text else None, named.get("class_labels"))

    def to(self, device: torch.device) -> "EncodedBatch":
        """The batch on a device."""
        return self.from_tensors({name: value.to(device, non_blocking=True) for name, value in self.tensors().items()})


@dataclass(frozen=True)
class SampleEncoder:
    """Encodes batches of images and captions.

    Args:
        vae: the autoencoder.
        tokenizer: tokenizer of the text encoder; None leaves captions out and keeps class labels.
        text_encoder: the text encoder, or None.
        max_tokens: L, tokens per prompt.
    """

    vae: ModelMixin
    tokenizer: PreTrainedTokenizerBase | None = None
    text_encoder: PreTrainedModel | None = None
    max_tokens: int = 77

    def __call__(self, batch: dict[str, Any]) -> EncodedBatch:
        """Encode a batch of `collate`."""
        latents = self.latents(batch["pixels"], batch["seed"])
        if self.text_encoder is None:
            return EncodedBatch(latents, batch["control"], class_labels=batch["label"])
        return EncodedBatch(latents, batch["control"], self.text(batch["caption"]))

    def latents(self, pixels: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """(batch, latent_channels, height, width) latents of (batch, 3, height, width) pixels and (batch,) seeds."""
        return encode_images(self.vae, pixels, seeds=seeds)

    def text(self, captions: list[str]) -> TextTokens:
        """The tokens of captions."""
        return encode_prompts(captions, self.tokenizer, self.text_encoder, self.max_tokens)


class EncodingLoader:
    """Encodes the batches of a loader one by one; resumable like the loader.

    Args:
        loader: loader from `make_loader`.
        encoder: encoder of the batches.
    """

    def __init__(self, loader, encoder: SampleEncoder):
        self.loader, self.encoder = loader, encoder

    def __iter__(self) -> Iterator[EncodedBatch]:
        return map(self.encoder, self.loader)

    def state_dict(self) -> dict[str, Any]:
        """The state of the loader."""
        return {"loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        """Start the next iteration where `state_dict` was taken."""
        self.loader.load_state_dict(state["loader"])


def cache_name(description: dict[str, Any], places: list[str]) -> str:
    """A folder name that changes with everything that the content of a cache depends on.

    Args:
        description: settings that the content depends on.
        places: places of images and models; for local ones the names, sizes and times of their files count too.
    """
    stamps = [(str(file), *file_stamp(file)) for place in places for file in place_files(place)]
    text = json.dumps([description, places, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_cache(folder: Path, batches: Iterable[dict[str, Any]], encoder: SampleEncoder, rank: int = 0):
    """Encode batches into the shards of one rank; equal captions are stored once per shard.

    Args:
        folder: existing folder for the shards.
        batches: batches from `make_loader`, a finite number.
        encoder: encoder of the batches.
        rank: rank of this process, which is part of the shards' names.

    Raises:
        OutputError: if a shard cannot be written.
    """
    pending, shard = [], 0
    for batch in batches:
        latents = encoder.latents(batch.pop("pixels"), batch["seed"]).cpu()
        pending.append({**batch, "latents": latents})
        if sum(len(part["control"]) for part in pending) >= ROWS_PER_SHARD:
            _write_shard(pending, encoder, folder / f"rank{rank:04d}-shard{shard:05d}.safetensors")
            pending, shard = [], shard + 1
    if pending:
        _write_shard(pending, encoder, folder / f"rank{rank:04d}-shard{shard:05d}.safetensors")


def _write_shard(batches: list[dict[str, Any]], encoder: SampleEncoder, file: Path):
    tensors = _pack(batches, encoder)
    with writing(file):
        save_file(tensors, file)


def _pack(batches: list[dict[str, Any]], encoder: SampleEncoder) -> dict[str, torch.Tensor]:
    def joined(name: str) -> torch.Tensor:
        return torch.cat([batch[name] for batch in batches]).contiguous()

    latents, control, seeds = map(joined, ("latents", "control", "seed"))
    if encoder.text_encoder is None:
        return EncodedBatch(latents, control, class_labels=joined("label")).tensors() | {"seed": seeds}
    captions, index = unique_prompts([caption for batch in batches for caption in batch["caption"]])
    parts = [encoder.text(captions[i : i + CAPTIONS_AT_ONCE]) for i in range(0, len(captions), CAPTIONS_AT_ONCE)]
    text = TextTokens.concatenate(parts).to("cpu")
    return EncodedBatch(latents, control, text).tensors() | {"text_index": index, "seed": seeds}


def write_skipped_rows(folder: Path, skipped: dict[str, int], rank: int = 0):
    """Write how many rows of the set were skipped, by reason, next to the shards of one rank."""
    file = folder / f"rank{rank:04d}-skipped.json"
    file.write_text(json.dumps(skipped, ensure_ascii=False), encoding="utf-8")


class LatentCache:
    """Random access to the rows that `write_cache` wrote; the files are mapped, not read into memory.

    The rows are in the order of their seeds, which does not depend on the processes that wrote them.
    `skipped_rows` counts the rows of the set that are not in the cache, by reason.

    Args:
        folder: folder of the shards.

    Raises:
        ValueError: if the folder holds no shards.
    """

    def __init__(self, folder: Path):
        self.shards = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
        if not self.shards:
            raise ValueError(f"the cache {folder} holds no shards.")
        sizes = torch.tensor([len(shard["latents"]) for shard in self.shards])
        self.ends = sizes.cumsum(0)
        self.order = torch.cat([shard.pop("seed") for shard in self.shards]).argsort()
        counts = (json.loads(file.read_text(encoding="utf-8")) for file in Path(folder).glob("*-skipped.json"))
        self.skipped_rows = dict(sum(map(Counter, counts), Counter()))
        self.groups = np.zeros(len(self), dtype=np.int64)
        self.sources = np.zeros(len(self), dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, indices: torch.Tensor) -> EncodedBatch:
        """The rows at the given indices, (batch,) int, in the same order."""
        indices = self.order[indices]
        shard_of = torch.searchsorted(self.ends, indices, right=True)
        parts, order = [], []
        for number in shard_of.unique().tolist():
            at = (shard_of == number).nonzero().flatten()
            shard = self.shards[number]
            local = indices[at] - (self.ends[number] - len(shard["latents"]))
            parts.append(self._select(shard, local))
            order.append(at)
        back = torch.cat(order).argsort()
        return EncodedBatch.from_tensors({name: torch.cat([part[name] for part in parts])[back] for name in parts[0]})

    @staticmethod
    def _select(shard: dict[str, torch.Tensor], local: torch.Tensor) -> dict[str, torch.Tensor]:
        def index_of(name: str) -> torch.Tensor:
            return shard["text_index"][local] if name.startswith("text.") else local

        return {name: value[index_of(name)] for name, value in shard.items() if name != "text_index"}


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
