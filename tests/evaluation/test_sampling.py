import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from improved_ldm.data.sources import RowStream, open_rows
from improved_ldm.evaluation.sampling import (
    Sampler,
    SamplingSettings,
    check_settings,
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
    Sampler(pipe, requests, 2).sample(tmp_path, SETTINGS)
    generator = torch.Generator().manual_seed(13)
    alone = pipe(class_labels=0, flip=True, num_inference_steps=2, guidance_scale=2.0, generator=generator).images[0]
    there = np.asarray(Image.open(tmp_path / "000003.png"), dtype=int)
    assert np.abs(there - np.asarray(alone, dtype=int)).max() <= 1  # rounding depends on the batch
    assert sorted(images(tmp_path)) == [f"{number:06d}.png" for number in range(5)]


def test_only_what_is_missing_is_drawn(class_pipeline, tmp_path):
    pipe, requests = class_pipeline(), make_requests(range(3), 7, 0, {})
    Sampler(pipe, requests, 3).sample(tmp_path, SETTINGS)
    whole = images(tmp_path)
    times = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.png")}
    (tmp_path / "000004.png").unlink()
    calls = []
    pipe.decode = lambda *args, decode=pipe.decode: calls.append(len(args[0])) or decode(*args)
    Sampler(pipe, requests, 3).sample(tmp_path, SETTINGS)
    assert calls == [3]  # the batch of the missing image
    assert images(tmp_path) == whole
    changed = {file.name for file in tmp_path.glob("*.png") if file.stat().st_mtime_ns != times[file.name]}
    assert changed == {"000004.png"}
    Sampler(pipe, make_requests(range(3), 9, 0, {}), 3).sample(tmp_path, SETTINGS)  # a folder can be extended
    assert calls == [3, 3]
    assert len((tmp_path / "metadata.jsonl").read_text(encoding="utf-8").splitlines()) == 9


def test_a_folder_of_other_samples_is_refused(class_pipeline, randomize, tmp_path):
    pipe, requests = class_pipeline(), make_requests(range(3), 3, 0, {})
    Sampler(pipe, requests, 3).sample(tmp_path, SETTINGS)
    whole = images(tmp_path)
    with pytest.raises(ValueError, match=r"`guidance_scale` 2.0, not 3.0; choose another folder"):
        Sampler(pipe, requests, 3).sample(tmp_path, SamplingSettings(2, 3.0))
    with pytest.raises(ValueError, match=r"was sampled for .*'seed': 0.*, not .*'seed': 1"):
        Sampler(pipe, make_requests(range(3), 3, 1, {}), 3).sample(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="'flip': True"):
        Sampler(pipe, make_requests(range(3), 3, 0, {"flip": True}), 3).sample(tmp_path, SETTINGS)
    randomize(pipe.denoiser, seed=1)
    with pytest.raises(ValueError, match="`denoiser_sha256`"):
        Sampler(pipe, requests, 3).sample(tmp_path, SETTINGS)
    assert images(tmp_path) == whole


@pytest.mark.parametrize(
    "changes",
    [
        {"text_padding": "zero"},
        {"text_noise_scale": 0.1},
        {"max_text_tokens": 8},
        {"default_original_size": 16},
    ],
)
def test_a_folder_of_a_pipeline_with_other_settings_is_refused(text_pipeline, tmp_path, changes):
    pipe, requests = text_pipeline(), make_requests(["a red boot"], 2, 0, {})
    Sampler(pipe, requests, 2).sample(tmp_path, SETTINGS)
    pipe.register_to_config(**changes)
    (name,) = changes
    with pytest.raises(ValueError, match=f"`{name}` .*; choose another folder"):
        Sampler(pipe, requests, 2).check_folder(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["vae", "text_encoder"])
def test_a_folder_of_other_weights_is_refused(text_pipeline, tmp_path, name):
    pipe, requests = text_pipeline(), make_requests(["a red boot"], 2, 0, {})
    Sampler(pipe, requests, 2).sample(tmp_path, SETTINGS)
    other = copy.deepcopy(getattr(pipe, name))
    next(other.parameters()).data.add_(1)
    pipe.register_modules(**{name: other})
    with pytest.raises(ValueError, match=f"`{name}_sha256`"):
        Sampler(pipe, requests, 2).check_folder(tmp_path, SETTINGS)


def test_a_folder_of_samples_is_a_captioned_image_set(text_pipeline, tmp_path):
    captions = ["a red boot", "a blue coat"]
    Sampler(text_pipeline(), make_requests(captions, 3, 0, {}), 3).sample(tmp_path, SETTINGS)
    rows = open_rows(tmp_path)
    read = [row.caption for row in RowStream(rows, shuffle_window=0, repeat=False)]
    assert read == [captions[0], captions[1], captions[0]]
    samples = open_samples(tmp_path)
    assert samples.prompts == [captions[0], captions[1], captions[0]]
    assert samples.size == (8, 8)
    assert samples.pixels(range(1, 3)).shape == (2, 3, 8, 8)


def test_what_the_model_cannot_be_asked_is_refused(class_pipeline):
    pipe = class_pipeline()
    with pytest.raises(ValueError, match="`control` has zoom; valid keys are colour, crop_size"):
        check_settings(pipe, SETTINGS, {"zoom": (1, 1)})
    with pytest.raises(ValueError, match="leaves the image"):
        check_settings(pipe, SETTINGS, {"crops_coords_top_left": (7, 0), "crop_size": (8, 8)})
    plain = class_pipeline(conditioning="published")
    with pytest.raises(ValueError, match=r"`control_guidance_scale` is 2.0; the model reads no control"):
        check_settings(plain, SamplingSettings(2, 2.0, 2.0), {})
    with pytest.raises(ValueError, match="`num_inference_steps` is 2000; DDIMScheduler refuses it"):
        check_settings(pipe, SamplingSettings(2000, 2.0), {})
    with pytest.raises(ValueError, match="`num_inference_steps` is 0; it must be an integer ≥ 1"):
        check_settings(pipe, SamplingSettings(0, 2.0), {})


def test_folders_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        open_samples(tmp_path / "none")
    with pytest.raises(ValueError, match="must contain some images, but it contains 0"):
        open_samples(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="must contain 2 images, but it contains 1"):
        open_samples(tmp_path, 2)
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"must have equal sizes, but a.png is \(8, 8\) and b.png is \(9, 8\)"):
        open_samples(tmp_path)
    (tmp_path / "b.png").unlink()
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "label": 1}), encoding="utf-8")
    assert open_samples(tmp_path).prompts is None


TEXTS = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0bb\x0cc", "é", 'a "b"\n c', "plain"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("change", ["", "blank lines", "another key", "a line without file_name", "paths"])
def test_any_prompt_comes_back_from_a_folder(text_pipeline, tmp_path, text, change):
    requests = make_requests([text], 2, 0, {})
    sampler = Sampler(text_pipeline(), requests, 2)
    sampler.sample(tmp_path, SETTINGS)
    file = tmp_path / "metadata.jsonl"
    lines = file.read_text(encoding="utf-8")
    changed = {
        "blank lines": lines.replace("\n", "\n\n") + "  \n",
        "another key": lines.replace("file_name", "image_file_name"),
        "a line without file_name": lines + '{"text": "of nothing"}\n{"file_name": ["0.png"]}\n',
        "paths": lines.replace('"file_name": "', '"file_name": "./'),
    }
    file.write_text(changed.get(change, lines), encoding="utf-8")
    assert open_samples(tmp_path).prompts == [text] * 2
    if change in ("", "blank lines"):
        sampler.check_folder(tmp_path, SETTINGS)


def test_hidden_files_and_folders_are_no_samples(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"of another system")
    (tmp_path / "b.png").mkdir()
    assert open_samples(tmp_path).files == [tmp_path / "a.png"]


def test_sizes_are_those_of_upright_images(tmp_path):
    for name, orientation in (("a.jpg", 6), ("b.png", 8), ("c.webp", 5)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.new("RGB", (8, 4)).save(tmp_path / name, exif=exif)
    Image.new("RGB", (4, 8)).save(tmp_path / "d.png")
    samples = open_samples(tmp_path)
    assert samples.size == (8, 4) and samples.pixels(range(4)).shape == (4, 3, 8, 4)
    exif[0x0112] = 9
    Image.new("RGB", (8, 4)).save(tmp_path / "e.jpg", exif=exif)
    with pytest.raises(ValueError, match=r"a.jpg is \(8, 4\) and e.jpg is \(4, 8\)"):
        open_samples(tmp_path)


def test_a_damaged_sample_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"a\.png cannot be read: UnidentifiedImageError"):
        open_samples(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "te', encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: it must be a JSON object"):
        open_samples(tmp_path)
