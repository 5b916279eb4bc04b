"""Each row is read independently: a bad row is skipped, counted by its reason, and named."""

import io
import json
import logging
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_ldm.data.loader import make_loader
from improved_ldm.data.sources import CorruptImagesError, RowStream, open_rows
from improved_ldm.data.tally import skipped_rows
from improved_ldm.data.transforms import ImageTransform
from tests.data.sets import encode, number, picture

ROWS, BAD = 100, 60  # number of rows, and the number of the bad row


def read(path, **columns):
    """The numbers of the rows that are read, and the counts of skipped rows."""
    stream = RowStream(open_rows(path, **columns), shuffle_window=0, repeat=False)
    return [number(row) for row in stream], stream.state_dict()["skipped_rows"]


def check_one_skipped(path, reason, place, caplog, **columns):
    with caplog.at_level(logging.WARNING, "improved_ldm.data.tally"):
        seen, skipped = read(path, **columns)
    assert seen == [i for i in range(ROWS) if i != BAD] and skipped == {reason: 1}
    assert f"{place}: {reason}" in caplog.text and "1 of 100 rows" in caplog.text


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_samples(file, members_of):
    """A shard whose sample i has the members `members_of(i)`, a list of pairs."""
    with tarfile.open(file, "w") as tar:
        for i in range(ROWS):
            for name, content in members_of(i):
                add(tar, f"{i:03}.{name}", content)
    return file


GOOD_JSON = json.dumps({"caption": "x", "label": 1}).encode()
IMAGE_ALONE, UNFINISHED = [("png", None)], [("png", None), ("json", b'{"caption": "x')]
BAD_SAMPLES = [
    ("no sidecar", IMAGE_ALONE, "caption is missing"),
    ("no image", [("json", GOOD_JSON)], "image is missing"),
    ("cut JSON", UNFINISHED, "JSON cannot be parsed"),
    ("JSON that is no object", [("png", None), ("json", b"[1]")], "caption is missing"),
    ("deep JSON", [("png", None), ("json", b"[" * 100_000)], "JSON cannot be parsed"),
    ("no caption", [("png", None), ("json", b'{"label": 1}')], "caption is missing"),
    ("caption not UTF-8", [("png", None), ("txt", b"caf\xe9")], "caption is not UTF-8"),
    ("JSON not UTF-8", [("png", None), ("json", b'{"caption": "caf\xe9"}')], "JSON cannot be parsed"),
    ("half of a surrogate pair", [("png", None), ("json", b'{"caption": "\\ud800"}')], "caption is not UTF-8"),
    ("number", [("png", None), ("json", b'{"caption": 7}')], "caption is not a string"),
    ("zero", [("png", None), ("json", b'{"caption": 0}')], "caption is not a string"),
    ("false", [("png", None), ("json", b'{"caption": false}')], "caption is not a string"),
    ("list of other values", [("png", None), ("json", b'{"caption": ["a", 7]}')], "caption is not a string"),
    ("dict", [("png", None), ("json", b'{"caption": {"en": "a"}}')], "caption is not a string"),
    ("damaged image", [("png", b"no image"), ("json", GOOD_JSON)], "image cannot be decoded"),
    ("empty image", [("png", b""), ("json", GOOD_JSON)], "image cannot be decoded"),
    ("two captions", [("png", None), ("txt", b"a"), ("txt", b"b")], "sample has two members .txt"),
]


@pytest.mark.parametrize(
    ("members", "reason"), [case[1:] for case in BAD_SAMPLES], ids=[case[0] for case in BAD_SAMPLES]
)
def test_a_bad_sample_costs_itself_only(tmp_path, caplog, members, reason):
    def members_of(i):
        chosen = members if i == BAD else [("png", None), ("json", GOOD_JSON)]
        return [(name, picture(i) if content is None else content) for name, content in chosen]

    file = write_samples(tmp_path / "a.tar", members_of)
    check_one_skipped(file, reason, f"{file}, sample 060", caplog)


@pytest.mark.parametrize("members", [case[1] for case in BAD_SAMPLES[:-1]], ids=[c[0] for c in BAD_SAMPLES[:-1]])
def test_a_shard_may_begin_with_a_bad_sample(tmp_path, members):
    def members_of(i):
        chosen = members if i == 0 else [("png", None), ("json", GOOD_JSON)]
        return [(name, picture(i) if content is None else content) for name, content in chosen]

    assert read(write_samples(tmp_path / "a.tar", members_of))[0] == list(range(1, ROWS))


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["png", "jpg", "JPEG", "webp", "PNG"]),
            st.sampled_from(["txt", "json.text", "json.caption", "TXT"]),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_samples_of_one_shard_may_differ(tmp_path_factory, samples):
    file = tmp_path_factory.mktemp("set") / "a.tar"
    with tarfile.open(file, "w") as tar:
        for i, (image, text, more) in enumerate(samples):
            kind = {"jpg": "jpeg"}.get(image.lower(), image.lower())
            add(tar, f"{i:03}.{image}", encode(Image.new("RGB", (8, 8), (200, 0, 0)), kind))
            member, _, field = text.partition(".")
            add(tar, f"{i:03}.{member}", json.dumps({field: f"row {i}"}).encode() if field else f"row {i}".encode())
            if more:
                add(tar, f"{i:03}.score.npy", b"\x93NUMPY")
    captions = [row.caption for row in RowStream(open_rows(file), shuffle_window=0, repeat=False)]
    assert captions == [f"row {i}" for i in range(len(samples))]


def write_column(file, name, values, type=None):
    columns = {"image": pa.array([picture(i) for i in range(ROWS)]), "text": pa.array(["x"] * ROWS)}
    columns[name] = pa.array(values, type)
    pq.write_table(pa.table(columns), file, row_group_size=17)
    return file


def one_bad(good, bad):
    return [bad if i == BAD else good for i in range(ROWS)]


NOT_UTF8 = pa.StringArray.from_buffers(1, pa.array([0, 4], pa.int32()).buffers()[1], pa.py_buffer(b"caf\xe9"))


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        (-1, "label is negative"),
        (None, "label is missing"),
        (10, "label is not below 10"),
        (2**40, "label is not below 10"),
    ],
)
def test_a_bad_label_costs_its_row_only(tmp_path, caplog, label, reason):
    file = write_column(tmp_path / "a.parquet", "label", one_bad(3, label), pa.int64())
    check_one_skipped(file, reason, f"{file}, row 60", caplog, label_column="label", num_classes=10)


def test_a_column_of_booleans_is_none_of_labels(tmp_path):
    file = write_column(tmp_path / "a.parquet", "label", [True] * ROWS)
    with pytest.raises(
        ValueError, match="`label_column` is 'label'; it must hold integers or names of classes, not bool"
    ):
        open_rows(file, label_column="label")


def test_a_label_that_no_tensor_holds_is_bad(tmp_path, caplog):
    file = write_column(tmp_path / "a.parquet", "label", one_bad(3, 2**63), pa.uint64())
    check_one_skipped(file, f"label is not below {2**63}", f"{file}, row 60", caplog, label_column="label")


@pytest.mark.parametrize("label", ["1.5", "1_0", "٣", "0x1", "9" * 5000, ""])
def test_a_label_in_a_file_of_its_own_is_an_integer(tmp_path, caplog, label):
    def members_of(i):
        return [("png", picture(i)), ("txt", b"x"), ("cls", label.encode() if i == BAD else b" +4\n")]

    file = write_samples(tmp_path / "a.tar", members_of)
    check_one_skipped(file, "label is not an integer", "sample 060", caplog, label_column="label")


@pytest.mark.parametrize("label", ["1.5", "2.0", "true", '"x"', "[1]", "1e3"])
def test_a_label_is_an_integer(tmp_path, caplog, label):
    def members_of(i):
        return [("png", picture(i)), ("json", f'{{"caption": "x", "label": {label if i == BAD else 4}}}'.encode())]

    file = write_samples(tmp_path / "a.tar", members_of)
    check_one_skipped(file, "label is not an integer", "sample 060", caplog, label_column="label")


def test_a_caption_of_a_parquet_file_that_is_not_utf8(tmp_path, caplog):
    good = pa.array(["x"] * BAD), pa.array(["x"] * (ROWS - BAD - 1))
    column = pa.concat_arrays([good[0], NOT_UTF8, good[1]])
    table = pa.table({"image": pa.array([picture(i) for i in range(ROWS)]), "text": column})
    pq.write_table(table, file := tmp_path / "a.parquet", row_group_size=17)
    check_one_skipped(file, "caption is not UTF-8", f"{file}, row 60", caplog)


@pytest.mark.parametrize("image", [None, b"", b"no image", picture(3)[:-30]])
def test_a_bad_image_of_a_parquet_file(tmp_path, caplog, image):
    images = [image if i == BAD else picture(i) for i in range(ROWS)]
    file = write_column(tmp_path / "a.parquet", "image", images)
    reason = "image is missing" if image is None else "image cannot be decoded"
    check_one_skipped(file, reason, f"{file}, row 60", caplog)


def test_captions_that_are_null_are_empty_and_counted(tmp_path, caplog):
    file = write_column(tmp_path / "a.parquet", "text", one_bad("x", None))
    with caplog.at_level(logging.WARNING, "improved_ldm.data.tally"):
        rows = list(RowStream(open_rows(file), shuffle_window=0, repeat=False))
    assert rows[BAD].caption == "" and len(rows) == ROWS
    assert "1 of 100 rows have an empty caption" in caplog.text


UNREAD = [
    ("more columns", {"score": [1, 2, 3]}),
    ("another order", {"score": [1, 2, 3], "a": ["x"] * 3}),
    ("another type", {"extra": ["text"] * 3}),
    ("a list", {"extra": [[1], [2, 3], None]}),
    ("a dict", {"extra": [{"a": 1}] * 3}),
    ("none at all", {}),
]


@pytest.mark.parametrize("more", [case[1] for case in UNREAD], ids=[case[0] for case in UNREAD])
def test_columns_that_nobody_reads_may_differ(tmp_path, more):
    images = [picture(i) for i in range(6)]
    pq.write_table(
        pa.table({"image": images[:3], "text": ["a"] * 3, "extra": [1, 2, 3]}), tmp_path / "train-0.parquet"
    )
    pq.write_table(pa.table({**more, "text": ["b"] * 3, "image": images[3:]}), tmp_path / "train-1.parquet")
    assert read(tmp_path) == (list(range(6)), {})


@pytest.mark.parametrize(
    "text",
    [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
    ids=["large", "dict", "view"],
)
@pytest.mark.parametrize(
    "image", [pa.large_binary(), pa.binary_view(), pa.struct({"path": pa.string(), "bytes": pa.binary()})]
)
def test_files_may_store_a_column_in_different_ways(tmp_path, text, image):
    pq.write_table(pa.table({"image": [picture(0)], "text": ["a"]}), tmp_path / "0.parquet")
    stored = {"bytes": picture(1), "path": None} if pa.types.is_struct(image) else picture(1)
    columns = {"image": pa.array([stored], image), "text": pa.array(["b"], pa.string()).cast(text)}
    pq.write_table(pa.table(columns), tmp_path / "1.parquet")
    assert read(tmp_path) == ([0, 1], {})


@pytest.mark.parametrize(
    ("column", "reason"),
    [({"other": ["a"] * 30}, "caption is missing"), ({"text": [1] * 30}, "caption is not a string")],
)
def test_a_later_file_without_the_column_stops_the_run_by_name(tmp_path, column, reason):
    images = [picture(i) for i in range(150)]
    pq.write_table(pa.table({"image": images[:120], "text": ["a"] * 120}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": images[120:], **column}), tmp_path / "1.parquet")
    with pytest.raises(CorruptImagesError, match=rf"7 of 127 rows .* \(7: {reason}\); at most 5%"):
        read(tmp_path)


def test_a_file_of_unread_columns_alone_keeps_its_rows(tmp_path):
    pq.write_table(pa.table({"image": [picture(i) for i in range(100)], "text": ["a"] * 100}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "1.parquet")
    seen, skipped = read(tmp_path)
    assert seen == list(range(100)) and skipped == {"caption is missing": 2}


def test_fields_inside_columns(tmp_path):
    rows = [{"text": f"row {i}", "more": {"label": i}} for i in range(4)]
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [picture(i) for i in range(4)], "meta": rows, "x.y": ["z"] * 4}), file)
    columns = {"caption_column": "meta.text", "label_column": "meta.more.label"}
    stream = RowStream(open_rows(file, **columns), shuffle_window=0, repeat=False)
    assert [(row.caption, row.label) for row in stream] == [(f"row {i}", i) for i in range(4)]
    assert next(iter(RowStream(open_rows(file, caption_column="x.y")))).caption == "z"


def damaged_set(tmp_path):
    captions = ["x" if i % 50 else None for i in range(ROWS * 2)]
    images = [b"no image" if i in (70, 130, 190) else picture(i) for i in range(ROWS * 2)]
    labels = [-1 if i in (20, 120) else 1 for i in range(ROWS * 2)]
    pq.write_table(pa.table({"image": images, "text": captions, "label": labels}), tmp_path / "a.parquet")
    return open_rows(tmp_path, label_column="label")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_counts_survive_resuming_and_come_back_from_workers(tmp_path, num_workers):
    rows, expected = damaged_set(tmp_path), {"image cannot be decoded": 3, "label is negative": 2}

    def loader():
        return make_loader(rows, ImageTransform(4), 10, shuffle_window=32, num_workers=num_workers)

    first = loader()
    iterator = iter(first)
    for _ in range(12):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    assert 0 < sum(skipped_rows(state).values()) < 5
    second = loader()
    second.load_state_dict(state)
    iterator = iter(second)
    for _ in range(40):  # two more passes
        next(iterator)
    assert skipped_rows(second.state_dict()) == expected
    assert skipped_rows([second.state_dict(), second.state_dict()]) == {name: 2 * n for name, n in expected.items()}


def test_a_state_with_one_count_of_all_reasons_is_read(tmp_path):
    rows = damaged_set(tmp_path)
    stream = RowStream(rows, shuffle_window=16)
    iterator = iter(stream)
    for _ in range(100):
        next(iterator)
    state = stream.state_dict()
    tally = state.pop("tally")
    del state["skipped_rows"]
    resumed = RowStream(rows, shuffle_window=16)
    resumed.load_state_dict(state | {"seen": tally["seen"], "lost": tally["lost"], "corrupt": 2})
    again = iter(resumed)
    assert [number(next(again)) for _ in range(60)] == [number(next(iterator)) for _ in range(60)]
    assert resumed.state_dict()["skipped_rows"]["image cannot be decoded"] >= 2


def test_a_row_is_named_once_and_not_as_a_share(tmp_path, caplog):
    rows = damaged_set(tmp_path)
    with caplog.at_level(logging.WARNING, "improved_ldm.data.tally"):
        for _ in range(2):
            assert len(list(RowStream(rows, shuffle_window=0, repeat=False))) == 195
    assert caplog.text.count("row 20: label is negative") == 1
    assert "1 of" not in caplog.text and "5 of 200 rows cannot be used" in caplog.text


def test_numbers_of_images_survive_their_neighbours(tmp_path):
    """Bad rows do not change the seeds of other rows."""
    write_column(tmp_path / "a.parquet", "label", one_bad(1, -1), pa.int64())
    write_column(tmp_path / "b.parquet", "label", [1] * ROWS, pa.int64())
    with_bad, without = (
        {number(row): row.seed for row in RowStream(open_rows(tmp_path / name, label_column="label"), repeat=False)}
        for name in ("a.parquet", "b.parquet")
    )
    assert with_bad == {i: seed for i, seed in without.items() if i != BAD}
    assert np.unique(list(without.values())).size == ROWS
