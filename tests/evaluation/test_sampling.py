import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from improved_ldm.data.sources import open_rows
from improved_ldm.evaluation.sampling import (
    SamplingSettings,
    check_call,
    draw_samples,
    make_requests,
    open_samples,
)

SETTINGS = SamplingSettings(num_inference_steps=2, guidance_scale=2.0)


def images(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.png")}


@given(
    choices=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    few=st.integers(1, 20),
    more=st.integers(0, 20),
    order=st.sampled_from(["in_turn", "drawn"]),
)
def test_more_requests_begin_with_the_same(choices, few, more, order):
    requests = make_requests(choices, few + more, 7, {}, order)
    assert requests[:few] == make_requests(choices, few, 7, {}, order)
    assert [request.seed for request in requests] == list(range(7, 7 + few + more))
    assert {request.semantic for request in requests} <= set(choices)


def test_in_turn_is_balanced_and_drawn_is_as_frequent_as_in_the_data():
    in_turn = [request.semantic for request in make_requests(range(3), 9, 0, {})]
    assert in_turn == [0, 1, 2] * 3
    drawn = [request.semantic for request in make_requests([0, 1, 1, 1], 2000, 0, {}, "drawn")]
    assert 0.70 < np.mean(drawn) < 0.80
    assert drawn != [request.semantic for request in make_requests([0, 1, 1, 1], 2000, 1, {}, "drawn")]


def test_samples_are_those_of_the_pipeline_image_by_image(class_pipeline, tmp_path):
    pipe = class_pipeline()
    requests = make_requests(range(3), 5, 10, {"flip": True})
    draw_samples(pipe, requests, SETTINGS, tmp_path, batch_size=2)
    generator = torch.Generator().manual_seed(13)
    alone = pipe(class_labels=0, flip=True, num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0]
    there = np.asarray(Image.open(tmp_path / "000003.png"), dtype=int)
    assert np.abs(there - np.asarray(alone, dtype=int)).max() <= 1  # rounding depends on the batch
    assert sorted(images(tmp_path)) == [f"{number:06d}.png" for number in range(5)]


def test_only_what_is_missing_is_drawn(class_pipeline, tmp_path):
    pipe, requests = class_pipeline(), make_requests(range(3), 7, 0, {})
    draw_samples(pipe, requests, SETTINGS, tmp_path, batch_size=3)
    whole = images(tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.png")}
    (tmp_path / "000004.png").unlink()
    calls = []
    pipe.decode = lambda *args, decode=pipe.decode: calls.append(len(args[0])) or decode(*args)
    draw_samples(pipe, requests, SETTINGS, tmp_path, batch_size=3)
    assert calls == [3]  # the batch of the missing image
    assert images(tmp_path) == whole
    changed = {file.name for file in tmp_path.glob("*.png") if file.stat().st_mtime_ns != times[file.name]}
    assert changed == {"000004.png"}
    draw_samples(pipe, make_requests(range(3), 9, 0, {}), SETTINGS, tmp_path, batch_size=3)  # a folder may grow
    assert calls == [3, 3]
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 9


def test_a_folder_of_other_samples_is_refused(class_pipeline, randomize, tmp_path):
    pipe, requests = class_pipeline(), make_requests(range(3), 3, 0, {})
    draw_samples(pipe, requests, SETTINGS, tmp_path, batch_size=3)
    whole = images(tmp_path)
    with pytest.raises(ValueError, match=r"`guidance_scale` 2.0, not 3.0; choose another folder"):
        draw_samples(pipe, requests, SamplingSettings(2, 3.0), tmp_path, batch_size=3)
    with pytest.raises(ValueError, match=r"was drawn for .*'seed': 0.*, not .*'seed': 1"):
        draw_samples(pipe, make_requests(range(3), 3, 1, {}), SETTINGS, tmp_path, batch_size=3)
    with pytest.raises(ValueError, match="'flip': True"):
        draw_samples(pipe, make_requests(range(3), 3, 0, {"flip": True}), SETTINGS, tmp_path, batch_size=3)
    randomize(pipe.denoiser, seed=1)
    with pytest.raises(ValueError, match="`denoiser_sha256`"):
        draw_samples(pipe, requests, SETTINGS, tmp_path, batch_size=3)
    assert images(tmp_path) == whole


def test_a_folder_of_samples_is_a_captioned_image_set(text_pipeline, tmp_path):
    captions = ["a red boot", "a blue coat"]
    draw_samples(text_pipeline(), make_requests(captions, 3, 0, {}), SETTINGS, tmp_path, batch_size=3)
    rows = open_rows(tmp_path)
    assert [row["text"] for row in rows.dataset] == [captions[0], captions[1], captions[0]]
    samples = open_samples(tmp_path)
    assert samples.prompts == [captions[0], captions[1], captions[0]]
    assert samples.size == (8, 8)
    assert samples.pixels(range(1, 3)).shape == (2, 3, 8, 8)


def test_what_the_model_cannot_be_asked_is_refused(class_pipeline):
    pipe = class_pipeline()
    with pytest.raises(ValueError, match="`control` has zoom; it can have crop_size"):
        check_call(pipe, SETTINGS, {"zoom": (1, 1)})
    with pytest.raises(ValueError, match="leaves the image"):
        check_call(pipe, SETTINGS, {"crops_coords_top_left": (7, 0), "crop_size": (8, 8)})
    plain = class_pipeline(conditioning="published")
    with pytest.raises(ValueError, match=r"`control_guidance_scale` is 2.0; the model reads no control"):
        check_call(plain, SamplingSettings(2, 2.0, 2.0), {})


def test_folders_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_samples(tmp_path / "none")
    with pytest.raises(ValueError, match="must hold some images, but it holds 0"):
        open_samples(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must hold 2 images, but it holds 1"):
        open_samples(tmp_path, 2)
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"must have one size: a.png is \(8, 8\), b.png \(9, 8\)"):
        open_samples(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": 1}))
    assert open_samples(tmp_path).prompts is None
