import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from improved_ldm.data.sources import RowStream, open_rows
from tests.data.sets import number, numbers, picture, write_parquet, write_shard

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


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
    (tmp_path / "README.md").write_text("Pictures.", encoding="utf-8")
    if kind == "jsonl":
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"row {i}"}) for i in range(5)]
    else:
        lines = ["file_name,text", *(f"{i}.png,row {i}" for i in range(5))]
    (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n", encoding="utf-8")
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


def test_a_set_without_any_of_the_columns_is_not_an_empty_set(folder):
    with pytest.raises(ValueError, match=r"`image_column` is 'jpg'; the set has the columns image, text, label"):
        open_rows(folder, image_column="jpg", caption_column="txt")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"label_column": "text"},
            r"`label_column` is 'text'; it must hold integers or the names of classes; 64 of its 64 values",
        ),
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
    with pytest.raises(FileNotFoundError, match="as a glob it matches nothing"):
        open_rows(str(tmp_path / "*.parquet"))
    with pytest.raises(ValueError, match="no files"):
        open_rows(tmp_path)
    (tmp_path / "notes.txt").write_text("no images", encoding="utf-8")
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
    shares = [RowStream(rows, shuffle_window=0, rank=rank, world_size=3) for rank in range(3)]
    assert [number(next(iter(share))) for share in shares] == [0, 1, 0]  # the third reader begins with the second pass


def test_wrong_stream_arguments(folder):
    rows = open_rows(folder)
    with pytest.raises(ValueError, match="shuffle_window"):
        RowStream(rows, shuffle_window=-1)
    with pytest.raises(ValueError, match="rank"):
        RowStream(rows, rank=2, world_size=2)
