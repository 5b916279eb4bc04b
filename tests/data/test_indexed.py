import json
from collections import Counter
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from torch.testing import assert_close

from improved_ldm.data.buckets import Buckets
from improved_ldm.data.filters import RowFilter
from improved_ldm.data.indexed import IndexedSource, image_sizes, index_lines
from improved_ldm.data.loader import make_loader, make_pass
from improved_ldm.data.mixture import Mixture, Source
from improved_ldm.data.sources import CorruptImagesError, open_rows
from improved_ldm.data.tally import given_by_source, skipped_rows
from improved_ldm.data.transforms import ImageTransform
from tests.data.sets import encode, write_parquet, write_shard

BUCKETS = Buckets(32, 8, 3)
SIZES = [(20, 20), (30, 18), (18, 30), (12, 40), (21, 20)]  # (width, height); the fourth is beyond the limit


def write_folder(folder, count=60, sizes=SIZES, classes=1):
    """Captioned images of several sizes, whose captions are their numbers."""
    folder.mkdir(exist_ok=True)
    records = []
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(encode(Image.new("RGB", sizes[i % len(sizes)], (i % 256, 0, 0))))
        records.append({"file_name": f"{i:03d}.png", "text": str(i), "label": i * classes // count})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records), encoding="utf-8")
    return folder


def read(loader, count):
    return list(islice(loader, count))


def counts(batches):
    return Counter(caption for batch in batches for caption in batch["caption"])


# --- order


def layouts(folder):
    """A set that is sorted by class, in every layout that has a length: 6 classes with 40 rows each."""
    for kind in ("parquet", "tar", "classes", "captioned"):
        (folder / kind).mkdir()
    for label in range(6):
        rows = range(40 * label, 40 * label + 40)
        write_parquet(folder / "parquet" / f"{label}.parquet", rows)
        write_shard(folder / "tar" / f"{label}.tar", rows, lambda i: {"cls": str(i // 40).encode(), "txt": b"x"})
        (folder / "classes" / f"class {label}").mkdir()
        for i in rows:
            image = encode(Image.new("RGB", (4, 4), (i, 0, 0)))
            (folder / "classes" / f"class {label}" / f"{i:03d}.png").write_bytes(image)
    write_folder(folder / "captioned", 240, [(4, 4)], classes=6)
    return {kind: folder / kind for kind in ("parquet", "tar", "classes", "captioned")}


@pytest.mark.parametrize("kind", ["parquet", "tar", "classes", "captioned"])
def test_a_batch_has_as_many_classes_as_rows_that_are_drawn_independently(tmp_path, kind):
    rows = open_rows(layouts(tmp_path)[kind], caption_column=None)
    found = [
        len({int(pixel) // 40 for pixel in batch["pixels"][:, 0, 0, 0]})
        for batch in read(make_loader(rows, ImageTransform(4), 8), 150)
    ]
    drawn = np.random.default_rng(0).integers(0, 6, (10_000, 8))
    expected = np.mean([len(set(row)) for row in drawn])  # 4.6 of 6
    assert np.mean(found) == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_the_order_does_not_depend_on_ranks_and_workers(tmp_path, buckets, num_workers):
    rows = open_rows(write_folder(tmp_path / "a"))

    def batches(rank, world_size, workers, count):
        place = {"rank": rank, "world_size": world_size, "num_workers": workers, "buckets": buckets}
        loader = make_loader(rows, ImageTransform(32), 4, seed=3, **place)
        return [(batch["caption"], batch["seed"].tolist()) for batch in read(loader, count)]

    shares = [batches(rank, 2, num_workers, 20) for rank in range(2)]
    assert [batch for pair in zip(*shares, strict=True) for batch in pair] == batches(0, 1, 0, 40)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_a_loader_of_two_sources_resumes_bit_exactly(tmp_path, buckets, num_workers):
    first, second = open_rows(write_folder(tmp_path / "a")), open_rows(write_folder(tmp_path / "b", 13))
    mixture = Mixture((Source(first, "a", 2.0), Source(second, "b")))

    def loader():
        transform = ImageTransform(32, "crop_then_resize", "random", 0.5, 0.5)
        return make_loader(mixture, transform, 4, num_workers=num_workers, rank=1, world_size=2, buckets=buckets)

    straight = loader()
    iterator = iter(straight)
    given = Counter(source for _ in range(23) for source in next(iterator)["source"].tolist())
    state = json.loads(json.dumps(straight.state_dict())) if not num_workers else straight.state_dict()
    assert given_by_source(state) == given
    expected = read(iterator, 12)
    resumed = loader()
    resumed.load_state_dict(state)
    for batch, again in zip(expected, resumed, strict=False):
        assert again["caption"] == batch["caption"]
        for key in ("pixels", "control", "source", "seed"):
            assert_close(again[key], batch[key], rtol=0, atol=0, equal_nan=True)


def test_a_state_of_another_layout_is_refused(tmp_path):
    rows = open_rows(write_folder(tmp_path / "a"))
    loader = make_loader(rows, ImageTransform(32), 4, world_size=2)
    read(loader, 1)
    with pytest.raises(ValueError, match="readers"):
        other = make_loader(rows, ImageTransform(32), 4)
        other.load_state_dict(loader.state_dict())
        next(iter(other))


def test_weights_decide_how_often_a_source_is_seen(tmp_path):
    sources = (open_rows(write_folder(tmp_path / "a")), open_rows(write_folder(tmp_path / "b", 13)))
    mixture = Mixture(tuple(map(Source, sources, ("a", "b"), (3.0, 1.0))))
    loader = make_loader(mixture, ImageTransform(8), 5)
    seen = Counter(source for batch in read(loader, 40) for source in batch["source"].tolist())
    assert seen == {0: 150, 1: 50}


# --- buckets


def test_batches_are_of_one_bucket_and_the_control_has_the_true_target(tmp_path):
    loader = make_loader(open_rows(write_folder(tmp_path / "a")), ImageTransform(32), 4, buckets=BUCKETS)
    batches = read(loader, 45)
    assert {tuple(batch["pixels"].shape[2:]) for batch in batches} <= set(BUCKETS.sizes)
    assert len({tuple(batch["pixels"].shape[2:]) for batch in batches}) == 3
    for batch in batches:
        ratios = {SIZES[int(caption) % len(SIZES)] for caption in batch["caption"]}
        groups = {int(BUCKETS.nearest([(height, width)])[0]) for width, height in ratios}
        assert [BUCKETS.sizes[group] for group in groups] == [tuple(batch["pixels"].shape[2:])]
    seen = counts(batches)
    assert max(seen.values()) - min(seen.values()) <= 1 and len(seen) == 60


def test_a_bucket_of_one_image_is_neither_starved_nor_repeated(tmp_path):
    sizes = [(20, 20)] * 19 + [(10, 28)]
    loader = make_loader(open_rows(write_folder(tmp_path / "a", 20, sizes)), ImageTransform(32), 6, buckets=BUCKETS)
    batches = read(loader, 42)
    rare = [batch for batch in batches if batch["caption"] == ["19"]]
    others = counts(batches)
    assert all(others["19"] - others[str(i)] in (-1, 0, 1) for i in range(19)) and len(rare) == others["19"] > 8
    assert all(len(batch["caption"]) in (1, 6) for batch in batches)


def test_what_buckets_do_is_said(tmp_path):
    source = IndexedSource.of(open_rows(write_folder(tmp_path / "a", 21)), BUCKETS)
    other = IndexedSource.of(open_rows(write_folder(tmp_path / "b", 4, [(20, 20)] * 4)), BUCKETS)
    lines = list(index_lines([("a", source), ("b", other)], BUCKETS, 5))
    assert lines[0].startswith("a: images per bucket (height x width): ") and "32x32: 9" in lines[0]
    assert lines[1] == "a: 4 images beyond `transform.max_aspect` 3, cropped to the nearest bucket"
    assert lines[2].startswith("b: images per bucket") and "32x32: 4" in lines[2]
    assert lines[3:] == ["1 bucket with fewer images than a batch of 5; batches of these are smaller"]


def test_a_pass_has_each_image_once_in_its_bucket(tmp_path):
    batches = list(make_pass(open_rows(write_folder(tmp_path / "a")), ImageTransform(32), 7, buckets=BUCKETS))
    assert counts(batches) == {str(i): 1 for i in range(60)}
    assert {tuple(batch["pixels"].shape[2:]) for batch in batches} <= set(BUCKETS.sizes)


def test_the_sizes_of_a_large_set_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("improved_ldm.data.indexed.KEPT_FROM", 10)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = open_rows(write_folder(tmp_path / "a"))
    table = rows.table()
    sizes = image_sizes(rows, table)
    assert sizes.tolist() == [[SIZES[i % 5][1], SIZES[i % 5][0]] for i in range(60)]
    (tmp_path / "a" / "003.png").unlink()  # a kept file is read instead of the images
    write_folder(tmp_path / "b", 1)
    assert len(list((tmp_path / "cache" / "improved_ldm").glob("*.npy"))) == 1


# --- filters and damage


@pytest.mark.parametrize(
    "wanted, kept, reason",
    [
        (RowFilter(min_size=19), {0, 4}, "shorter side below 19 pixels"),
        (RowFilter(max_aspect=2), {0, 1, 2, 4}, "aspect ratio above 2"),
        (RowFilter(caption_pattern="^[0-4]?[0-9]$"), set(range(5)), "caption without '^[0-4]?[0-9]$'"),
        (RowFilter(caption_pattern=f"^({'x|' * 99}[0-4]?[0-9])$"), set(range(5)), f"caption without '^({'x|' * 29}…'"),
    ],
)
def test_a_filter_leaves_out_rows_and_counts_them(tmp_path, wanted, kept, reason):
    rows = replace(open_rows(write_folder(tmp_path / "a")), row_filter=wanted)
    loader = make_loader(rows, ImageTransform(8), 5)
    seen = counts(read(loader, 24))
    expected = {i for i in range(60) if i % 5 in kept and (wanted.caption_pattern is None or i < 50)}
    assert set(map(int, seen)) == expected
    assert skipped_rows(loader.state_dict()) == {reason: 60 - len(expected)}
    one_pass = make_pass(rows, ImageTransform(8), 5)
    assert set(map(int, counts(one_pass))) == expected
    assert skipped_rows(one_pass.state_dict()) == {reason: 60 - len(expected)}


def test_a_filter_that_leaves_nothing_is_refused(tmp_path):
    rows = replace(open_rows(write_folder(tmp_path / "a")), row_filter=RowFilter(min_size=1000))
    with pytest.raises(ValueError, match=r"b: none of its 60 rows is used \(60: shorter side below 1000 pixels\)"):
        make_loader(Mixture((Source(rows, "b"),)), ImageTransform(8), 5)


@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 0), (1, 2)])
@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_a_bad_row_is_counted_and_the_next_of_its_bucket_stands_in(tmp_path, buckets, world_size, num_workers):
    folder = write_folder(tmp_path / "a", 120)
    for i in (5, 77):
        (folder / f"{i:03d}.png").write_bytes(b"no image")
    rows = open_rows(folder)

    def batches(world_size, num_workers, count):
        loaders = [
            make_loader(
                rows,
                ImageTransform(8 if buckets is None else 32),
                4,
                rank=rank,
                world_size=world_size,
                num_workers=num_workers,
                buckets=buckets,
            )
            for rank in range(world_size)
        ]
        iterators = list(map(iter, loaders))
        found = [next(iterators[number % world_size])["caption"] for number in range(count)]
        return found, [loader.state_dict() for loader in loaders]

    found, states = batches(world_size, num_workers, 70)
    assert found == batches(1, 0, 70)[0]
    assert all(len(batch) == 4 for batch in found)
    assert not {"5", "77"} & {caption for batch in found for caption in batch}
    assert sum(sum(skipped_rows(state).values()) for state in states) >= 2


def test_too_many_bad_rows_end_the_run(tmp_path):
    folder = write_folder(tmp_path / "a", 120)
    for i in range(0, 120, 10):
        (folder / f"{i:03d}.png").write_bytes(b"no image")
    with pytest.raises(CorruptImagesError, match="at most 5% are allowed"):
        read(make_loader(open_rows(folder), ImageTransform(8), 4), 40)
