"""Which local files are read: the user's list, and splits only if the folder's top level names them."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from improved_ldm.data.files import local_files
from improved_ldm.data.sources import RowStream, open_rows
from tests.data.sets import numbers, picture, write_parquet


def touch(root, *names):
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def chosen(root, split="train"):
    found = local_files(root, split)
    return [os.path.relpath(file, root) for file in found.files], dict(found.left_out)


WHOLE = [
    ("subjects, one called train", ["bus/1.png", "car/1.png", "train/1.png"]),
    ("subjects called as splits and others", ["dev/1.png", "test/1.png", "train/1.png", "tree/1.png"]),
    ("images called as splits", ["test.png", "train.png", "val-1.jpg"]),
    ("images beside a folder called as a split", ["a.png", "train/1.png"]),
    ("words inside names", ["crash-test-0.parquet", "crash-test-1.parquet", "model-train.parquet"]),
    ("words at the beginning of names", ["dev-ops.parquet", "test_drive.parquet", "train-station.parquet"]),
    ("a split and something else", ["extra.parquet", "train-0.parquet"]),
    ("splits and something else", ["extra.tar", "test.tar", "train.tar"]),
    ("splits below the top", ["de/test-0.parquet", "de/train-0.parquet", "en/train-0.parquet"]),
    ("folders that begin with a word", ["test images/1.tar", "train_2/1.tar"]),
    ("capital suffixes", ["A.PNG", "B.JpG", "c.WEBP"]),
    ("metadata above splits", ["metadata.jsonl", "test/1.png", "train/1.png"]),
    ("nothing that names a split", ["0.parquet", "a/b/c/1.parquet"]),
]


@pytest.mark.parametrize("files", [files for _, files in WHOLE], ids=[what for what, _ in WHOLE])
def test_a_folder_whose_top_names_no_splits_is_read_whole(tmp_path, files):
    touch(tmp_path, *files)
    assert chosen(tmp_path) == (files, {})
    with pytest.raises(ValueError, match=r"`split` is 'test'; .* has no splits; all of it is 'train'"):
        local_files(tmp_path, "test")


SPLITS = [
    ("files of the Hub", "train-00000-of-00003.parquet", "test-00000-of-00001-a09b74b3ef9c3b56.parquet"),
    ("single files", "train.parquet", "test.parquet"),
    ("folders", "train/x/1.png", "test/1.png"),
    ("folders of classes", "train/cat/1.png", "test/cat/1.png"),
    ("other words", "training/1.tar", "EVAL/1.tar"),
    ("numbered files", "train_7.tar", "testing-12.tar"),
    ("a folder around them", "data/train-0.parquet", "data/test-0.parquet"),
    ("folders around them", "a/b/Train/1.parquet", "a/b/Test/1.parquet"),
    ("folder and file", "train/1.parquet", "test.parquet"),
]


@pytest.mark.parametrize(("train", "test"), [names[1:] for names in SPLITS], ids=[names[0] for names in SPLITS])
def test_a_top_level_of_splits_alone_is_split(tmp_path, train, test):
    touch(tmp_path, train, test, "README.md", "LICENSE")
    left_out = {"of another kind (.md)": 1, "of another kind (LICENSE)": 1}
    assert chosen(tmp_path) == ([train], {**left_out, "of the split 'test'": 1})
    assert chosen(tmp_path, "test") == ([test], {**left_out, "of the split 'train'": 1})
    with pytest.raises(ValueError, match=r"`split` is 'validation'; .* has train, test"):
        local_files(tmp_path, "validation")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.text(st.characters(categories=["L", "N"], include_characters="-_. []*?'"), min_size=1, max_size=9)
        .map(str.strip)
        .filter(lambda name: name and not name.startswith((".", "__")))
        | st.sampled_from(["train", "test", "val", "dev", "eval", "train-0", "crash test"]),
        min_size=1,
        max_size=5,
        unique_by=str.lower,
    )
)
def test_every_file_is_read_or_counted(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("set")
    touch(root, *(f"{name}/{number}.tar" for number, name in enumerate(names)))
    try:
        found = local_files(root, "train")
    except ValueError as error:
        assert "`split` is 'train'" in str(error)  # reported, not dropped
        return
    assert len(found.files) + sum(found.left_out.values()) == len(names)


@pytest.mark.parametrize("name", ["[2024] photos", "what?", "a*b", "[ab]", "x[!y]"])
def test_names_with_the_signs_of_patterns(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / "a").mkdir()  # the pattern [ab] would match it
    write_parquet(tmp_path / "a" / "0.parquet", [9])
    write_parquet(tmp_path / name / "0[1].parquet", range(3))
    write_parquet(tmp_path / name / "1.parquet", range(3, 5))
    assert numbers(open_rows(tmp_path / name), shuffle_window=0) == [0, 1, 2, 3, 4]
    assert numbers(open_rows(tmp_path / name / "0[1].parquet"), shuffle_window=0) == [0, 1, 2]
    assert numbers(open_rows(str(tmp_path / name / "*.parquet")), shuffle_window=0) == [0, 1, 2, 3, 4]


def test_what_is_hidden_broken_or_of_another_kind_is_counted(tmp_path):
    write_parquet(tmp_path / "0.parquet", range(3))
    touch(tmp_path, ".DS_Store", ".ipynb_checkpoints/0-checkpoint.parquet", "__MACOSX/0.parquet", "x.csv", "y.csv")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nothing")
    rows = open_rows(tmp_path)
    assert rows.description == (
        "reading 1 file, 3 rows; left out: 1 hidden, 2 in hidden folders, 1 not a regular file, "
        "2 of another kind (.csv)"
    )
    assert rows.files == (str(tmp_path / "0.parquet"),)


def test_links_to_folders_are_followed_and_loops_end(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "elsewhere").mkdir()
    write_parquet(tmp_path / "elsewhere" / "1.parquet", range(3, 5))
    write_parquet(tmp_path / "set" / "0.parquet", range(3))
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    assert numbers(open_rows(tmp_path / "set"), shuffle_window=0) == [0, 1, 2, 3, 4]


def test_named_files_are_read_whatever_their_names_and_the_split(tmp_path):
    for number, name in enumerate(["test.parquet", "validation-0.parquet", "x.parquet"]):
        write_parquet(tmp_path / name, [number])
    files = sorted(str(file) for file in tmp_path.iterdir())
    for split in ("train", "test", "anything"):
        assert numbers(open_rows(files, split), shuffle_window=0) == [0, 1, 2]
        assert numbers(open_rows(files[0], split), shuffle_window=0) == [0]


def test_a_run_is_told_that_names_like_splits_do_not_decide(tmp_path):
    for subject in ("bus", "train"):
        (tmp_path / subject).mkdir()
        (tmp_path / subject / "1.png").write_bytes(picture(1))
        line = json.dumps({"file_name": "1.png", "text": f"a {subject}"})
        (tmp_path / subject / "metadata.jsonl").write_text(line + "\n", encoding="utf-8")
    rows = open_rows(tmp_path)
    assert sorted(row.caption for row in RowStream(rows, repeat=False)) == ["a bus", "a train"]
    assert "names such as train are not read as splits" in rows.description
    assert len(rows.files) == 4 and all(Path(file).is_absolute() for file in rows.files)
