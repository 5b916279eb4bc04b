"""Shards that are truncated, empty, or disappear while they are read."""

import errno
import gzip
import logging

import pytest

from improved_ldm.data.shards import LOST, NO_END_MARK, rows_of_shards
from improved_ldm.data.sources import CorruptImagesError, RowStream, open_rows
from tests.data.sets import number, numbers, write_parquet, write_shard

ROWS = 20  # a shard


def write_set(folder, kind, shards):
    for shard in range(shards):
        indices = range(shard * ROWS, (shard + 1) * ROWS)
        if kind == "parquet":
            write_parquet(folder / f"{shard}.parquet", indices)
        else:
            write_shard(folder / f"{shard}.tar", indices, lambda i: {"txt": f"row {i}".encode()})


def damage(file, how):
    if how == "deleted":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[: file.stat().st_size // 2 + 100])


REASONS = {
    "cut": "shard is damaged or cut short",
    "empty": "shard is empty",
    "deleted": "shard is not there",
}


@pytest.mark.parametrize("kept", range(1, 40))
def test_a_tar_cut_anywhere_is_counted(tmp_path, kept):
    write_set(tmp_path, "tar", 3)
    rows, file = open_rows(tmp_path), tmp_path / "1.tar"
    file.write_bytes(file.read_bytes()[: kept * 509 + 1])
    stream = RowStream(rows, repeat=False)
    assert set(range(ROWS)) <= {number(row) for row in stream}
    assert stream.state_dict()["skipped_rows"][REASONS["cut"]] == 1


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("improved_ldm.data.shards.PAUSES", (0, 0))


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_one_bad_shard_of_many_costs_its_own_rows(tmp_path, kind, how, caplog):
    write_set(tmp_path, kind, 5)
    rows = open_rows(tmp_path)
    bad = tmp_path / f"2.{kind}"
    damage(bad, how)
    stream = RowStream(rows, shuffle_window=8, repeat=False)
    read = [number(row) for row in stream]
    others = {index for index in range(5 * ROWS) if index // ROWS != 2}
    assert others <= set(read) and len(read) == len(set(read)) < 5 * ROWS
    assert stream.state_dict()["skipped_rows"][REASONS[how]] == 1
    assert f"skipped {bad}" in caplog.text and f"{REASONS[how]}; 1 of 5 shards so far" in caplog.text
    if how == "deleted":
        assert "it is opened again in 0 s" in caplog.text


@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_damage_leaves_the_order_of_the_others_and_their_resumption(tmp_path, kind, how):
    write_set(tmp_path, kind, 5)
    rows = open_rows(tmp_path)
    damage(tmp_path / f"3.{kind}", how)
    whole = numbers(rows, shuffle_window=8)
    for place in (1, len(whole) // 2, len(whole) - 2):
        stream = RowStream(rows, shuffle_window=8, repeat=False)
        for _, row in zip(range(place), stream, strict=False):
            assert row
        resumed = RowStream(rows, shuffle_window=8, repeat=False)
        resumed.load_state_dict(stream.state_dict())
        assert [number(row) for row in resumed] == whole[place:]
        assert resumed.state_dict()["skipped_rows"][REASONS[how]] == 1


@pytest.mark.parametrize("how", ["cut", "empty"])
@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_set_whose_first_shard_is_bad_opens(tmp_path, kind, how):
    write_set(tmp_path, kind, 5)
    damage(tmp_path / f"0.{kind}", how)
    assert {index for index in numbers(open_rows(tmp_path)) if index >= ROWS} == set(range(ROWS, 5 * ROWS))


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_a_set_whose_only_shard_is_empty_does_not_open(tmp_path, kind):
    (tmp_path / f"0.{kind}").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"0\.{kind}") as raised:
        open_rows(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_too_many_bad_shards_end_the_run_and_are_named(tmp_path, kind):
    write_set(tmp_path, kind, 5)
    rows = open_rows(tmp_path)
    for shard in (1, 4):
        damage(tmp_path / f"{shard}.{kind}", "empty")
    with pytest.raises(CorruptImagesError, match="2 of 5 shards cannot be read") as raised:
        numbers(rows)
    assert all(str(tmp_path / f"{shard}.{kind}") in str(raised.value) for shard in (1, 4))


def test_a_set_that_is_gone_ends_the_run(tmp_path):
    write_set(tmp_path, "tar", 1)
    rows = open_rows(tmp_path)
    damage(tmp_path / "0.tar", "deleted")
    with pytest.raises(CorruptImagesError, match=r"1 of 1 shards cannot be read: .*0\.tar"):
        numbers(rows)


def test_a_shard_that_comes_back_loses_nothing(tmp_path, caplog):
    """A file that is restored when the first failure is reported."""
    write_set(tmp_path, "tar", 3)
    rows = open_rows(tmp_path)
    (tmp_path / "1.tar").rename(tmp_path / "away")

    class PutBack(logging.Handler):
        def emit(self, record):
            (tmp_path / "away").rename(tmp_path / "1.tar")

    handler = PutBack()
    logging.getLogger("improved_ldm.data.shards").addHandler(handler)
    try:
        assert sorted(numbers(rows)) == list(range(3 * ROWS))
    finally:
        logging.getLogger("improved_ldm.data.shards").removeHandler(handler)
    assert "1.tar fails (No such file or directory); it is opened again in 0 s" in caplog.text


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOENT])
def test_rows_are_given_once_around_a_failure_that_passes(code):
    failures = iter([True, True, False])

    def read(file):
        yield from ({"row": {"n": n}, "place": str(n)} for n in range(4))
        if next(failures):
            raise OSError(code, "away")
        yield {"row": {"n": 4}, "place": "4"}

    assert [row["row"]["n"] for row in rows_of_shards(["file"], [0], read)] == [0, 1, 2, 3, 4]


def test_a_failure_that_lasts_is_told_in_a_row():
    def read(file):
        yield {"row": {}, "place": "0"}
        raise OSError(errno.EIO, "Input/output error")

    *_, last = rows_of_shards(["file"], [0], read)
    assert last == {
        "row": {LOST: "shard cannot be read: Input/output error"},
        "place": "file, all after row 1",
        "number": [0, 1],
    }


def end_of_members(whole):
    """The offset of the end marker of a tar file."""
    return -(-len(whole.rstrip(b"\0")) // 512) * 512


def test_a_tar_that_is_cut_between_members_is_said_and_counted(tmp_path, caplog):
    write_set(tmp_path, "tar", 1)
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: end_of_members(whole)])
    stream = RowStream(open_rows(tmp_path), shuffle_window=0, repeat=False)
    assert [number(row) for row in stream] == list(range(ROWS))
    assert stream.state_dict()["skipped_rows"] == {NO_END_MARK: 1}
    assert f"0.tar, all after its last sample: {NO_END_MARK}; 1 of 1 shards so far" in caplog.text


def damaged_header(whole):
    place = whole.index(b"000030.png") // 512 * 512
    return whole[:place] + b"X" + whole[place + 1 :]


def zeros_in_the_middle(whole):
    place = whole.index(b"000030.png") // 512 * 512
    return whole[:place] + bytes(512) + whole[place + 512 :]


@pytest.mark.parametrize("change", [damaged_header, zeros_in_the_middle, lambda whole: whole + whole])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_no_damage_inside_a_tar_is_taken_for_its_end(tmp_path, change, pack):
    write_set(tmp_path, "tar", 3)
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(pack(change(whole)))
    stream = RowStream(open_rows(tmp_path), repeat=False)
    assert {*range(ROWS), *range(2 * ROWS, 3 * ROWS)} <= {number(row) for row in stream}
    assert stream.state_dict()["skipped_rows"] == {REASONS["cut"]: 1}


@pytest.mark.parametrize("rows", [1, ROWS])
def test_a_packed_tar_is_read(tmp_path, rows):
    write_shard(tmp_path / "0.tar", range(rows), lambda i: {"txt": b"x"})
    (tmp_path / "0.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    stream = RowStream(open_rows(tmp_path), shuffle_window=0, repeat=False)
    assert [number(row) for row in stream] == list(range(rows))
    assert stream.state_dict()["skipped_rows"] == {}


@pytest.mark.parametrize("part", [0.2, 0.4, 0.6, 0.8])
def test_a_packed_tar_that_is_cut_is_counted(tmp_path, part):
    write_set(tmp_path, "tar", 3)
    packed = gzip.compress((tmp_path / "1.tar").read_bytes())
    (tmp_path / "1.tar").write_bytes(packed[: int(part * len(packed))])
    stream = RowStream(open_rows(tmp_path), repeat=False)
    assert {*range(ROWS), *range(2 * ROWS, 3 * ROWS)} <= {number(row) for row in stream}
    assert {REASONS["cut"], NO_END_MARK} & stream.state_dict()["skipped_rows"].keys()
