"""The measures of the table on aspect ratios."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw

import reproduce
from reproduction.shapes import aspect_error, real_shapes, touches_border
from reproduction.tables import load_tables
from tests.trainer.conftest import ROOT

SIDES = st.integers(20, 60)


def drawing(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """A dark box on nearly white paper of a size (height, width); the box is left, top, right, bottom, inclusive."""
    image = Image.new("RGB", size[::-1], (235, 240, 250))
    ImageDraw.Draw(image).rectangle(box, fill=(200, 30, 60))
    return image


@given(height=SIDES, width=SIDES, margin=st.integers(1, 5))
def test_the_error_is_the_ratio_of_the_drawing_to_that_of_its_canvas(height, width, margin):
    image = drawing((height, width), (margin, margin, width - 1 - margin, height - 1 - margin))
    ratio = (width - 2 * margin) / (height - 2 * margin)
    assert aspect_error(image) == pytest.approx(abs(math.log2(ratio * height / width)))
    assert not touches_border(image)


@given(height=SIDES, width=SIDES, side=st.integers(0, 3))
def test_a_drawing_that_reaches_a_side_touches_the_border(height, width, side):
    box = [5, 5, width - 6, height - 6]
    box[side] = (0, 0, width - 1, height - 1)[side]
    assert touches_border(drawing((height, width), tuple(box)))


def test_specks_are_no_drawing():
    image = Image.new("RGB", (40, 30), "white")
    image.putpixel((0, 7), (0, 0, 0))
    assert aspect_error(image) is None
    assert not touches_border(image)


def test_whole_training_images_have_the_recorded_measures():
    record = json.loads((ROOT / "training/results/other_shapes/cpu.json").read_text(encoding="utf-8"))["measured_with"]
    config = load_tables()["other_shapes"].run_config("buckets", "cpu", [f"--data.source={ROOT}/training/data/stamps"])
    assert real_shapes(config) == pytest.approx(record["real"])


@pytest.mark.slow
@pytest.mark.parametrize("table", ["buckets", "other_shapes"])
def test_the_tables_on_shapes_are_measured_and_drawn(tmp_path, table):
    tiny = {
        "training.steps": 2,
        "cache.passes": 0,
        "denoiser.options": "{hidden_size: 24, num_layers: 1, num_attention_heads: 2}",
        "sampling.num_inference_steps": 2,
        "evaluation.num_detail_samples": 2,
    }
    folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    reproduce.main([table, *folders, "--seeds", "0", *(f"--{key}={value}" for key, value in tiny.items())])
    folder = tmp_path / "results" / table
    record = json.loads((folder / "cpu.json").read_text(encoding="utf-8"))
    page = (folder / "cpu.md").read_text(encoding="utf-8")
    if table == "buckets":
        cut_away = {name: values["cut_away"]["mean"] for name, values in record["settings"].items()}
        assert 0 < cut_away["buckets"] < cut_away["square crops"] < 1
        assert "samples per run" not in page
    else:
        assert record["measured_with"]["samples"] == 8
        assert (folder / record["picture"]).is_file()
        assert "The same of whole training images" in page
