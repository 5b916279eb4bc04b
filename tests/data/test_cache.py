import copy
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.conditioning.text import TextTokens, pad_tokens
from improved_ldm.data.cache import CachedLoader, LatentCache, cache_name, own_tokens, write_cache
from improved_ldm.data.latents import SampleEncoder
from improved_ldm.trainer.components import load_text_encoder
from improved_ldm.trainer.config import TextConfig

CAPTIONS = ("a photo of a bag", "a coat", "a photo of a bag", "a sneaker")


@pytest.fixture(scope="module")
def encoder() -> SampleEncoder:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
    )
    tokenizer, text_encoder = load_text_encoder(TextConfig(max_tokens=12))
    return SampleEncoder(vae.eval(), tokenizer, text_encoder, 12)


def batches(sizes: tuple[int, ...]) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixels": torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1,
            "control": control_tensor([Control.of_whole_image((8 + number, 8), (8, 8))] * size),
            "caption": [CAPTIONS[i % len(CAPTIONS)] for i in range(size)],
            "label": torch.arange(size),
            "seed": 10 * number + torch.arange(size),  # in order
        }
        for number, size in enumerate(sizes)
    ]


@pytest.fixture(scope="module")
def cache(encoder, tmp_path_factory) -> LatentCache:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, batches((5, 3, 4))[:2], encoder)
    write_cache(folder, batches((5, 3, 4))[2:], encoder, rank=1)
    return LatentCache(folder)


def test_a_cache_gives_back_what_was_encoded(cache, encoder):
    assert len(cache) == 12
    rows = cache.rows(torch.tensor([7, 0, 11]))
    assert rows.latents.shape == (3, 4, 4, 4)
    assert rows.control[:, 0].tolist() == [9, 8, 10]
    direct = encoder.text([CAPTIONS[2], CAPTIONS[0], CAPTIONS[3]])
    whole = rows.whole(12).text
    assert torch.equal(whole.attention_mask, direct.attention_mask)
    own = direct.attention_mask
    torch.testing.assert_close(whole.hidden_states[own], direct.hidden_states[own], rtol=2**-10, atol=2**-14)
    torch.testing.assert_close(whole.pooled, direct.pooled, rtol=2**-10, atol=2**-14)
    assert rows.text.hidden_states.shape[1] == own.sum(1).max()


def test_a_cache_is_the_same_whoever_wrote_it(encoder, cache, tmp_path):
    parts = batches((5, 3, 4))
    for rank, batch in enumerate(reversed(parts)):
        write_cache(tmp_path, [batch], encoder, rank)
    every = torch.arange(12)
    torch.testing.assert_close(
        LatentCache(tmp_path).rows(every).tensors(), cache.rows(every).tensors(), equal_nan=True
    )


def test_class_labels_are_kept_where_there_is_no_text(encoder, tmp_path):
    write_cache(tmp_path, batches((5,)), SampleEncoder(encoder.vae))
    rows = LatentCache(tmp_path).rows(torch.tensor([4, 1]))
    assert rows.class_labels.tolist() == [4, 1]
    assert rows.text is None


def test_an_empty_cache_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no shards"):
        LatentCache(tmp_path)


@settings(max_examples=20, deadline=None)
@given(batch_size=st.integers(1, 7), world_size=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_ranks_together_see_every_row_once_an_epoch(cache, batch_size, world_size, seed):
    loaders = [iter(CachedLoader(cache, batch_size, seed, rank, world_size)) for rank in range(world_size)]
    rows = [tuple(row.tolist()) for row in cache.rows(torch.arange(len(cache))).latents.flatten(1)]
    seen = []
    while len(seen) < 2 * len(cache):
        seen += [tuple(row.tolist()) for loader in loaders for row in next(loader).latents.flatten(1)]
    for epoch in (seen[: len(cache)], seen[len(cache) : 2 * len(cache)]):
        assert sorted(epoch) == sorted(rows)


def test_a_loader_refuses_the_place_of_another_layout(cache):
    state = CachedLoader(cache, 4, seed=0).state_dict()
    with pytest.raises(ValueError, match="`world_size` 1; it cannot resume with 2"):
        CachedLoader(cache, 4, seed=0, rank=1, world_size=2).load_state_dict(state)


def test_a_cached_loader_resumes_at_the_next_batch(cache):
    loader = CachedLoader(cache, 5, seed=3)
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = CachedLoader(cache, 5, seed=3)
    resumed.load_state_dict(loader.state_dict())
    torch.testing.assert_close(next(iter(resumed)).latents, next(iterator).latents, rtol=0, atol=0)


def test_the_name_of_a_cache_follows_settings_and_files(tmp_path):
    file = tmp_path / "images.parquet"
    file.write_bytes(b"one")
    places = [str(tmp_path)]
    name = cache_name({"resolution": 8}, places)
    assert cache_name({"resolution": 8}, places) == name
    assert cache_name({"resolution": 9}, places) != name
    file.write_bytes(b"other")
    assert cache_name({"resolution": 8}, places) != name


# --- text and precision


@pytest.mark.parametrize("padding", ["zero", "mask", "replicate", "noisy_replicate"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_stored_text_is_padded_like_the_encoded_text(encoder, tmp_path, padding, side):
    encoder = replace(encoder, tokenizer=copy.deepcopy(encoder.tokenizer))
    encoder.tokenizer.padding_side = side
    (batch,) = batches((6,))
    batch["caption"] = ["a coat", "", "a photo of a bag with a very long strap", "a", "a coat", "sneaker"]
    write_cache(tmp_path, [dict(batch)], encoder, in_half=False)
    rows = LatentCache(tmp_path).rows(torch.arange(6)).whole(12)
    noise = torch.randn(6, 12, 96)
    stored, direct = (
        pad_tokens(text, padding, 0.1, noise=noise) for text in (rows.text, encoder.text(batch["caption"]))
    )
    torch.testing.assert_close(stored[0], direct[0], rtol=0, atol=0)
    assert (stored[1] is None) == (direct[1] is None) and (stored[1] is None or torch.equal(stored[1], direct[1]))
    assert torch.equal(rows.latents, encoder.latents(batch["pixels"], batch["seed"]))


def test_a_prompt_without_a_token_of_its_own_is_kept():
    text = TextTokens(torch.randn(2, 4, 3), torch.tensor([[False] * 4, [True, True, False, False]]), torch.randn(2, 3))
    stored = own_tokens(text)
    assert stored["text.counts"].tolist() == [0, 2]
    assert torch.equal(stored["text.hidden_states"], torch.cat([text.hidden_states[0, :1], text.hidden_states[1, :2]]))


def test_values_beyond_half_precision_are_stored_with_its_larger_range(encoder, tmp_path):
    parts = batches((2, 2))
    write_cache(tmp_path, parts, _Scaled(encoder, 1e6))
    rows = LatentCache(tmp_path).rows(torch.arange(4))
    assert rows.latents.dtype == torch.bfloat16 and rows.latents.isfinite().all()
    assert rows.whole(12).latents.dtype == torch.float32


class _Scaled:
    """An encoder with larger latents."""

    def __init__(self, encoder, scale):
        self.text, self.text_encoder, self._latents = encoder.text, encoder.text_encoder, encoder.latents
        self.scale = scale

    def latents(self, pixels, seeds):
        return self.scale * self._latents(pixels, seeds)


# --- sizes, sources


def test_rows_of_several_sizes_and_sources(encoder, tmp_path):
    parts = batches((3, 4, 2))
    parts[1]["pixels"] = parts[1]["pixels"][..., :4]
    parts[2]["source"] = torch.ones(2, dtype=torch.long)
    write_cache(tmp_path, parts, encoder)
    cache = LatentCache(tmp_path)
    assert cache.sources.tolist() == [0] * 7 + [1] * 2
    assert [len(set(cache.groups[part].tolist())) for part in (range(3), range(3, 7), range(7, 9))] == [1, 1, 1]
    assert cache.groups[0] == cache.groups[8] != cache.groups[4]
    loader = CachedLoader(cache, 2, seed=0, weights=[1, 2])
    shapes = Counter(tuple(batch.latents.shape[2:]) for batch in islice(loader, 60))
    assert set(shapes) == {(4, 4), (4, 2)}
    assert loader.given[1] == pytest.approx(2 * loader.given[0], abs=4)


def test_a_batch_of_many_shards_keeps_its_order(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("improved_ldm.data.cache.ROWS_PER_SHARD", 2)
    write_cache(tmp_path, batches((5, 3, 4)), encoder)
    cache = LatentCache(tmp_path)
    order = torch.randperm(12)
    every = cache.rows(torch.arange(12))
    assert torch.equal(cache.rows(order).latents, every.latents[order])
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
