import json
import re

import gradio as gr
import pytest
import torch
from PIL import Image

from improved_ldm.conditioning.control import CONTROL_PARTS
from improved_ldm.demo.bundled import FOLDER, about_bundled, load_bundled
from improved_ldm.demo.comparison import CHOICES
from improved_ldm.demo.editor import picture_url
from improved_ldm.demo.page import build_demo
from improved_ldm.demo.studio import FAILURE, KEPT
from improved_ldm.picture_text import read_png_text


def _components(demo):
    """The settings of each named component of a page, except those in hidden columns."""
    config = demo.get_config_file()
    by_id = {component["id"]: component["props"] for component in config["components"]}

    def shown(node):
        props = by_id.get(node["id"], {})
        if props.get("visible", True):
            yield props
            for child in node.get("children", ()):
                yield from shown(child)

    return {props["elem_id"]: props for props in shown(config["layout"]) if props.get("elem_id")}


WHOLE = {"original_size": 8, "top": 0, "left": 0, "height": 8, "width": 8, "flip": False, "shape": ""}
AREAS = {"page", "pictures", "settings", "actions"}
ALWAYS = AREAS | {"subject", "seed", "any-seed", "guidance", "steps", "draw", "link", "asked", "gallery"}


def test_a_page_starts_with_the_defaults_of_its_pipeline(text_pipeline):
    shown = _components(build_demo(text_pipeline()))
    assert shown.keys() == ALWAYS | {"control-guidance", "view", "plain"}
    assert shown["subject"]["name"] == "textbox"
    assert (shown["guidance"]["value"], shown["steps"]["value"]) == (2.0, 2)
    first = shown["view"]["value"]
    assert first.keys() == WHOLE.keys() and first != WHOLE  # a crop
    assert shown["view"]["props"]["reads"].split() == sorted(
        ["crop_size", "crops_coords_top_left", "flip", "original_size", "target_size"]
    )


@pytest.mark.parametrize("names", [["boot", "coat", "bag"], None])
def test_a_class_model_offers_its_classes_by_name(class_pipeline, names):
    pipe = class_pipeline()
    pipe.register_to_config(class_names=names)
    subject = _components(build_demo(pipe))["subject"]
    assert subject["name"] == "dropdown"
    labels = names or ["class 0", "class 1", "class 2"]
    assert [tuple(choice) for choice in subject["choices"]] == list(zip(labels, range(3), strict=True))


def test_a_model_without_control_has_a_page_without_control(class_pipeline):
    assert _components(build_demo(class_pipeline(conditioning="published"))).keys() == ALWAYS


def test_only_the_control_that_is_read_is_shown(text_pipeline):
    pipe = text_pipeline(name="unet", conditioning="published", text_dim=96, pooled_dim=96)
    shown = _components(build_demo(pipe))
    assert "flip" not in shown["view"]["props"]["reads"].split() and "crop_size" in shown["view"]["props"]["reads"]


def test_a_page_sends_no_statistics(text_pipeline):
    assert build_demo(text_pipeline()).analytics_enabled is False


def test_the_bundled_pipeline_is_small_and_says_so():
    pipe = load_bundled()
    assert pipe.denoiser.num_parameters() < 6e6
    assert {pipe.denoiser.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    size = sum(file.stat().st_size for file in FOLDER.rglob("*") if file.is_file())
    assert size < 12e6
    assert "small model" in about_bundled() and "tropical fish" in about_bundled()


def _draw(demo, seed=3, view=None, history=()):
    """Press the button on a page of a text model with 8 x 8 images."""
    draw = next(event.fn for event in demo.fns.values() if event.name == "draw")
    return draw([*history], "a red boot", seed, 2.0, 1.5, 2, view or WHOLE)


def _first_files(demo) -> set[str]:
    shown = _components(demo)
    return {shown[name]["value"]["path"] for name in ("plain", "asked")}


def test_a_page_opens_with_its_first_pair_drawn(text_pipeline):
    demo = build_demo(text_pipeline(), prompt="a red boot")
    shown = _components(demo)
    assert shown["subject"]["value"] == "a red boot"
    plain, asked = (Image.open(shown[name]["value"]["path"]) for name in ("plain", "asked"))
    assert plain.size == asked.size == (8, 8) and plain.tobytes() != asked.tobytes()
    assert shown["view"]["props"]["picture"] == picture_url(plain)
    (entry,) = shown["gallery"]["value"]
    assert entry["image"]["path"] == asked.filename and entry["caption"].startswith("a red boot · seed 7 · ")


def test_a_first_press_draws_what_was_not_drawn_yet(text_pipeline):
    demo = build_demo(text_pipeline())
    (state,) = (block for block in demo.blocks.values() if isinstance(block, gr.State))
    (first,) = state.value
    draw_new = next(event.fn for event in demo.fns.values() if event.name == "draw_new")
    history, gallery, link, seed, _, plain, asked = draw_new(state.value, *first.settings, lambda *_, **__: None)
    assert seed == first.settings.seed + 1 and f"seed={seed}" in link and len(gallery) == 2
    assert history[0].settings == first.settings._replace(seed=seed)
    for new, old in ((plain, first.plain), (asked, first.asked)):
        assert Image.open(new).tobytes() != Image.open(old).tobytes()
    changed = first.settings._replace(guidance_scale=3.0)
    assert draw_new(history, *changed, lambda *_, **__: None)[3] == changed.seed  # something else is asked for


def test_an_image_says_how_it_was_made(text_pipeline):
    demo = build_demo(text_pipeline(), "embedded:demo")
    *_, plain, asked = _draw(demo, view=WHOLE | {"flip": True})
    texts = [read_png_text(file) for file in (plain, asked)]
    for text, is_flipped in zip(texts, (False, True), strict=True):
        assert (text["prompt"], text["seed"], text["model"]) == ("a red boot", "3", "embedded:demo")
        assert json.loads(text["control"])["flip"] is is_flipped
        assert [float(text[name]) for name in ("guidance_scale", "control_guidance_scale")] == [2.0, 1.5]
    assert _first_files(demo) and all(read_png_text(file)["seed"] == "7" for file in _first_files(demo))


def test_strips_show_what_the_scales_change(text_pipeline, class_pipeline):
    strips = [
        props["value"]
        for demo in (build_demo(text_pipeline()), build_demo(class_pipeline(conditioning="published")))
        for component in demo.get_config_file()["components"]
        if "class='strip'" in str((props := component["props"]).get("value"))
    ]
    assert len(strips) == 3 and all(strip.count("<img") == 3 for strip in strips)  # the last has no view to steer
    assert all(len(set(re.findall("src='(.*?)'", strip))) == 3 for strip in strips[:2])
    assert [re.search("how .*?(?=<)", strip)[0] for strip in strips] == [
        "how strictly the prompt holds",
        "how strongly the view acts",
        "how strictly the class holds",
    ]


def test_a_drawing_enters_the_history(text_pipeline):
    history, *_ = _draw(build_demo(text_pipeline()))
    assert [drawing.settings.seed for drawing in history] == [3]


def test_a_visitor_is_told_what_is_wrong_with_the_settings(text_pipeline, caplog):
    with pytest.raises(gr.Error) as caught:
        _draw(build_demo(text_pipeline()), seed=None)
    assert caught.value.message == "`seed` is None; it must be a whole number from 0 to 2147483647."
    assert caught.value.print_exception is False
    assert [record.getMessage() for record in caplog.records] == [f"refused: {caught.value.message}"]


def test_a_visitor_is_told_nothing_of_a_fault_of_the_server_but_the_log_is(text_pipeline):
    pipe = text_pipeline()
    demo = build_demo(pipe)
    pipe.denoiser.register_forward_pre_hook(lambda *_: {}["secret"])
    with pytest.raises(gr.Error) as caught:
        _draw(demo)
    assert caught.value.message == FAILURE and caught.value.print_exception is True
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_gallery_keeps_so_many_drawings_and_no_other_files(text_pipeline):
    demo = build_demo(text_pipeline())
    history = []
    for _ in range(KEPT + 1):
        history, *_ = _draw(demo, history=history)
    assert len(history) == KEPT
    kept = {file for drawing in history for file in (drawing.plain, drawing.asked)} | _first_files(demo)
    assert {str(file) for file in demo.pictures.path.iterdir()} == kept


def test_drawings_that_made_room_leave_the_gallery(text_pipeline):
    demo = build_demo(text_pipeline())
    first, *_ = _draw(demo)
    demo.pictures.clear()
    second, shown, *_ = _draw(demo, history=first)
    assert len(second) == len(shown) == 1 and second != first


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("{tmp_path}", "folder"),
        ("{tmp_path}/", "folder"),
        ("runs/quickstart", "quickstart"),
        ("../other/runs/quickstart", "quickstart"),
        ("file://{tmp_path}", "folder"),
        ("user/model", "user/model"),
        ("embedded:demo", "embedded:demo"),
    ],
)
def test_the_page_names_a_pipeline_without_folders(text_pipeline, tmp_path, monkeypatch, place, name):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "folder"
    for path in (folder, tmp_path / "runs" / "quickstart"):
        path.mkdir(parents=True)
    page = build_demo(text_pipeline(), place.format(tmp_path=folder))
    config = str(page.config)
    assert f"<p>{name} · " in config and str(folder) not in config and "runs/" not in config
    assert page.title == "improved_ldm"


def test_every_control_input_that_is_read_can_be_chosen(class_pipeline):
    template = _components(build_demo(class_pipeline(control_parts=CONTROL_PARTS)))["view"]["html_template"]
    for row in CHOICES:
        assert f'name="{row.name}" data-choice' in template
        assert row.is_switch or all(f">{label}</option>" in template for label in row.shown((8, 8)))
