"""The sets of a configuration: captions from several columns or a template, and classes with names."""

import json

import pytest
from pydantic import ValidationError

from improved_ldm.data.sources import RowStream
from improved_ldm.trainer.config import DataConfig
from improved_ldm.trainer.data import open_data, survey
from tests.data.sets import picture, write_parquet


@pytest.fixture
def photos(tmp_path):
    """Two class folders, and a metadata file in another set."""
    for number, name in enumerate(["red_fox", "red_fox", "owl"]):
        file = tmp_path / "folders" / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(number))
    table = tmp_path / "table"
    table.mkdir()
    records = [{"file_name": f"{i}.png", "short": "s", "long": ["l", "m"], "label": "bat"} for i in range(20)]
    (table / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for i in range(20):
        (table / f"{i}.png").write_bytes(picture(i))
    return tmp_path


def captions(config, source=0):
    rows = open_data(DataConfig(**config), takes_text=True).rows[source]
    read = list(RowStream(rows, shuffle_window=0, repeat=False))
    assert all(row.label is None for row in read)
    return [row.caption for row in read]


def test_captions_are_read_as_the_configuration_says(photos):
    folders, table = str(photos / "folders"), str(photos / "table")
    template = {"source": folders, "caption_template": "a photo of a {label}"}
    assert captions(template) == ["a photo of a owl", "a photo of a red fox", "a photo of a red fox"]
    columns = {"source": table, "caption_column": ["short", "long"], "caption_weights": [1, 1e6]}
    assert set(captions(columns)) == {"l", "m"}
    own = {"caption_column": ["short"], "caption_prefix": "p "}
    several = {**columns, "source": DataConfig().source, "sources": [template, {"source": table, **own}]}
    assert captions(several, 1) == ["p s"] * 20
    assert "a photo of a owl" in survey(open_data(DataConfig(sources=[template]), takes_text=True)).captions


def test_a_caption_pattern_may_be_in_any_of_the_captions(photos):
    config = {"source": str(photos / "table"), "caption_column": ["short", "long"]}
    assert len(captions({**config, "caption_pattern": "^m$"})) == 20
    with pytest.raises(ValueError, match="the set has no rows"):
        next(iter(RowStream(open_data(DataConfig(**config, caption_pattern="^x$"), takes_text=True).rows[0])))


def test_names_of_classes_are_joined_over_sources(photos):
    sources = [{"source": str(photos / "folders")}, {"source": str(photos / "table")}]
    mixture = open_data(DataConfig(sources=sources, num_classes=3), takes_text=False)
    assert mixture.class_names == ["owl", "red_fox", "bat"] and mixture.num_classes == 3
    assert {row.label for row in RowStream(mixture.rows[1], repeat=False)} == {2}
    with pytest.raises(ValueError, match=r"`data\.num_classes` is 2; .* their number is 3"):
        open_data(DataConfig(sources=sources, num_classes=2), takes_text=False)


def test_errors_name_the_keys(photos, tmp_path):
    write_parquet(tmp_path / "a.parquet", range(4))
    with pytest.raises(ValueError, match=r"`data\.num_classes` is 5; .* 'even' to 'odd'"):
        open_data(DataConfig(source=str(tmp_path / "a.parquet"), num_classes=5), takes_text=False)
    with pytest.raises(
        ValueError, match=r"`data\.caption_column` is 'text'.*class folders with `data\.caption_template`"
    ):
        open_data(DataConfig(source=str(photos / "folders")), takes_text=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"caption_weights": [0.0]}, "greater than 0"),
        ({"caption_weights": [float("nan")]}, "finite number"),
        ({"caption_weights": [1, 2]}, "has 2 values; `caption_column` has 1 columns"),
        ({"caption_column": []}, "it must name at least one column"),
        ({"caption_template": "a photo"}, "must hold {label} once"),
        ({"sources": [{"source": "x", "caption_weights": [1, 2]}]}, "has 2 values"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_read(keys, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(**keys)
