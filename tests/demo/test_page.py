import gradio as gr
import pytest

from improved_ldm.conditioning.control import CONTROL_PARTS
from improved_ldm.demo.bundled import about_bundled, load_bundled
from improved_ldm.demo.comparison import CHOICES
from improved_ldm.demo.page import FAILURE, KEPT, build_demo


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


WHOLE = {"original_size": 8, "top": 0, "left": 0, "height": 8, "width": 8, "flip": False}
ALWAYS = {"subject", "seed", "any-seed", "guidance", "steps", "draw", "asked", "gallery"}


def test_a_page_starts_with_the_defaults_of_its_pipeline(text_pipeline):
    shown = _components(build_demo(text_pipeline()))
    assert shown.keys() == ALWAYS | {"control-guidance", "view", "plain"}
    assert shown["subject"]["name"] == "textbox"
    assert (shown["guidance"]["value"], shown["steps"]["value"]) == (2.0, 2)
    assert shown["view"]["value"] == WHOLE
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


def _draw(demo, seed=3, view=None, history=()):
    """Press the button on a page of a text model with 8 x 8 images."""
    draw = next(event.fn for event in demo.fns.values() if event.name == "draw")
    return draw([*history], "a red boot", seed, 2.0, 1.5, 2, view or WHOLE)


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
    kept = {file for drawing in history for file in (drawing.plain, drawing.asked)}
    assert {str(file) for file in demo.pictures.path.iterdir()} == kept


def test_drawings_that_made_room_leave_the_gallery(text_pipeline):
    demo = build_demo(text_pipeline())
    first, *_ = _draw(demo)
    demo.pictures.clear()
    second, shown, *_ = _draw(demo, history=first)
    assert len(second) == len(shown) == 1 and second != first


def test_the_head_names_a_folder_without_those_that_it_lies_in(text_pipeline, tmp_path):
    assert f".../{tmp_path.name} · " in str(build_demo(text_pipeline(), str(tmp_path)).config)
    assert str(tmp_path) not in str(build_demo(text_pipeline(), str(tmp_path)).config)


def test_every_control_input_that_is_read_can_be_chosen(class_pipeline):
    template = _components(build_demo(class_pipeline(control_parts=CONTROL_PARTS)))["view"]["html_template"]
    for row in CHOICES:
        assert f'name="{row.name}" data-choice' in template
        assert row.is_switch or all(f">{label}</option>" in template for label in row.shown((8, 8)))
