"""Samples as a denoiser trains on them: latents, text tokens, class and control; encoded on the fly or cached."""

import glob
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from improved_ldm.autoencoder import encode_images
from improved_ldm.conditioning.text import TextTokens, encode_prompts, unique_prompts
from improved_ldm.seeds import derive_seed

ROWS_PER_SHARD = 4096
CAPTIONS_AT_ONCE = 256


@dataclass(frozen=True)
class EncodedBatch:
    """A batch ready for the denoiser, up to padding, noise and dropout, which are drawn anew every time.

    Args:
        latents: (batch, latent_channels, height, width).
        control: (batch, `NUM_CONTROL`) float32.
        text: the captions' tokens, for a text-conditional model.
        class_labels: (batch,) int, for a class-conditional model.
    """

    latents: torch.Tensor
    control: torch.Tensor
    text: TextTokens | None = None
    class_labels: torch.Tensor | None = None

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
        tokenizer: of the text encoder; None leaves captions out and keeps class labels.
        text_encoder: or None.
        max_tokens: L, tokens a prompt.
    """

    vae: ModelMixin
    tokenizer: PreTrainedTokenizerBase | None = None
    text_encoder: PreTrainedModel | None = None
    max_tokens: int = 77

    def __call__(self, batch: dict[str, Any], seed: int) -> EncodedBatch:
        """Encode a batch of `collate`.

        Args:
            batch: pixels, control, and caption or label.
            seed: of the posterior sample.
        """
        latents = self.latents(batch["pixels"], seed)
        if self.text_encoder is None:
            return EncodedBatch(latents, batch["control"], class_labels=batch["label"])
        return EncodedBatch(latents, batch["control"], self.text(batch["caption"]))

    def latents(self, pixels: torch.Tensor, seed: int) -> torch.Tensor:
        """(batch, latent_channels, height, width) latents of (batch, 3, height, width) pixels."""
        return encode_images(self.vae, pixels, torch.Generator(self.vae.device).manual_seed(seed))

    def text(self, captions: list[str]) -> TextTokens:
        """The tokens of captions."""
        return encode_prompts(captions, self.tokenizer, self.text_encoder, self.max_tokens)


class EncodingLoader:
    """Encodes the batches of a loader as they come; resumable as the loader is.

    Args:
        loader: of `make_loader`.
        encoder: applied to every batch.
        seed: of the posterior samples.
    """

    def __init__(self, loader, encoder: SampleEncoder, seed: int):
        self.loader, self.encoder, self.seed, self.batches = loader, encoder, seed, 0

    def __iter__(self) -> Iterator[EncodedBatch]:
        for batch in self.loader:
            self.batches += 1
            yield self.encoder(batch, derive_seed(self.seed, self.batches))

    def state_dict(self) -> dict[str, Any]:
        """The loader's place and the number of batches given out."""
        return {"batches": self.batches, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: dict[str, Any]):
        """Let the next iteration start where `state_dict` was taken."""
        self.batches = state["batches"]
        self.loader.load_state_dict(state["loader"])


def cache_name(description: dict[str, Any], places: list[str]) -> str:
    """A folder name that changes with whatever a cache's content depends on.

    Args:
        description: the settings that decide the content.
        places: of images and models; for local ones the names, sizes and times of their files count too.
    """
    stamps = [stamp for place in places for stamp in _stamps(place)]
    text = json.dumps([description, places, stamps], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stamps(place: str) -> list[tuple[str, int, int]]:
    path = Path(place)
    files = path.rglob("*") if path.is_dir() else map(Path, glob.glob(place, recursive=True))
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files) if file.is_file()]


def write_cache(folder: Path, batches: Iterable[dict[str, Any]], encoder: SampleEncoder, seed: int, rank: int = 0):
    """Encode batches into the shards of one rank; captions that are alike are kept once a shard.

    Args:
        folder: where the shards go; it exists.
        batches: of `make_loader`, a finite number.
        encoder: applied to them.
        seed: of the posterior samples.
        rank: names the shards.
    """
    pending, shard = [], 0
    for number, batch in enumerate(batches):
        latents = encoder.latents(batch.pop("pixels"), derive_seed(seed, rank, number)).cpu()
        pending.append({**batch, "latents": latents})
        if sum(len(part["control"]) for part in pending) >= ROWS_PER_SHARD:
            save_file(_pack(pending, encoder), folder / f"rank{rank:04d}-shard{shard:05d}.safetensors")
            pending, shard = [], shard + 1
    if pending:
        save_file(_pack(pending, encoder), folder / f"rank{rank:04d}-shard{shard:05d}.safetensors")


def _pack(batches: list[dict[str, Any]], encoder: SampleEncoder) -> dict[str, torch.Tensor]:
    latents, control = (torch.cat([batch[name] for batch in batches]).contiguous() for name in ("latents", "control"))
    if encoder.text_encoder is None:
        return EncodedBatch(latents, control, class_labels=torch.cat([batch["label"] for batch in batches])).tensors()
    captions, index = unique_prompts([caption for batch in batches for caption in batch["caption"]])
    parts = [encoder.text(captions[i : i + CAPTIONS_AT_ONCE]) for i in range(0, len(captions), CAPTIONS_AT_ONCE)]
    text = TextTokens.concatenate(parts).to("cpu")
    return EncodedBatch(latents, control, text).tensors() | {"text_index": index}


class LatentCache:
    """Random access to the rows that `write_cache` wrote; the files are mapped, not read into memory.

    Args:
        folder: of the shards.

    Raises:
        ValueError: if there are none.
    """

    def __init__(self, folder: Path):
        self.shards = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
        if not self.shards:
            raise ValueError(f"the cache {folder} holds no shards.")
        sizes = torch.tensor([len(shard["latents"]) for shard in self.shards])
        self.ends = sizes.cumsum(0)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, indices: torch.Tensor) -> EncodedBatch:
        """The rows of these indices, (batch,) int, in their order."""
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
    """Batches from a cache for ever, reshuffled every epoch. The number of batches given out is its whole place.

    Args:
        cache: the rows.
        batch_size: rows a batch and rank.
        seed: of the order.
        rank: this process.
        world_size: number of processes; together they see every row once an epoch.
    """

    def __init__(self, cache: LatentCache, batch_size: int, seed: int, rank: int = 0, world_size: int = 1):
        self.cache, self.batch_size, self.seed = cache, batch_size, seed
        self.rank, self.world_size, self.batches = rank, world_size, 0
        self._epoch, self._order = -1, torch.empty(0)

    def __iter__(self) -> Iterator[EncodedBatch]:
        while True:
            start = (self.batches * self.world_size + self.rank) * self.batch_size
            self.batches += 1
            yield self.cache.rows(self._indices(start))

    def _indices(self, start: int) -> torch.Tensor:
        """Row numbers at the places from `start` on in the endless sequence of shuffled epochs."""
        size, indices = len(self.cache), []
        for place in range(start, start + self.batch_size):
            epoch, offset = divmod(place, size)
            if epoch != self._epoch:
                generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
                self._epoch, self._order = epoch, torch.randperm(size, generator=generator)
            indices.append(self._order[offset])
        return torch.stack(indices)

    def state_dict(self) -> dict[str, int]:
        """The number of batches given out, and what it counts."""
        return {"batches": self.batches, "batch_size": self.batch_size, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, int]):
        """Let the next iteration start after that many batches.

        Raises:
            ValueError: if they were batches of another size, or of another number of processes.
        """
        for name, value in self.state_dict().items():
            if name != "batches" and state[name] != value:
                raise ValueError(f"the run was left with `{name}` {state[name]}; it cannot go on with {value}.")
        self.batches = state["batches"]


def publish_cache(unfinished: Path, folder: Path):
    """Give a finished cache its name, so that a folder of that name is always whole; an earlier one stays."""
    if folder.exists():
        shutil.rmtree(unfinished)
    else:
        unfinished.rename(folder)
