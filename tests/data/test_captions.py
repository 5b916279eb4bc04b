"""Several captions of an image: one is drawn anew in each epoch, as a function of the row's seed."""

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from improved_ldm.data.captions import captions_of, draw_caption
from improved_ldm.data.loader import make_loader
from improved_ldm.data.sources import RowStream, open_rows
from improved_ldm.data.transforms import ImageTransform
from tests.data.sets import number, picture

ROWS = 40


def write(folder, **columns):
    images = [picture(i) for i in range(ROWS)]
    pq.write_table(pa.table({"image": images, **columns}), folder / "a.parquet")
    return folder


def passes(rows, count, **arguments):
    """The captions of each pass, in the order of the set."""
    stream = iter(RowStream(rows, shuffle_window=0, **arguments))
    return [[next(stream).caption for _ in range(ROWS)] for _ in range(count)]


def test_one_of_several_columns_is_drawn_by_weight(tmp_path):
    write(tmp_path, short=["s"] * ROWS, long=["l"] * ROWS)
    rows = open_rows(tmp_path, caption_column=["short", "long"], caption_weights=[1, 3])
    counts = Counter(caption for one in passes(rows, 25) for caption in one)
    assert 0.70 < counts["l"] / counts.total() < 0.80  # 1000 draws
    assert passes(rows, 2) == passes(rows, 2) != passes(rows, 2, seed=1)
    assert passes(rows, 2)[0] != passes(rows, 2)[1]


def test_a_list_is_drawn_uniformly(tmp_path):
    rows = open_rows(write(tmp_path, text=[["a", "b", None, "", "c"]] * ROWS))
    counts = Counter(caption for one in passes(rows, 30) for caption in one)
    assert set(counts) == {"a", "b", "c"} and all(320 < count < 480 for count in counts.values())


def test_the_draw_of_a_row_depends_on_nothing_but_its_seed(tmp_path):
    rows = open_rows(write(tmp_path, text=[["a", "b", "c", "d"]] * ROWS))

    def drawn(**arguments):
        return {number(row): row.caption for row in RowStream(rows, repeat=False, **arguments)}

    whole = drawn(shuffle_window=0)
    assert drawn(shuffle_window=16) == whole
    assert drawn(rank=0, world_size=2) | drawn(rank=1, world_size=2) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_the_draw_resumes(tmp_path, workers):
    rows = open_rows(write(tmp_path, text=[["a", "b", "c", "d"]] * ROWS))

    def loader():
        return make_loader(rows, ImageTransform(4), 4, shuffle_window=8, num_workers=workers)

    first = loader()
    iterator = iter(first)
    for _ in range(7):
        next(iterator)
    second = loader()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    again = iter(second)
    assert [next(again)["caption"] for _ in range(12)] == [next(iterator)["caption"] for _ in range(12)]


VALUES = [
    ("null", None, []),
    ("blank", " \n", []),
    ("a string", " a ", [" a "]),
    ("an empty list", [], []),
    ("a list of nothing", [None, "", " "], []),
    ("a list", ["a", None, "b"], ["a", "b"]),
    ("the bytes of a file", b"\xef\xbb\xbfa\r\nb\r\n", ["a\nb"]),
]


@pytest.mark.parametrize(("value", "captions"), [case[1:] for case in VALUES], ids=[case[0] for case in VALUES])
def test_values_of_a_column(value, captions):
    assert captions_of(value) == captions


@pytest.mark.parametrize("value", [7, 0, False, {}, ["a", 7], [["a"]]])
def test_values_that_are_no_captions(value):
    with pytest.raises(TypeError, match="it is of type"):
        captions_of(value)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.text("abc", min_size=1, max_size=3), max_size=3), min_size=1, max_size=4),
    st.integers(0, 2**62),
)
def test_a_draw_is_one_of_the_captions(options, seed):
    drawn = draw_caption(options, [2.0] * len(options), seed)
    assert drawn == draw_caption(options, None, seed)
    assert drawn in {caption for captions in options for caption in captions} or (not any(options) and drawn == "")


def test_columns_without_captions_are_left_out_of_the_draw(tmp_path):
    write(tmp_path, a=["a"] * 20 + [None] * 20, b=["", "b"] * 10 + [None, "b"] * 10)
    (captions,) = passes(open_rows(tmp_path, caption_column=("a", "b"), caption_weights=(1, 1e9)), 1)
    assert captions == ["a", "b"] * 10 + ["", "b"] * 10


def test_a_column_may_be_empty_in_the_first_rows_but_must_exist(tmp_path):
    write(tmp_path, a=["a"] * ROWS, b=pa.nulls(ROWS, pa.string()))
    assert passes(open_rows(tmp_path, caption_column=["a", "b"]), 1) == [["a"] * ROWS]
    with pytest.raises(ValueError, match="`caption_column` is 'c'; the set has the columns image, a, b"):
        open_rows(tmp_path, caption_column=["a", "c"])
    with pytest.raises(ValueError, match=r"`caption_column` is 'b'; .* it is empty in the first rows"):
        open_rows(tmp_path, caption_column=["b"])


def test_strings_and_lists_in_one_column(tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    texts = ["a", ["b"], [], None, ["c", "c"], [""]]
    records = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(records), encoding="utf-8")
    stream = RowStream(open_rows(tmp_path), shuffle_window=0, repeat=False)
    assert [row.caption for row in stream] == ["a", "b", "", "", "c", ""]
    assert list(open_rows(tmp_path).captions()) == ["a", "b", "c", "c"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"caption_weights": [1, 0]}, r"`caption_weights` is \[1, 0\]; each weight must be positive and finite"),
        ({"caption_weights": [1, -1]}, "each weight must be positive and finite"),
        ({"caption_weights": [1, float("nan")]}, "each weight must be positive and finite"),
        ({"caption_weights": [1, float("inf")]}, "each weight must be positive and finite"),
        ({"caption_weights": [1]}, "`caption_weights` has 1 values; `caption_column` has 2 columns"),
        ({"caption_weights": []}, "`caption_weights` has 0 values"),
        ({"caption_column": []}, r"`caption_column` is \[\]; it must name at least one column"),
        ({"caption_column": ["a", "a"]}, "and each once"),
        (
            {"caption_column": ["n"]},
            "`caption_column` is 'n'; it must hold strings or lists of strings, not lists of int",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, arguments, message):
    write(tmp_path, a=["a"] * ROWS, b=["b"] * ROWS, n=[[7]] * ROWS)
    with pytest.raises(ValueError, match=message):
        open_rows(tmp_path, **{"caption_column": ["a", "b"], **arguments})
