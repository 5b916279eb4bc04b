import io
import json
import logging
import tarfile
from pathlib import Path
from random import Random

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from improved_ldm.data.samples import make_loader
from improved_ldm.data.sources import CorruptImagesError, RowStream, open_rows, read_image
from improved_ldm.data.transforms import ImageTransform

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def encode(image, kind="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(index, size=(6, 5)):
    """An image whose colour tells its row."""
    return encode(Image.new("RGB", size, (index % 256, index // 256, 7)))


def write_parquet(path, indices, damaged=(), row_group=7):
    images = [{"bytes": b"no image" if i in damaged else picture(i), "path": None} for i in indices]
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["even", "odd"]),
        }
    )
    table = pa.table(
        {"image": images, "text": [f"row {i}" for i in indices], "label": [i % 2 for i in indices]},
        schema=features.arrow_schema,
    )
    pq.write_table(table, path, row_group_size=row_group)


def number(row):
    """The row's index, read from its pixels."""
    red, green, _ = row.image.getpixel((0, 0))
    return red + 256 * green


def numbers(rows, **arguments):
    return [number(row) for row in RowStream(rows, repeat=False, **arguments)]


@pytest.fixture
def folder(tmp_path):
    """60 rows in three uneven files, in groups that no window divides."""
    for shard, (start, stop) in enumerate([(0, 25), (25, 30), (30, 60)]):
        write_parquet(tmp_path / f"train-{shard:05d}-of-00003.parquet", range(start, stop))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", range(100, 104))
    (tmp_path / "README.md").write_text("A set.")
    return tmp_path


# --- where rows come from


def test_embedded_set():
    rows = open_rows("embedded:fashion-mnist", label_column="label")
    assert len(rows.class_names) == 10 and rows.class_names[9] == "Ankle boot"
    row = next(iter(RowStream(rows)))
    assert row.image.mode == "RGB" and row.size == (28, 28) and row.caption and 0 <= row.label < 10
    test = open_rows("embedded:fashion-mnist", split="test", caption_column=None, label_column="label")
    labels = [row.label for row in RowStream(test, repeat=False)]
    assert np.bincount(labels).tolist() == [200] * 10


def test_embedded_set_is_an_ordinary_dataset():
    import improved_ldm

    folder = Path(improved_ldm.__file__).parent / "assets" / "fashion-mnist"
    train = datasets.load_dataset(str(folder), split="train", streaming=True)
    assert train.features["label"].names[0] == "T-shirt/top"
    assert next(iter(train))["image"].size == (28, 28)


def test_parquet_folder_and_its_splits(folder):
    rows = open_rows(folder, label_column="label")
    assert numbers(rows, shuffle_window=0) == list(range(60))
    assert rows.class_names == ["even", "odd"]
    row = next(iter(RowStream(rows, shuffle_window=0)))
    assert (row.caption, row.label, row.size) == ("row 0", 0, (5, 6))
    assert numbers(open_rows(folder, split="test"), shuffle_window=0) == [100, 101, 102, 103]
    with pytest.raises(ValueError, match=r"`split` is 'validation'.*train, test"):
        open_rows(folder, split="validation")


def test_one_file_a_glob_and_a_list_of_files(folder):
    files = sorted(str(file) for file in folder.glob("train-*"))
    assert numbers(open_rows(files[1]), shuffle_window=0) == list(range(25, 30))
    assert numbers(open_rows(str(folder / "train-*.parquet")), shuffle_window=0) == list(range(60))
    assert numbers(open_rows(files[1:]), shuffle_window=0) == list(range(25, 60))


def write_shard(path, indices, captions):
    with tarfile.open(path, "w") as tar:
        for i in indices:
            for suffix, content in {"png": picture(i), **captions(i)}.items():
                member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def test_webdataset_shards_with_text_and_class_files(tmp_path):
    for shard in range(2):
        write_shard(
            tmp_path / f"{shard:05d}.tar",
            range(shard * 9, shard * 9 + 9),
            lambda i: {"txt": f"row {i}".encode(), "cls": str(i % 3).encode()},
        )
    rows = list(RowStream(open_rows(tmp_path, label_column="label"), repeat=False, shuffle_window=0))
    assert [(number(row), row.caption, row.label) for row in rows] == [(i, f"row {i}", i % 3) for i in range(18)]
    named = open_rows(sorted(map(str, tmp_path.glob("*.tar"))), image_column="png", caption_column="txt")
    assert sorted(numbers(named, shuffle_window=4)) == list(range(18))


def test_webdataset_shards_with_json_files(tmp_path):
    write_shard(
        tmp_path / "a.tar",
        range(8),
        lambda i: {"json": json.dumps({"caption": f"row {i}", "label": i, "title": f"t{i}"}).encode()},
    )
    rows = list(RowStream(open_rows(tmp_path, label_column="label"), repeat=False, shuffle_window=0))
    assert [(row.caption, row.label) for row in rows] == [(f"row {i}", i) for i in range(8)]
    titled = open_rows(tmp_path, caption_column="json.title")
    assert next(iter(RowStream(titled, shuffle_window=0))).caption == "t0"
    with pytest.raises(ValueError, match=r"caption_column.*json\.name.*png"):
        open_rows(tmp_path, caption_column="json.name")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_image_folder_with_captions(tmp_path, kind):
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "README.md").write_text("Pictures.")
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"row {i}"}) for i in range(5)]
    else:
        lines = ["file_name,text", *(f"{i}.png,row {i}" for i in range(5))]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n")
    rows = list(RowStream(open_rows(tmp_path), repeat=False, shuffle_window=0))
    assert [(number(row), row.caption) for row in rows] == [(i, f"row {i}") for i in range(5)]


def test_image_folder_with_a_folder_a_class(tmp_path):
    for i in range(6):
        (tmp_path / ("cat" if i % 2 else "dog")).mkdir(exist_ok=True)
        (tmp_path / ("cat" if i % 2 else "dog") / f"{i}.png").write_bytes(picture(i))
    rows = open_rows(tmp_path, caption_column=None, label_column="label")
    assert rows.class_names == ["cat", "dog"]
    assert {(number(row), row.label) for row in RowStream(rows, repeat=False)} == {(i, 1 - i % 2) for i in range(6)}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared sets are not on this machine")
@pytest.mark.parametrize("name, size", [("emoji-512", (512, 512)), ("stamps", None)])
def test_captioned_sets_on_disk(name, size):
    rows = iter(RowStream(open_rows(SHARED / name), shuffle_window=0))
    first = [next(rows) for _ in range(20)]
    assert all(row.caption and row.image.mode == "RGB" for row in first)
    assert size is None or size in {row.size for row in first}


# --- what is refused


def test_missing_column_names_the_columns_that_exist(folder):
    with pytest.raises(ValueError, match=r"`caption_column` is 'caption'; the set has the columns image, text, label"):
        open_rows(folder, caption_column="caption")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"label_column": "text"}, r"`label_column` is 'text'; it must hold integers, not str"),
        ({"image_column": "text"}, r"`image_column` is 'text'; it must hold encoded images"),
        ({"caption_column": "label"}, r"`caption_column` is 'label'; it must hold strings"),
        ({"name": "small"}, r"`name` is 'small'"),
    ],
)
def test_columns_of_the_wrong_kind(folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_rows(folder, **arguments)


def test_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        open_rows(tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match="glob matches nothing"):
        open_rows(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match="no files"):
        open_rows(tmp_path)
    (tmp_path / "notes.txt").write_text("no images")
    with pytest.raises(ValueError, match=r"\.parquet files, \.tar shards or images.*it holds \.txt"):
        open_rows(tmp_path)
    write_parquet(tmp_path / "train.parquet", [])
    with pytest.raises(ValueError, match="no rows"):
        open_rows(tmp_path)
    with pytest.raises(ValueError, match="embedded:fashion-mnist"):
        open_rows("embedded:mnist")


def test_more_readers_than_rows(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(2))
    rows = open_rows(tmp_path)
    assert numbers(rows, rank=2, world_size=3) == []
    with pytest.raises(ValueError, match="fewer rows"):
        next(iter(RowStream(rows, rank=2, world_size=3)))


def test_wrong_stream_arguments(folder):
    rows = open_rows(folder)
    with pytest.raises(ValueError, match="shuffle_window"):
        RowStream(rows, shuffle_window=-1)
    with pytest.raises(ValueError, match="rank"):
        RowStream(rows, rank=2, world_size=2)


# --- unreadable images


def test_few_unreadable_images_are_skipped_and_counted(tmp_path, caplog):
    write_parquet(tmp_path / "train.parquet", range(150), damaged={3, 70, 149})
    stream = RowStream(open_rows(tmp_path), repeat=False)
    with caplog.at_level(logging.WARNING, "improved_ldm.data.sources"):
        seen = sorted(number(row) for row in stream)
    assert seen == sorted(set(range(150)) - {3, 70, 149})
    assert stream.state_dict()["corrupt"] == 3
    assert "3 of 150 images of this pass" in caplog.text


def test_many_unreadable_images_stop_the_run(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(300), damaged=set(range(0, 300, 15)))
    stream = RowStream(open_rows(tmp_path))
    with pytest.raises(CorruptImagesError, match="5%"):
        list(stream)
    assert 100 <= stream.state_dict()["seen"] < 300


def test_small_set_is_judged_at_the_end_of_a_pass(tmp_path):
    write_parquet(tmp_path / "train.parquet", range(10), damaged={4})
    rows = iter(RowStream(open_rows(tmp_path), shuffle_window=0))
    assert [number(next(rows)) for _ in range(9)] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    with pytest.raises(CorruptImagesError, match="1 of 10"):
        next(rows)


# --- decoding


def test_transparent_pixels_become_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((0, 0), (0, 0, 255, 255))
    decoded, _ = read_image(encode(image))
    assert decoded.getpixel((3, 3)) == (255, 255, 255) and decoded.getpixel((0, 0)) == (0, 0, 255)
    palette = Image.new("P", (2, 2))
    assert read_image(encode(palette, transparency=0))[0].getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_images_are_scaled():
    image = Image.fromarray(np.full((3, 3), 0x8000, dtype=np.uint16))
    assert read_image(encode(image))[0].getpixel((0, 0)) == (128, 128, 128)


def test_photos_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image = Image.new("RGB", (64, 32))
    decoded, size = read_image(encode(image, "jpeg", exif=exif), min_size=(30, 15))
    assert size == (64, 32) and decoded.size == (16, 32)


def test_jpeg_is_decoded_no_larger_than_needed():
    y, x = np.mgrid[0:400, 0:600]
    image = Image.fromarray(np.stack([x // 3, y // 2, x // 4], -1).astype(np.uint8))
    encoded = encode(image, "jpeg", quality=95)
    small, size = read_image(encoded, min_size=(90, 120))
    assert size == (400, 600) and small.size == (150, 100)
    transform = ImageTransform(64, "crop_then_resize")
    whole, _ = transform(read_image(encoded)[0], Random(0))
    reduced, control = transform(small, Random(0), size)
    assert control.original_size == (400, 600)
    assert (whole - reduced).abs().max() < 6 / 127.5


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
        loader = make_loader(
            rows,
            ImageTransform(4),
            7,
            shuffle_window=8,
            repeat=False,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        seen += [caption for batch in loader for caption in batch["caption"]]
    assert sorted(seen) == sorted(f"row {i}" for i in range(60))


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
    for _ in range(40):  # in the second pass, whose shards come in another order
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
            assert torch.equal(again[key], batch[key])


def test_loader_leaves_the_global_generator_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batch = next(iter(make_loader(open_rows(folder, label_column="label"), ImageTransform(8), 5)))
    assert torch.equal(torch.get_rng_state(), before)
    assert batch["pixels"].shape == (5, 3, 8, 8) and batch["control"].shape == (5, 9)
    assert batch["label"].shape == (5,) and len(batch["caption"]) == 5


def test_state_of_another_layout_is_refused(folder):
    rows = open_rows(folder)
    state = RowStream(rows, world_size=2).state_dict()
    with pytest.raises(ValueError, match="readers"):
        RowStream(rows).load_state_dict(state)


def test_a_second_iteration_starts_over(folder):
    stream = RowStream(open_rows(folder), repeat=False)
    assert [number(row) for row in stream] == [number(row) for row in stream]
