"""Rows of tensors that are spread over the shards of a cache."""

from collections.abc import Sequence

import numpy as np
import torch

from improved_ldm.data.latents import OwnTokens


class Column:
    """Rows of a tensor that is spread over shards, which may differ in dtype."""

    def __init__(self, parts: list[torch.Tensor]):
        self.parts, dtypes = parts, {part.dtype for part in parts}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None
        # NumPy copies single rows several times faster; it does not know bfloat16, so it copies the bits
        if self.dtype is not None:
            self.bits = np.int16 if self.dtype.itemsize == 2 else np.int32
            self.arrays = [part.view(torch.int16 if self.bits is np.int16 else torch.int32).numpy() for part in parts]

    def rows(self, shard_of: Sequence[int], row_of: Sequence[int]) -> torch.Tensor:
        """The rows at these places, (batch, …)."""
        if self.dtype is None:
            parts = zip(shard_of, row_of, strict=True)
            return torch.stack([self.parts[shard][row].float() for shard, row in parts])
        arrays, out = self.arrays, np.empty((len(shard_of), *self.parts[shard_of[0]].shape[1:]), self.bits)
        for place, (shard, row) in enumerate(zip(shard_of, row_of, strict=True)):
            out[place] = arrays[shard][row]
        return torch.from_numpy(out).view(self.dtype)

    def spans(self, shard_of: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """The rows from each start on, as many as counted, one after the other."""
        spans = zip(shard_of, starts, counts, strict=True)
        if self.dtype is None:
            return torch.cat([self.parts[shard][start : start + count].float() for shard, start, count in spans])
        arrays = self.arrays
        joined = np.concatenate([arrays[shard][start : start + count] for shard, start, count in spans])
        return torch.from_numpy(joined).view(self.dtype)


class TextColumn:
    """The captions of shards, of which only their own tokens are stored."""

    def __init__(self, shards: list[dict[str, torch.Tensor]]):
        self.offsets = [shard["text.offsets"].numpy() for shard in shards]
        self.length = int(shards[0]["text.length"])
        self.tokens, self.pooled = (
            Column([shard[name] for shard in shards]) for name in ("text.hidden_states", "text.pooled")
        )

    def rows(self, shard_of: Sequence[int], caption_of: Sequence[int]) -> OwnTokens:
        """The own tokens of the captions at these places."""
        places = list(zip(shard_of, caption_of, strict=True))
        starts = [self.offsets[shard][caption] for shard, caption in places]
        ends = [self.offsets[shard][caption + 1] for shard, caption in places]
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        states = self.tokens.spans(shard_of, starts, counts)
        return OwnTokens(states, torch.tensor(counts), self.pooled.rows(shard_of, caption_of), self.length)
