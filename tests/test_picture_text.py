import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import pyplot
from PIL import Image

from improved_ldm.picture_text import picture_text, read_png_text, save_png


@given(st.text(st.characters(codec="utf-8"), max_size=200), st.integers(0, 2**63))
def test_a_png_says_how_it_was_made(prompt, seed):
    text = picture_text({"prompt": prompt}, seed, {"flip": True, "crop_size": (6, 4.5)}, "user/model", steps=3)
    file = io.BytesIO()
    save_png(Image.new("RGB", (8, 8), "red"), file, text)
    read = read_png_text(file)
    assert read == text and (read["prompt"], read["model"]) == (prompt, "user/model")
    assert [json.loads(read[name]) for name in ("seed", "control", "steps")] == [
        seed,
        {"flip": True, "crop_size": [6, 4.5]},
        3,
    ]
    assert Image.open(file).convert("RGB").getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("semantic", [{"prompt": "a red boot, 靴"}, {"class_labels": 3}])
def test_a_figure_takes_the_same_text(semantic, tmp_path):
    text = picture_text(semantic, 7, {}, "embedded:demo")
    figure, _ = pyplot.subplots()
    figure.savefig(tmp_path / "grid.png", metadata=text)
    pyplot.close(figure)
    assert text.items() <= read_png_text(tmp_path / "grid.png").items()
