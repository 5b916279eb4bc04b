"""Folders of images with metadata or with one folder per class."""

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_ldm.data.metadata import read_metadata
from improved_ldm.data.sources import RowStream, open_rows
from tests.data.sets import picture


def line(number, text="x", **more):
    return json.dumps({"file_name": f"{number}.png", "text": text, **more}, ensure_ascii=False)


def write(folder, lines, images=4, name="metadata.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        (folder / f"{number}.png").write_bytes(picture(number))
    content = lines if isinstance(lines, bytes) else "\n".join(lines).encode()
    (folder / name).write_bytes(content)
    return folder


def captions(folder, **arguments):
    return [row.caption for row in RowStream(open_rows(folder, **arguments), shuffle_window=0, repeat=False)]


DAMAGED = [
    ("cut last line", [line(0), line(1)[:-9]], "line 2: it must be a JSON object"),
    ("integer caption", [line(0), line(1), line(2, 7)], "line 3: 'text' is 7; a caption must be a string"),
    ("list of other values", [line(0, ["a", 7])], r"line 1: 'text' is \['a', 7\]"),
    ("empty", b"", "line 1: the file is empty"),
    ("blank", b"\n \n", "line 1: the file is empty"),
    ("no file_name", [line(0), json.dumps({"text": "x"})], "line 2: `file_name` is None"),
    ("numeric file_name", [json.dumps({"file_name": 3, "text": "x"})], "line 1: `file_name` is 3"),
    ("path outside", [json.dumps({"file_name": "../a.png", "text": "x"})], r"line 1: `file_name` is '\.\./a\.png'"),
    ("no object", [line(0), "[1, 2]"], "line 2: it must be a JSON object, not list"),
    ("not UTF-8", line(0).encode() + b'\n{"file_name": "1.png", "text": "caf\xe9"}', "line 2: it must be UTF-8"),
    ("not UTF-8 at all", line(0).encode("utf-16"), "line 1: it must be UTF-8"),
]


@pytest.mark.parametrize(("lines", "message"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_damaged_metadata_is_refused_with_its_file_and_line(tmp_path, lines, message):
    write(tmp_path, lines)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, {message}"):
        open_rows(tmp_path)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file_name,text", "0.png,x", "1.png"], "line 3: it has 1 of 2 fields"),
        (["file_name,text", "0.png,x,y"], "line 2: it has 3 of 2 fields"),
        (["file_name,text", '0.png,"x', "1.png,y"], "line 3: unexpected end of data"),
        (["name,text", "0.png,x"], "line 2: `file_name` is None"),
        (["file_name,text,text", "0.png,x,y"], "line 1: it must name each column once; 'text' is listed twice"),
    ],
)
def test_a_damaged_table_is_refused_with_its_file_and_line(tmp_path, lines, message):
    write(tmp_path, lines, name="metadata.csv")
    with pytest.raises(ValueError, match=rf"metadata\.csv, {message}"):
        open_rows(tmp_path)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), min_size=1, max_size=4))
def test_any_text_comes_back_from_json_lines(tmp_path_factory, texts):
    file = tmp_path_factory.mktemp("set") / "metadata.jsonl"
    file.write_bytes("".join(line(number, text) + "\n" for number, text in enumerate(texts)).encode())
    assert [record["text"] for _, record in read_metadata(file)] == texts


def test_separators_blank_lines_and_byte_order_marks(tmp_path):
    texts = ["a\u2028b", "c\u2029d", "e\x85f", "g"]
    content = "\ufeff" + "\n\n".join(line(number, text) for number, text in enumerate(texts)) + "\r\n\n"
    write(tmp_path, content.encode())
    assert captions(tmp_path) == texts


def test_a_table_keeps_captions_as_text(tmp_path):
    rows = ["file_name,text,label,other", '0.png,"two\nlines",0,', "1.png,7,1,x", "2.png,NA,1,", '3.png,"a ""b""",0,']
    write(tmp_path, rows, name="metadata.csv")
    read = list(RowStream(open_rows(tmp_path, label_column="label"), shuffle_window=0, repeat=False))
    assert [(row.caption, row.label) for row in read] == [("two\nlines", 0), ("7", 1), ("NA", 1), ('a "b"', 0)]


def test_a_table_may_hold_long_captions_and_begin_with_blank_lines(tmp_path):
    write(tmp_path, ["", "file_name,text", f"0.png,{'x' * 200_000}"], name="metadata.csv")
    assert captions(tmp_path) == ["x" * 200_000]


@pytest.mark.parametrize("label", ["9" * 5000, "٣", "x", "1.0", ""])
def test_a_label_of_a_table_that_is_no_integer_costs_its_row_only(tmp_path, label):
    rows = ["file_name,text,label", *(f"{n}.png,x,{n}" for n in range(40)), f"40.png,x,{label}"]
    write(tmp_path, rows, images=41, name="metadata.csv")
    stream = RowStream(open_rows(tmp_path, label_column="label"), shuffle_window=0, repeat=False)
    assert [row.label for row in stream] == list(range(40))
    assert stream.state_dict()["skipped_rows"] == {"label is not an integer": 1}


def test_what_metadata_and_images_lack_is_said(tmp_path):
    lines = [*(line(number) for number in range(30)), line(0, "again"), json.dumps({"file_name": "30.png"}), line(99)]
    rows = open_rows(write(tmp_path, lines, images=34))
    assert "3 of 34 images without a line in metadata.jsonl" in rows.description
    assert "1 line of metadata.jsonl for an image that has an earlier line" in rows.description
    assert "1 line of metadata.jsonl for an image that does not exist" in rows.description
    assert set(map(str, [tmp_path / "metadata.jsonl", tmp_path / "30.png"])) < set(rows.files)
    stream = RowStream(rows, shuffle_window=0, repeat=True)
    iterator = iter(stream)
    read = [next(iterator) for _ in range(32)]
    assert [row.caption for row in read] == ["x"] * 30 + ["again", ""]
    assert read[-1].image.getpixel((0, 0))[0] == 30


def test_metadata_in_folders_with_fields_that_differ(tmp_path):
    write(tmp_path / "bus", [line(0, "a bus", score=1)])
    write(tmp_path / "train", [line(0, "a train", score="high", tags=[1])])
    assert captions(tmp_path) == ["a bus", "a train"]


def classes(root, **images):
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number}.png").write_bytes(picture(number))


def test_an_empty_class_folder_keeps_its_number(tmp_path):
    classes(tmp_path, bird=1, cat=0, dog=2)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("no images", encoding="utf-8")
    rows = open_rows(tmp_path, caption_column=None, label_column="label")
    assert rows.class_names == ["bird", "cat", "dog"]
    assert [row.label for row in RowStream(rows, shuffle_window=0, repeat=False)] == [0, 2, 2]
    assert "no images in the class folder cat, which keeps its number" in rows.description
    assert "notes holds other files and is not a class" in rows.description


def test_splits_number_their_classes_alike(tmp_path):
    classes(tmp_path / "train", bird=1, cat=1, dog=1)
    classes(tmp_path / "test", cat=1, dog=1)
    rows = open_rows(tmp_path, "test", caption_column=None, label_column="label")
    assert rows.class_names == ["bird", "cat", "dog"]
    assert [row.label for row in RowStream(rows, shuffle_window=0, repeat=False)] == [1, 2]


def test_a_class_whose_name_is_not_utf8_can_be_printed(tmp_path):
    classes(tmp_path, bus=1)
    for name in (b"caf\xe9", b"empty\xe9"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
    with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9", b"\xe9.png"), "wb") as file:
        file.write(picture(3))
    rows = open_rows(tmp_path, caption_column=None, label_column="label")
    assert rows.class_names == ["bus", "caf\\udce9", "empty\\udce9"]
    assert "the class folder empty\\udce9" in rows.description
    read = RowStream(rows, shuffle_window=0, repeat=False)
    assert [row.label for row in read] == [0, 1]


@pytest.mark.parametrize("name", ["[2024]", "what?", "a*b", "a::b", "#1 100%", "a\u2028b", "~x", "zip:"])
def test_folders_of_any_name(tmp_path, name):
    write(tmp_path / name, [line(number) for number in range(4)])
    assert captions(tmp_path / name) == ["x"] * 4
    assert captions(tmp_path) == ["x"] * 4
