"""Sets as they lie on people's disks: rows, captions and labels of every layout, and what is said about neighbours."""

import contextlib
import csv
import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from improved_ldm.data.sources import CorruptImagesError, RowStream, open_rows
from tests.data.sets import encode, number, picture, write_shard

CAPTIONS = {i: f"picture {i}" for i in range(4)}
CLASSES = {0: "red_fox", 1: "red_fox", 2: "owl", 3: "owl"}


def put(root, files):
    """Write files: numbers are images, objects JSON, texts UTF-8."""
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            content = encode(Image.open(io.BytesIO(picture(content))), {"jpg": "png"}.get(file.suffix[1:], "png"))
        elif isinstance(content, str):
            content = content.encode()
        elif not isinstance(content, bytes):
            content = json.dumps(content).encode()
        file.write_bytes(content)
    return root


def read(root, **arguments):
    """(number, caption, label) of each row."""
    rows = RowStream(open_rows(root, **arguments), shuffle_window=0, repeat=False)
    return [(number(row), row.caption, row.label) for row in rows]


def images(folder=""):
    return {f"{folder}{i}.png": i for i in range(4)}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def table(*records):
    file = io.StringIO()
    writer = csv.DictWriter(file, list(records[0]))
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def parquet(*records):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(records)), file)
    return file.getvalue()


def shard(root, members):
    root.mkdir(exist_ok=True)
    write_shard(root / "a.tar", range(4), members)
    return root


def records(path="file_name", text="text", label="label", suffix=".png", **more):
    return [{path: f"{i}{suffix}", text: CAPTIONS[i], label: CLASSES[i], **more} for i in range(4)]


def kohya(suffix=""):
    return {f"{i}{suffix}": {"caption": CAPTIONS[i], "tags": "a, b", "label": CLASSES[i]} for i in range(4)}


def sides(suffix, contents=CAPTIONS):
    return {f"{i}{suffix}": content for i, content in contents.items()}


def side_json(text="caption"):
    return sides(".json", {i: {text: CAPTIONS[i], "label": CLASSES[i]} for i in range(4)})


def in_classes(root=""):
    return {f"{root}{name}/{i}.png": i for i, name in CLASSES.items()}


def filled(files):
    return lambda root: put(root, files)


# what it is, how it is written, whether labels are read
LAYOUTS = {
    "parquet": (
        filled({"a.parquet": parquet(*({"image": picture(i), **r} for i, r in enumerate(records("x"))))}),
        True,
    ),
    "webdataset with text": (
        lambda root: shard(root, lambda i: {"txt": f" {CAPTIONS[i]}\r\n".encode(), "cls": f"{CLASSES[i]}\n".encode()}),
        True,
    ),
    "webdataset with JSON": (
        lambda root: shard(root, lambda i: {"json": json.dumps(side_json()[f"{i}.json"]).encode()}),
        True,
    ),
    "metadata.jsonl": (filled({**images(), "metadata.jsonl": lines(*records())}), True),
    "metadata.csv": (filled({**images(), "metadata.csv": "\ufeff" + table(*records())}), True),
    "metadata with captions in `caption`": (
        filled({**images(), "metadata.jsonl": lines(*records(text="caption"))}),
        True,
    ),
    "metadata of folders below": (
        filled(
            {
                **images("img/"),
                "metadata.jsonl": lines(*({**r, "file_name": f"img/{r['file_name']}"} for r in records())),
            }
        ),
        True,
    ),
    "JSON Lines of kohya's scripts": (
        filled({**images(), "my.jsonl": lines(*records("image_path", "caption"))}),
        True,
    ),
    "JSON of kohya's scripts": (filled({**images(), "meta_cap.json": kohya(".png")}), True),
    "JSON of kohya's scripts without suffixes": (filled({**images(), "meta_cap.json": kohya()}), True),
    "JSON from paths to captions": (filled({**images(), "captions.json": sides(".png")}), False),
    "parquet next to images": (filled({**images(), "t.parquet": parquet(*records("filename", "caption"))}), True),
    "parquet without suffixes": (
        filled({**images(), "t.parquet": parquet(*records("filename", "caption", suffix=""))}),
        True,
    ),
    "CSV of another name": (filled({**images(), "list.csv": table(*records("filename", "caption"))}), True),
    "text files": (filled({**images(), **sides(".txt")}), False),
    "capital suffixes": (filled({**{f"{i}.PNG": i for i in range(4)}, **sides(".TXT")}), False),
    "text files with marks and line ends of Windows": (
        filled({**images(), **sides(".txt", {i: f"\ufeff{CAPTIONS[i]} \r\n" for i in range(4)})}),
        False,
    ),
    "text files with the whole name": (filled({**images(), **sides(".png.txt")}), False),
    "caption files": (filled({**images(), **sides(".caption")}), False),
    "JSON files with `caption`": (filled({**images(), **side_json()}), True),
    "JSON files with `text`": (filled({**images(), **side_json("text")}), True),
    "JSON files with `prompt`": (filled({**images(), **side_json("prompt")}), True),
    "text files in class folders": (
        filled({**in_classes(), **{f"{name}/{i}.txt": CAPTIONS[i] for i, name in CLASSES.items()}}),
        True,
    ),
    "text files in folders of kohya's scripts": (
        filled({**images("10_fox/"), **{f"10_fox/{name}": text for name, text in sides(".txt").items()}}),
        False,
    ),
}


@pytest.mark.parametrize("split", [False, True], ids=["alone", "in train"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_captions_and_labels_are_read(tmp_path, layout, split):
    write, has_labels = LAYOUTS[layout]
    write(tmp_path / "train")
    if split:
        shutil.copytree(tmp_path / "train", tmp_path / "test")
    else:
        tmp_path = tmp_path / "train"
    rows = open_rows(tmp_path, label_column="label" if has_labels else None)
    read = [(number(row), row.caption, row.label) for row in RowStream(rows, shuffle_window=0, repeat=False)]
    labels = {"owl": 0, "red_fox": 1}
    expected = [(i, CAPTIONS[i], labels[CLASSES[i]] if has_labels else None) for i in range(4)]
    assert sorted(read) == expected
    assert rows.class_names == (["owl", "red_fox"] if has_labels else rows.class_names)


def test_one_file_of_a_folder_is_read_with_its_side_file(tmp_path):
    put(tmp_path, {**images(), **sides(".txt")})
    assert read(str(tmp_path / "*.png")) == [(i, CAPTIONS[i], None) for i in range(4)]
    assert read(tmp_path / "2.png") == [(2, CAPTIONS[2], None)]


def test_a_table_that_is_named_is_read(tmp_path):
    put(tmp_path, {**images(), "meta_cap.json": kohya(".png"), "meta_lat.json": sides("", {0: "other"})})
    with pytest.raises(ValueError, match=r"`source` holds 2 tables .*meta_cap\.json.*it must name the one to read"):
        open_rows(tmp_path)
    assert read(tmp_path / "meta_cap.json") == [(i, CAPTIONS[i], None) for i in range(4)]
    assert read(tmp_path / "meta_lat.json") == [(0, "other", None)]


def test_a_table_above_splits_describes_each(tmp_path):
    lines_of = {f"{split}/{i}": {"caption": f"{split} {i}"} for split in ("train", "test") for i in range(4)}
    put(tmp_path, {**images("train/"), **images("test/"), "meta.json": lines_of})
    for split in ("train", "test"):
        rows = open_rows(tmp_path, split)
        assert [row.caption for row in RowStream(rows, shuffle_window=0, repeat=False)] == [
            f"{split} {i}" for i in range(4)
        ]
        assert "4 lines of meta.json for an image of another split" in rows.description


# --- class folders


def test_class_folders_give_labels_and_captions(tmp_path):
    put(tmp_path, in_classes("train/") | {"test/a_newt/9.png": 9})
    rows = open_rows(tmp_path, caption_column=None, label_column="label")
    assert rows.class_names == ["a_newt", "owl", "red_fox"]
    asked = {"label_column": "label", "caption_template": "a photo of a {label}, {x}"}
    captions = {caption for _, caption, _ in read(tmp_path, **asked)}
    assert captions == {"a photo of a red fox, {x}", "a photo of a owl, {x}"}
    assert read(tmp_path, split="test", **asked) == [(9, "a photo of a a newt, {x}", 0)]


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("10_sks dog", "sks dog"),
        ("sks_dog", "sks dog"),
        ("001.Black_footed_Albatross", "Black footed Albatross"),
        ("1990", "1990"),
        ("3_", "3 "),
        ("4x4", "4x4"),
    ],
)
def test_one_folder_is_a_subject(tmp_path, folder, words):
    put(tmp_path, images(f"{folder}/"))
    asked = {"label_column": "label", "caption_template": "a {label}"}
    for source in (tmp_path, tmp_path / folder):
        assert [caption for _, caption, _ in read(source, **asked)] == [f"a {words}".rstrip()] * 4


def test_a_template_fills_captions_that_are_missing(tmp_path):
    put(tmp_path, in_classes() | {"owl/2.txt": "in the wood", "owl/3.txt": ""})
    asked = {"label_column": "label", "caption_template": "a {label}"}
    captions = {number: caption for number, caption, _ in read(tmp_path, **asked)}
    assert captions == {0: "a red fox", 1: "a red fox", 2: "in the wood", 3: "a owl"}


def test_a_template_names_the_classes_of_any_set(folder):
    asked = {"caption_column": "other", "label_column": "label", "caption_template": "an {label} number"}
    assert {caption for _, caption, _ in read(folder, **asked)} == {"an even number", "an odd number"}


@pytest.mark.parametrize("template", ["a photo", "{label} and {label}", "{ label }", "{class}"])
def test_a_template_holds_the_label_once(folder, template):
    with pytest.raises(ValueError, match=r"`caption_template` is .*; it must hold \{label\} once"):
        open_rows(folder, label_column="label", caption_template=template)


def test_a_template_needs_names(tmp_path):
    put(tmp_path, {**images(), "metadata.jsonl": lines(*({"file_name": f"{i}.png", "label": i} for i in range(4)))})
    with pytest.raises(ValueError, match="`caption_template` is given without `label_column`"):
        open_rows(tmp_path, caption_template="a {label}")
    with pytest.raises(ValueError, match="`caption_template` needs names of classes; `label_column` 'label' has none"):
        open_rows(tmp_path, label_column="label", caption_template="a {label}")


def test_splits_are_no_classes(tmp_path):
    put(tmp_path, {**images("train/"), **images("test/")})
    with pytest.raises(ValueError, match="`label_column` is 'label'; the set has the columns image"):
        open_rows(tmp_path, caption_column=None, label_column="label")


# --- wrong neighbours


NEIGHBOURS = {
    "a text without an image": ({"x.txt": "x"}, 4, "1 caption file without an image"),
    "texts without images": ({"x.txt": "x", "y.caption": "x"}, 4, "2 caption files without an image"),
    "an image without a text": ({"x.png": 9}, 4, "1 of 5 images without a caption file"),
    "empty texts": ({"0.txt": "", "1.txt": " \r\n"}, 4, "2 caption files without text"),
    "a text that is not UTF-8": (
        {"0.txt": "café".encode("latin-1")},
        3,
        "1 of 4 images without a caption file; 1 caption file that cannot be read (not UTF-8)",
    ),
    "JSON that is cut": (
        {"x.png": 9, "x.json": '{"caption": "'},
        4,
        "1 caption file that cannot be read (no JSON object)",
    ),
    "several lines": ({"0.txt": "a\r\nb"}, 4, "1 caption file of several lines, which are one caption"),
    "a line and a text": (
        {"metadata.jsonl": lines({"file_name": "0.png", "text": "from the table"})},
        4,
        "1 image with a caption in a table and a caption file; the table is read",
    ),
    "an image without a line and a text": (
        {"metadata.jsonl": lines({"file_name": "0.png", "text": "x"}), "x.png": 9},
        4,
        "1 of 5 images without a line in metadata.jsonl or a caption file",
    ),
    "another table": (
        {"metadata.jsonl": lines({"file_name": "0.png", "text": "x"}), "list.csv": table({"file_name": "1.png"})},
        4,
        "list.csv is not read next to",
    ),
    "a table of something else": ({"list.csv": "a,b\n1,2\n"}, 4, "1 of another kind (.csv)"),
    "folders of kohya's scripts": (
        {"10_fox/x.png": 9, "10_fox/x.txt": "x"},
        5,
        "the number in names of folders such as 10_fox is not read as repeats; each image is read once",
    ),
}


@pytest.mark.parametrize("case", NEIGHBOURS)
def test_what_lies_next_to_images_is_said(tmp_path, case):
    more, count, remark = NEIGHBOURS[case]
    rows = open_rows(put(tmp_path, {**images(), **sides(".txt"), **more}))
    assert remark in rows.description and f"{count} rows" in rows.description
    assert len(list(RowStream(rows, repeat=False))) == count


def test_a_table_comes_before_side_files_value_by_value(tmp_path):
    table = lines({"file_name": "0.png", "text": "line"}, {"file_name": "1.png", "text": None}, {"file_name": "2.png"})
    put(tmp_path, {**images(), **sides(".txt", {i: f"side {i}" for i in range(4)}), "metadata.jsonl": table})
    assert [caption for _, caption, _ in read(tmp_path)] == ["line", "side 1", "side 2", "side 3"]


def test_the_text_file_comes_before_the_caption_file_before_json(tmp_path):
    put(tmp_path, {**images(), **side_json(), "0.txt": "txt", "0.caption": "caption", "1.caption": "caption"})
    assert [caption for _, caption, _ in read(tmp_path)] == ["txt", "caption", CAPTIONS[2], CAPTIONS[3]]


def test_tags_are_one_caption(tmp_path):
    put(tmp_path, {**images(), **sides(".json", {0: {"tags": ["fox", "red"]}, 1: {"tags": "owl, grey"}})})
    assert [caption for _, caption, _ in read(tmp_path)] == ["fox, red", "owl, grey"]


@pytest.mark.parametrize("files", [images(), in_classes(), {**images(), "notes.md": "x"}])
def test_without_captions_the_error_lists_what_gives_some(tmp_path, files):
    with pytest.raises(ValueError, match=r"`caption_column` is 'text'.*\.txt.*metadata\.jsonl.*`caption_template`"):
        open_rows(put(tmp_path, files))


def test_all_images_are_read_if_captions_are_not(tmp_path):
    put(tmp_path, {**images(), "0.txt": "x"})
    assert read(tmp_path, caption_column=None) == [(i, None, None) for i in range(4)]


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("bmp", "BMP"),
        ("tif", "TIFF"),
        ("TIFF", "TIFF"),
        ("gif", "GIF"),
        ("webp", "WEBP"),
        ("jpeg", "JPEG"),
        ("avif", "AVIF"),
    ],
)
def test_formats_of_images(tmp_path, suffix, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    put(tmp_path, {f"a.{suffix}": encode(Image.new("RGB", (8, 8), (200, 30, 30)), kind), "a.txt": "red"})
    (row,) = RowStream(open_rows(tmp_path), repeat=False)
    assert row.caption == "red" and abs(row.image.getpixel((4, 4))[0] - 200) < 12


# --- labels


def label_column(values):
    return {**images(), "metadata.jsonl": lines(*({"file_name": f"{i}.png", "label": v} for i, v in values.items()))}


@pytest.mark.parametrize(
    ("values", "names", "labels"),
    [
        ({0: "b", 1: "a", 2: "b", 3: "10"}, ["10", "a", "b"], [2, 1, 2, 0]),
        ({0: "3", 1: "2", 2: "3", 3: "0"}, None, [3, 2, 3, 0]),
        ({0: "x", 1: 2, 2: 1, 3: "0"}, None, [2, 1, 0]),
        ({0: 7, 1: "a", 2: 1, 3: 0}, None, [7, 1, 0]),
        ({0: None, 1: "a", 2: "", 3: "b"}, ["a", "b"], [0, 1]),
    ],
)
def test_labels_are_names_if_most_are_no_integers(tmp_path, values, names, labels):
    rows = open_rows(put(tmp_path, label_column(values)), caption_column=None, label_column="label")
    read = []
    with contextlib.suppress(CorruptImagesError):  # a row without a label is more than 5%
        read.extend(row.label for row in RowStream(rows, shuffle_window=0, repeat=False))
    assert (rows.class_names, read) == (names, labels)


KINDS = {
    "parquet": lambda root, name, labels: put(
        root, {f"{name}.parquet": parquet(*({"image": picture(i), "meta": {"kind": k}} for i, k in enumerate(labels)))}
    ),
    "webdataset": lambda root, name, labels: write_shard(
        root / f"{name}.tar", range(len(labels)), lambda i: {"meta": json.dumps({"kind": labels[i]}).encode()}
    ),
    "side files": lambda root, name, labels: put(
        root,
        {f"{name}/{i}.png": i for i in range(len(labels))}
        | {f"{name}/{i}.json": {"meta": {"kind": k}} for i, k in enumerate(labels)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_classes_are_numbered_over_all_splits(tmp_path, kind):
    for split, labels in {"train": ["owl", "fox", "owl"], "test": ["bat", "fox"]}.items():
        KINDS[kind](tmp_path, split, labels)
    for split, expected in {"train": [2, 1, 2], "test": [0, 1]}.items():
        rows = open_rows(tmp_path, split, caption_column=None, label_column="meta.kind")
        assert rows.class_names == ["bat", "fox", "owl"]
        assert [row.label for row in RowStream(rows, shuffle_window=0, repeat=False)] == expected


def test_texts_that_differ_in_most_rows_are_no_classes(tmp_path):
    KINDS["parquet"](tmp_path, "a", [f"text {i // 2}" for i in range(30)])
    assert len(open_rows(tmp_path, caption_column=None, label_column="meta.kind").class_names) == 15
    KINDS["parquet"](tmp_path, "a", [f"text {i}" for i in range(30)])
    with pytest.raises(ValueError, match="30 of its 30 values are different texts, such as 'text 0'"):
        open_rows(tmp_path, caption_column=None, label_column="meta.kind")


@pytest.mark.parametrize("number", [1, 3])
def test_a_number_of_classes_that_contradicts_their_names_is_refused(tmp_path, number):
    put(tmp_path, in_classes())
    asked = {"caption_column": None, "label_column": "label"}
    assert open_rows(tmp_path, **asked, num_classes=2).num_classes == 2
    with pytest.raises(ValueError, match=f"`num_classes` is {number}; .* from 'owl' to 'red_fox', .* number is 2"):
        open_rows(tmp_path, **asked, num_classes=number)
