from dataclasses import asdict

import gradio as gr
import pytest

from improved_ldm.demo.bundled import about_bundled, load_bundled
from improved_ldm.demo.comparison import View
from improved_ldm.demo.page import FAILURE, build_demo


def _components(demo):
    """The settings of each named component of a page, those in hidden columns left out."""
    config = demo.get_config_file()
    by_id = {component["id"]: component["props"] for component in config["components"]}

    def shown(node):
        props = by_id.get(node["id"], {})
        if props.get("visible", True):
            yield props
            for child in node.get("children", ()):
                yield from shown(child)

    return {props["elem_id"]: props for props in shown(config["layout"]) if props.get("elem_id")}


ALWAYS = {"subject", "seed", "any-seed", "guidance", "steps", "draw", "asked", "gallery"}


def test_a_page_starts_with_the_defaults_of_its_pipeline(text_pipeline):
    shown = _components(build_demo(text_pipeline()))
    assert shown.keys() == ALWAYS | {"control-guidance", "view", "plain"}
    assert shown["subject"]["name"] == "textbox"
    assert (shown["guidance"]["value"], shown["steps"]["value"]) == (2.0, 2)
    whole = {"original_size": 8, "top": 0, "left": 0, "height": 8, "width": 8, "flip": False}
    assert shown["view"]["value"] == whole
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
    assert pipe.denoiser.num_parameters() < 2e6 and pipe.denoiser.dtype == pipe.vae.dtype
    assert "tiny" in about_bundled()


def _draw(demo, seed=3, view=None):
    """Press the button of a page of an 8 x 8 text model."""
    draw = next(event.fn for event in demo.fns.values() if event.name == "draw")
    return draw([], "a red boot", seed, 2.0, 1.5, 2, view or asdict(View.of_whole_image(8)))


def test_a_drawing_enters_the_history(text_pipeline):
    history, *_ = _draw(build_demo(text_pipeline()))
    assert [drawing.settings.seed for drawing in history] == [3]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": None}, "`seed` is None; it must be a whole number ≥ 0."),
        ({"view": asdict(View(8, 7, 0, 6, 8))}, "`crops_coords_top_left` 7 plus `crop_size` 6 leaves the image"),
        ({"view": {"top": 1}}, FAILURE),
        ({"seed": "secret"}, FAILURE),
    ],
)
def test_a_visitor_is_told_what_is_wrong_with_the_settings_and_nothing_else(text_pipeline, asked, message):
    with pytest.raises(gr.Error) as caught:
        _draw(build_demo(text_pipeline()), **asked)
    assert message in caught.value.message
    assert "secret" not in caught.value.message
