import copy
from collections import Counter

import pytest

from improved_ldm.data import tables
from improved_ldm.data.kept_files import cached_file
from improved_ldm.data.rows import BadRowError
from improved_ldm.data.sources import CorruptImagesError, open_rows
from improved_ldm.data.stored import stored_windows
from improved_ldm.data.tally import Tally
from tests.data.sets import picture, write_parquet, write_shard


def write_set(folder, kind, count=50):
    if kind == "parquet":
        for shard in range(3):
            write_parquet(folder / f"train-{shard}.parquet", range(shard, count, 3))
    elif kind == "webdataset":
        for shard in range(3):
            write_shard(folder / f"{shard}.tar", range(shard, count, 3), lambda i: {"txt": f"row {i}".encode()})
    else:
        for i in range(count):
            (folder / f"{i:03d}.png").write_bytes(picture(i))
        lines = "".join(f'{{"file_name": "{i:03d}.png", "text": "row {i}"}}\n' for i in range(count))
        (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return open_rows(folder)


def streamed(rows):
    return [row for window in stored_windows(rows.dataset, 7, rows.is_remote) for row in window]


@pytest.fixture
def small_memory(monkeypatch, tmp_path_factory):
    """Parquet sets are read from mapped copies, in a cache of their own."""
    monkeypatch.setattr(tables, "IN_MEMORY", 0)
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    return cache


@pytest.mark.parametrize("kind", ["parquet", "webdataset", "imagefolder"])
def test_a_table_holds_the_rows_of_the_stream(tmp_path, kind):
    rows = write_set(tmp_path, kind)
    table = copy.deepcopy(rows.table())  # like the copy that a worker gets that is started anew
    assert len(table) == 50 and not table.lost
    for number, row in reversed(list(enumerate(streamed(rows)))):  # in any order
        assert table.stored(number) == row


def test_a_large_parquet_set_is_mapped_from_a_copy_that_is_written_once(tmp_path, small_memory):
    rows = write_set(tmp_path, "parquet")
    expected = streamed(rows)
    assert [rows.table().stored(number) for number in range(50)] == expected
    copies = sorted((small_memory / "improved_ldm").glob("*.arrow"))
    times = [copy.stat().st_mtime_ns for copy in copies]
    assert len(copies) == 3
    assert [rows.table().stored(number) for number in range(50)] == expected
    assert [copy.stat().st_mtime_ns for copy in copies] == times


def test_the_copy_of_a_changed_file_is_written_again(tmp_path, small_memory):
    write_parquet(tmp_path / "train.parquet", range(5))
    assert len(open_rows(tmp_path).table()) == 5
    write_parquet(tmp_path / "train.parquet", range(8))
    assert len(open_rows(tmp_path).table()) == 8


def test_a_copy_without_room_is_refused_before_it_is_written(tmp_path, small_memory, monkeypatch):
    rows = write_set(tmp_path, "parquet")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(OSError, match="GiB there to be read in any order"):
        rows.table()
    assert not list((small_memory / "improved_ldm").glob("*.arrow"))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_what_cannot_be_read_is_counted_and_the_rest_is_there(tmp_path, kind, in_memory, request):
    if not in_memory:
        request.getfixturevalue("small_memory")
    rows = write_set(tmp_path, kind)
    broken = sorted(tmp_path.iterdir())[1]
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    for _ in range(2):  # also from a kept copy
        table = rows.table()
        assert len(table.lost) == 1 and broken.name in next(iter(table.lost))
        found = Counter(table.stored(number).number[0] for number in range(len(table)))
        assert found[0] == found[2] + 1 == 17 and found[1] < 17
    Tally().lose(table.lost, table.num_shards, {})  # one is allowed
    with pytest.raises(CorruptImagesError, match="3 of 3 shards cannot be read"):
        Tally().lose({f"{number}": "shard is empty" for number in range(3)}, 3, {})


def test_a_shard_that_changes_while_it_is_read_costs_a_row(tmp_path):
    rows = write_set(tmp_path, "webdataset")
    table = rows.table()
    (tmp_path / "1.tar").write_bytes(b"x" * 5000)
    with pytest.raises(BadRowError, match="row cannot be read"):
        table.stored(20)
    assert table.stored(0).values["txt"] == b"row 0"


def test_kept_files_have_names_of_their_own(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    files = [str(tmp_path / name) for name in ("a", "b", "missing")]
    names = {cached_file(of, what, ".x") for of in (files, files[:1], files[1:]) for what in ("x", "y")}
    assert len(names) == 6
