import json
import logging
from itertools import islice

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.conditioning.control import NUM_CONTROL
from improved_ldm.data.loader import make_loader, make_pass
from improved_ldm.data.sources import CorruptImagesError, RowStream, open_rows
from improved_ldm.data.transforms import ImageTransform
from tests.data.sets import number, numbers, write_parquet, write_shard

# --- bad rows


def test_few_unreadable_images_are_skipped_and_counted(tmp_path, caplog):
    write_parquet(tmp_path / "train.parquet", range(150), damaged={3, 70, 149})
    stream = RowStream(open_rows(tmp_path), repeat=False)
    with caplog.at_level(logging.WARNING, "improved_ldm.data.stream"):
        seen = sorted(number(row) for row in stream)
    assert seen == sorted(set(range(150)) - {3, 70, 149})
    assert stream.state_dict()["skipped_rows"] == {"image cannot be decoded": 3}
    assert "3 of 150 rows cannot be used (3: image cannot be decoded) in this pass" in caplog.text
    assert "train.parquet, row" in caplog.text and "1 of" not in caplog.text


def test_many_unreadable_images_stop_the_run(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(300), damaged=set(range(0, 300, 15)))
    stream = RowStream(open_rows(tmp_path))
    with pytest.raises(CorruptImagesError, match="5%"):
        list(stream)
    assert 100 <= stream.state_dict()["tally"]["seen"] < 300


def test_small_set_is_judged_at_the_end_of_a_pass(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(10), damaged={4})
    rows = iter(RowStream(open_rows(tmp_path), shuffle_window=0))
    assert [number(next(rows)) for _ in range(10)] == [0, 1, 2, 3, 5, 5, 6, 7, 8, 9]  # 5 stands in for 4
    with pytest.raises(CorruptImagesError, match="1 of 10"):
        next(rows)


# --- order, shares and resuming


def test_windows_are_shuffled_and_epochs_differ(folder):
    rows = open_rows(folder)
    order = numbers(rows, shuffle_window=16)
    assert sorted(order) == list(range(60)) and order != list(range(60))
    assert order == numbers(rows, shuffle_window=16) != numbers(rows, shuffle_window=16, seed=1)
    endless = iter(RowStream(rows, shuffle_window=16))
    first, second = ([next(endless) for _ in range(60)] for _ in range(2))
    assert [number(row) for row in first] == order
    assert sorted(map(number, second)) == list(range(60)) and [number(row) for row in second] != order
    assert len({row.seed for row in first + second}) == 120


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_every_row_once(folder, world_size, num_workers):
    rows, seen = open_rows(folder, label_column="label"), []
    for rank in range(world_size):
        loader = make_pass(
            rows,
            ImageTransform(4),
            7,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        seen += [caption for batch in loader for caption in batch["caption"]]
    assert sorted(seen) == sorted(f"row {i}" for i in range(60))


@settings(max_examples=20, deadline=None)
@given(
    world_size=st.sampled_from([1, 2, 4]),
    batch_size=st.sampled_from([1, 2, 4, 8]),
    shuffle_window=st.sampled_from([0, 7, 16, 100]),
    shards=st.sampled_from([1, 3]),
)
def test_the_order_and_the_seeds_do_not_depend_on_ranks_and_batches(
    tmp_path_factory, world_size, batch_size, shuffle_window, shards
):
    folder = tmp_path_factory.mktemp("set")
    for shard in range(shards):
        write_parquet(folder / f"{shard}.parquet", range(shard * 10, shard * 10 + 10))
    rows = open_rows(folder)

    def read(rank, world_size, batch_size, count):
        stream = RowStream(rows, 3, shuffle_window, rank=rank, world_size=world_size, batch_size=batch_size)
        return [(number(row), row.seed) for row in islice(stream, count)]

    batches, one = 64 // batch_size, read(0, 1, 1, 64)
    shares = [iter(read(rank, world_size, batch_size, 64)) for rank in range(world_size)]
    together = [row for batch in range(batches) for row in islice(shares[batch % world_size], batch_size)]
    assert together == one  # over several passes


@pytest.mark.parametrize("world_size, batch_size", [(1, 4), (2, 2), (3, 1)])
def test_bad_rows_do_not_move_the_others(tmp_path, world_size, batch_size):
    write_parquet(tmp_path / "train.parquet", range(120), damaged={5, 77})
    rows = open_rows(tmp_path)

    def read(rank, world_size, batch_size):
        stream = RowStream(rows, 3, 16, rank=rank, world_size=world_size, batch_size=batch_size)
        return [(number(row), row.seed) for row in islice(stream, 240 // world_size)]

    shares = [iter(read(rank, world_size, batch_size)) for rank in range(world_size)]
    batches = range(240 // batch_size)
    together = [row for batch in batches for row in islice(shares[batch % world_size], batch_size)]
    assert together == read(0, 1, 1)
    assert len({row for row, _ in together[:120]}) == 118


def test_the_order_does_not_depend_on_workers(folder):
    def read(num_workers):
        loader = make_loader(open_rows(folder), ImageTransform(4), 5, shuffle_window=16, num_workers=num_workers)
        return [(batch["caption"], batch["seed"].tolist()) for batch in islice(loader, 30)]

    assert read(0) == read(1) == read(2)


@pytest.mark.parametrize("write", [write_parquet, write_shard])
def test_the_seeds_of_whole_shards_do_not_depend_on_their_readers(tmp_path, write):
    suffix = {write_parquet: "parquet", write_shard: "tar"}[write]
    captions = () if write is write_parquet else (lambda i: {"txt": b"x"},)
    for shard in range(16):
        write(tmp_path / f"{shard:02d}.{suffix}", range(3 * shard, 3 * shard + 3), *captions)
    rows = open_rows(tmp_path)

    def seeds(world_size):
        shares = (RowStream(rows, repeat=False, rank=rank, world_size=world_size) for rank in range(world_size))
        return {number(row): row.seed for share in shares for row in share}

    assert seeds(1) == seeds(2) == seeds(4)
    assert len(set(seeds(1).values())) == 48


@pytest.mark.parametrize("shuffle_window", [0, 1, 4, 16, 25, 100])
def test_stream_resumes_anywhere(folder, shuffle_window):
    arguments = {"rows": open_rows(folder), "seed": 5, "shuffle_window": shuffle_window, "rank": 1, "world_size": 2}
    stream = RowStream(**arguments)
    iterator = iter(stream)
    states, rows = [], []
    for _ in range(80):
        states.append(json.loads(json.dumps(stream.state_dict())))
        rows.append(next(iterator))
    for taken in range(0, 80, 3):
        resumed = RowStream(**arguments)
        resumed.load_state_dict(states[taken])
        again = iter(resumed)
        for row in rows[taken : taken + 10]:
            other = next(again)
            assert (number(other), other.seed, other.caption) == (number(row), row.seed, row.caption)


def test_many_shards_are_dealt_out_whole(tmp_path):
    for shard in range(17):
        write_parquet(tmp_path / f"{shard:05d}.parquet", range(shard * 3, shard * 3 + 3))
    rows = open_rows(tmp_path)
    shares = [numbers(rows, shuffle_window=5, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == list(range(51))
    assert all(len(share) % 3 == 0 for share in shares)
    stream, resumed = (RowStream(rows, shuffle_window=5, rank=1, world_size=2) for _ in range(2))
    iterator = iter(stream)
    for _ in range(40):  # in the second pass, which has another order of shards
        next(iterator)
    resumed.load_state_dict(stream.state_dict())
    again = iter(resumed)
    assert [number(next(again)) for _ in range(30)] == [number(next(iterator)) for _ in range(30)]


def test_webdataset_stream_resumes(tmp_path):
    for shard in range(3):
        write_shard(tmp_path / f"{shard}.tar", range(shard * 7, shard * 7 + 7), lambda i: {"txt": b"x"})
    rows = open_rows(tmp_path)
    stream = RowStream(rows, shuffle_window=5)
    iterator = iter(stream)
    for _ in range(33):  # in the middle of a window of the second pass
        next(iterator)
    resumed = RowStream(rows, shuffle_window=5)
    resumed.load_state_dict(stream.state_dict())
    again = iter(resumed)
    assert [number(next(again)) for _ in range(20)] == [number(next(iterator)) for _ in range(20)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_resumes_bit_exactly(folder, num_workers):
    def loader():
        transform = ImageTransform((4, 3), "crop_then_resize", "random", 0.5, 0.5)
        rows = open_rows(folder, label_column="label")
        return make_loader(rows, transform, 4, shuffle_window=16, num_workers=num_workers)

    straight = loader()
    iterator = iter(straight)
    for _ in range(18):  # beyond the first pass, in the middle of a window
        next(iterator)
    state = straight.state_dict()
    expected = [next(iterator) for _ in range(12)]
    resumed = loader()
    resumed.load_state_dict(state)
    iterator = iter(resumed)
    for batch in expected:
        again = next(iterator)
        assert again["caption"] == batch["caption"]
        for key in ("pixels", "control", "label"):
            assert_close(again[key], batch[key], rtol=0, atol=0, equal_nan=True)


def test_loader_leaves_the_global_generator_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch = next(iter(make_loader(open_rows(folder, label_column="label"), ImageTransform(8), 5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert batch["pixels"].shape == (5, 3, 8, 8) and batch["control"].shape == (5, NUM_CONTROL)
    assert batch["label"].shape == (5,) and len(batch["caption"]) == 5


def test_state_of_another_layout_is_refused(folder):
    rows = open_rows(folder)
    state = RowStream(rows, world_size=2).state_dict()
    with pytest.raises(ValueError, match="readers"):
        RowStream(rows).load_state_dict(state)


def test_a_second_iteration_starts_over(folder):
    stream = RowStream(open_rows(folder), repeat=False)
    assert [number(row) for row in stream] == [number(row) for row in stream]
