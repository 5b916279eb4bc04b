import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.conditioning.text import TextPadding, pad_tokens
from improved_ldm.data.cache import CachedLoader, LatentCache, cache_name, write_cache
from improved_ldm.data.latents import EncodingLoader, SampleEncoder
from improved_ldm.data.loader import make_loader
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform
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
            "pixels": torch.randint(256, (size, 3, 8, 8), generator=generator, dtype=torch.uint8),
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
    stored = rows.to("cpu").text
    assert torch.equal(stored.attention_mask, direct.attention_mask)
    noise = torch.randn(direct.hidden_states.shape, generator=torch.Generator().manual_seed(0))
    for padding in get_args(TextPadding):
        expected, expected_mask = pad_tokens(direct, padding, 0.1, noise=noise)
        padded, mask = pad_tokens(stored, padding, 0.1, noise=noise)
        torch.testing.assert_close(padded, expected, rtol=2e-3, atol=2e-3)
        assert (mask is None) == (expected_mask is None) and (mask is None or torch.equal(mask, expected_mask))


def test_a_cache_in_float32_is_exact(encoder, tmp_path):
    write_cache(tmp_path, batches((5,)), encoder, dtype="fp32")
    (batch,) = batches((5,))
    rows = LatentCache(tmp_path).rows(torch.arange(5))
    assert torch.equal(rows.latents, encoder.latents(batch["pixels"], batch["seed"]))


def test_values_beyond_half_precision_are_stored_as_bfloat16(encoder, tmp_path):
    hot = replace(encoder, vae=copy.deepcopy(encoder.vae))
    hot.vae.register_to_config(scaling_factor=1e7)
    write_cache(tmp_path, batches((5,)), hot)
    write_cache(tmp_path, batches((5,)), encoder, rank=1)  # one shard of each kind
    rows = LatentCache(tmp_path).rows(torch.arange(10))
    assert rows.latents.isfinite().all() and rows.latents.abs().max() > 1e5


def test_rows_of_several_shapes_and_sources(encoder, tmp_path):
    first, second = batches((5, 3))
    second |= {"pixels": torch.zeros(3, 3, 8, 16, dtype=torch.uint8), "source": torch.ones(3, dtype=torch.int64)}
    write_cache(tmp_path, [first, second], encoder)
    cache = LatentCache(tmp_path)
    assert cache.shapes == [(4, 4, 4), (4, 4, 8)]
    assert cache.groups.tolist() == [0] * 5 + [1] * 3 and cache.sources.tolist() == [0] * 5 + [1] * 3
    assert cache.rows(torch.tensor([6, 5])).latents.shape == (2, 4, 4, 8)


def test_a_cache_is_the_same_whoever_wrote_it(encoder, cache, tmp_path):
    parts = batches((5, 3, 4))
    for rank, batch in enumerate(reversed(parts)):
        write_cache(tmp_path, [batch], encoder, rank)
    every = torch.arange(12)
    torch.testing.assert_close(
        LatentCache(tmp_path).rows(every).to("cpu").tensors(), cache.rows(every).to("cpu").tensors(), equal_nan=True
    )


def test_the_latents_of_an_image_do_not_depend_on_its_batch(encoder):
    (batch,) = batches((5,))
    whole = encoder.latents(batch["pixels"], batch["seed"])
    alone = torch.cat([encoder.latents(batch["pixels"][i : i + 1], batch["seed"][i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, alone)
    other = encoder.latents(batch["pixels"], batch["seed"] + 1)
    assert (whole - other).abs().mean() > 1e-3


def test_class_labels_are_kept_where_there_is_no_text(encoder, tmp_path):
    write_cache(tmp_path, batches((5,)), SampleEncoder(encoder.vae))
    rows = LatentCache(tmp_path).rows(torch.tensor([4, 1]))
    assert rows.class_labels.tolist() == [4, 1]
    assert rows.text is None


def test_a_cache_of_one_image_makes_batches(encoder, tmp_path):
    write_cache(tmp_path, batches((1,)), encoder)
    loader = CachedLoader(LatentCache(tmp_path), batch_size=2, seed=0)
    assert next(iter(loader)).latents.shape[0] == 2


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


def test_an_encoding_loader_resumes_at_the_next_batch(encoder):
    def open_loader() -> EncodingLoader:
        rows = open_rows("embedded:fashion-mnist", "test")
        loader = make_loader(rows, ImageTransform(8, flip_probability=0.5), batch_size=3, shuffle_window=16)
        return EncodingLoader(loader, encoder)

    loader = open_loader()
    iterator = iter(loader)
    next(iterator), next(iterator)
    resumed = open_loader()
    resumed.load_state_dict(loader.state_dict())
    expected, got = next(iterator), next(iter(resumed))
    torch.testing.assert_close(got.tensors(), expected.tensors(), rtol=0, atol=0, equal_nan=True)


def test_the_name_of_a_cache_follows_settings_and_files(tmp_path):
    file = tmp_path / "images.parquet"
    file.write_bytes(b"one")
    places = [str(tmp_path)]
    name = cache_name({"resolution": 8}, places)
    assert cache_name({"resolution": 8}, places) == name
    assert cache_name({"resolution": 9}, places) != name
    file.write_bytes(b"other")
    assert cache_name({"resolution": 8}, places) != name
