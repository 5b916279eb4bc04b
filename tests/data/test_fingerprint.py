import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.data.fingerprint import data_changes, data_fingerprint, place_files

NAMES = ("a.parquet", "b.parquet", "part [1].parquet", "what?.parquet", "all*.parquet")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "below").mkdir()
    for name in NAMES:
        (tmp_path / "below" / name).write_bytes(name.encode())
    return tmp_path


def fingerprint(folder: Path) -> dict:
    return data_fingerprint(str(folder), [str(file) for file in place_files(str(folder))])


def change(folder: Path):
    (folder / "below" / "a.parquet").write_bytes(b"longer than it was")


def touch(folder: Path):
    os.utime(folder / "below" / "b.parquet", ns=(1, 1))


def add(folder: Path):
    for name in ("y.parquet", "z.parquet"):
        (folder / name).write_bytes(b"")


def remove(folder: Path):
    (folder / "below" / "what?.parquet").unlink()


def replace(folder: Path):
    remove(folder)
    add(folder)


@pytest.mark.parametrize(
    ("do", "said"),
    [
        (change, "1 file changed (below/a.parquet)"),
        (touch, "1 file changed (below/b.parquet)"),
        (add, "2 files added (y.parquet, …)"),
        (remove, "1 file removed (below/what?.parquet)"),
        (replace, "2 files added (y.parquet, …), 1 file removed (below/what?.parquet)"),
    ],
    ids=lambda part: getattr(part, "__name__", ""),
)
def test_changes_of_a_folder_are_counted(folder, do, said):
    (folder / "x.parquet").write_bytes(b"")  # so that names are relative to the folder itself
    before = fingerprint(folder)
    assert data_changes(before, fingerprint(folder)) is None
    do(folder)
    assert data_changes(before, fingerprint(folder)) == said


@pytest.mark.parametrize("name", ["none.png", "\0.png", "\ud800.png", "x" * 5000])
def test_a_file_that_is_not_there_has_no_stamp_until_it_comes(folder, name):
    files = [str(folder / "below" / known) for known in NAMES]
    before = data_fingerprint(str(folder), files)
    assert data_fingerprint(str(folder), [*files, str(folder / "below" / name)]) == before
    (folder / "below" / "c.png").write_bytes(b"")
    now = data_fingerprint(str(folder), [*files, str(folder / "below" / "c.png")])
    assert data_changes(before, now) == "1 file added (c.png)"


def test_a_set_that_lies_elsewhere_is_the_same(folder, tmp_path_factory):
    before = fingerprint(folder)
    assert data_changes(before, fingerprint(folder.rename(tmp_path_factory.mktemp("other") / "place"))) is None


def test_an_embedded_set_and_an_unknown_commit_are_never_changed():
    assert data_fingerprint("embedded:fashion-mnist", ["a.parquet"]) == {}
    assert data_changes({"revision": None}, {"revision": "a"}) is None
    assert data_changes({}, {"files": {}}) is None
    assert "was aaaa and is bbbb" in data_changes({"revision": "aaaa"}, {"revision": "bbbb"})


def test_offline_a_set_on_the_hub_has_no_commit():
    assert data_fingerprint("someone/something") == {"revision": None}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_there_is_taken_by_its_name(folder, name):
    assert place_files(str(folder / "below" / name)) == [folder / "below" / name]
    assert len(place_files(str(folder / "below" / "*.parquet"))) == len(NAMES)


@given(st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(0, 3)), st.data())
def test_counts_are_those_of_the_difference(old, data):
    new = data.draw(st.dictionaries(st.sampled_from([*old, "new"]), st.integers(0, 3)))
    said = data_changes(
        {"files": {name: [1, time] for name, time in old.items()}}, {"files": {n: [1, t] for n, t in new.items()}}
    )
    assert (said is None) == (old == new)
