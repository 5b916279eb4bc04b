"""Samples that are spread over a set."""

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from improved_ldm.data.shards import LOST
from improved_ldm.data.sources import open_rows
from improved_ldm.data.spread import count_rows, spread_rows
from improved_ldm.data.stored import stored_windows

PNG = io.BytesIO()
Image.new("RGB", (2, 2)).save(PNG, "PNG")


def write_parquet(file: Path, captions: list[str], rows_per_group: int):
    images = [{"bytes": PNG.getvalue(), "path": None}] * len(captions)
    pq.write_table(pa.table({"image": images, "text": captions}), file, row_group_size=rows_per_group)


def captions(rows) -> list[str]:
    return list(rows.captions())


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    count=st.integers(1, 200),
    rows_per_group=st.integers(1, 50),
)
def test_a_sample_of_parquet_files_reaches_both_ends(tmp_path_factory, lengths, count, rows_per_group):
    folder, total = tmp_path_factory.mktemp("set"), sum(lengths)
    numbers = iter(range(total))
    for place, length in enumerate(lengths):
        write_parquet(folder / f"{place}.parquet", [str(next(numbers)) for _ in range(length)], rows_per_group)
    rows = open_rows(folder)
    found = [int(caption) for caption in captions(spread_rows(rows, count))]
    assert count_rows(rows) == total
    assert len(found) == min(count, total)
    assert found == sorted(set(found))
    assert found[0] == 0
    assert count == 1 or found[-1] == total - 1


def test_a_sample_has_all_columns_of_captions_and_the_classes_of_a_template(tmp_path):
    several = {
        "short": [f"s{i}" for i in range(60)],
        "long": [f"l{i}" for i in range(60)],
        "label": ["cat", None] * 30,
    }
    pq.write_table(
        pa.table({"image": [{"bytes": PNG.getvalue(), "path": None}] * 60, **several}), tmp_path / "a.parquet"
    )
    rows = open_rows(tmp_path, caption_column=["short", "long"])
    assert captions(spread_rows(rows, 5))[:2] == ["s0", "l0"]
    rows = open_rows(tmp_path, caption_column="none", label_column="label", caption_template="a {label}")
    assert set(captions(spread_rows(rows, 5))) == {"a cat"}


def test_a_damaged_file_of_a_sampled_set_is_reported(tmp_path):
    write_parquet(tmp_path / "a.parquet", ["a"] * 50, 10)
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    sample = spread_rows(open_rows(tmp_path), 8)
    stored = [row for window in stored_windows(sample.dataset, 4, is_remote=False) for row in window]
    assert [row.place for row in stored if LOST in row.values] == [str(tmp_path / "b.parquet")]
    assert len(stored) == 9


@pytest.mark.parametrize("shards, each", [(3, 4), (40, 1)])
def test_a_sample_of_shards_has_the_first_rows_of_shards_from_all_over(tmp_path, shards, each):
    for shard in range(shards):
        with tarfile.open(tmp_path / f"{shard:02d}.tar", "w") as tar:
            for number in range(5):
                for kind, content in (("png", PNG.getvalue()), ("txt", f"{shard}.{number}".encode())):
                    member = tarfile.TarInfo(f"{number}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    rows = open_rows(tmp_path)
    sample = spread_rows(rows, 12)
    found = captions(sample)
    assert count_rows(rows) is None
    assert len(found) == 12
    assert {caption.split(".")[0] for caption in found} >= {"0", str(shards - 1)}
    assert {caption.split(".")[1] for caption in found} == {str(number) for number in range(each)}
    assert f"of {shards} files" in sample.description


@pytest.mark.parametrize("table", ["side files", "table.jsonl", "table.csv", "table.parquet", "metadata.jsonl"])
def test_a_sample_of_a_folder_of_images_is_spread_whatever_describes_them(tmp_path, table):
    names = [f"{number:02}.png" for number in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(PNG.getvalue())
        if table == "side files":
            (tmp_path / name).with_suffix(".txt").write_text(name, encoding="utf-8")
    lines = pa.table({"file_name": names, "text": names})
    if table.endswith(".parquet"):
        pq.write_table(lines, tmp_path / table)
    elif table.endswith(".csv"):
        lines.to_pandas().to_csv(tmp_path / table, index=False)
    elif table.endswith(".jsonl"):
        lines.to_pandas().to_json(tmp_path / table, orient="records", lines=True)
    rows = open_rows(tmp_path)
    assert count_rows(rows) == 40
    sample = spread_rows(rows, 5)
    assert captions(sample) == ["00.png", "10.png", "20.png", "29.png", "39.png"]
    assert all(stored["image"]["path"] for (stored, *_), *_ in stored_windows(sample.dataset, 1, is_remote=False))


def test_a_sample_of_shards_keeps_the_members_of_each_sample(tmp_path):
    members = [{"jpg": b"a", "txt": b"1"}, {"png": b"b"}, {"webp": b"c", "json": b"{}"}]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number, sample in enumerate(members):
                for suffix, content in sample.items():
                    header = tarfile.TarInfo(f"{number}.{suffix}")
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    rows = open_rows(tmp_path)
    found = [stored.values for window in stored_windows(spread_rows(rows, 6).dataset, 64, False) for stored in window]
    assert [{key: value for key, value in row.items() if key != "__key__"} for row in found] == members * 2
