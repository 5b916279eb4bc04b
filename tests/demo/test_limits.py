import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.conditioning.control import CONTROL_INPUTS, CONTROL_PARTS, RECTANGLE
from improved_ldm.demo.comparison import CHOICES, view_arguments, whole_view
from improved_ldm.demo.limits import Limits, Range, shown

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=50),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
NAMES = ("prompt", "seed", "guidance_scale", "control_guidance_scale", "num_inference_steps", "view")
WHOLE = whole_view(8, CONTROL_INPUTS)
GOOD = ("a boot", 3, 2.0, 1.0, 2, WHOLE)


@pytest.fixture(scope="module")
def ranges():
    return [Range(0, 10), Range(1, 100, whole=True), Range(0.5, 0.75)]


@given(ANYTHING, st.sampled_from(range(3)))
def test_a_range_takes_its_numbers_and_nothing_else(ranges, value, index):
    valid = ranges[index]
    if type(value) in (int, float) and valid.minimum <= value <= valid.maximum and not (valid.whole and value % 1):
        assert valid.check("steps", value) == value
        return
    with pytest.raises(ValueError, match=r"^`steps` is .*; it must be a .*number from .* to .*\.$"):
        valid.check("steps", value)


def test_every_value_gives_finite_settings_or_an_error_that_names_it(text_pipeline):
    limits = Limits(text_pipeline())

    @given(ANYTHING, st.sampled_from(range(len(NAMES))))
    def check(value, index):
        values = [value if index == at else good for at, good in enumerate(GOOD)]
        try:
            settings = limits.check(*values)
        except ValueError as error:
            assert str(error).startswith((f"`{NAMES[index]}` ", f"`{NAMES[index]}.")) and "\n" not in str(error)
        else:
            assert isinstance(settings.subject, str) and all(map(math.isfinite, settings[1:5]))

    check()


@given(st.fixed_dictionaries({name: ANYTHING for name in WHOLE}))
def test_every_view_is_inside_the_image_or_an_error_that_names_a_part(whole_limits, view):
    try:
        taken = whole_limits.check(0, *GOOD[1:5], view).view
    except ValueError as error:
        assert str(error).startswith("`view.")
    else:
        side, top, left, height, width = (taken[name] for name in RECTANGLE)
        for start, extent in ((top, height), (left, width)):
            assert 0 <= start <= start + extent <= side * (1 + 1e-6) <= 8 * (1 + 1e-6)


@given(st.floats(1, 8), st.floats(0, 1), st.floats(0, 1))
def test_every_view_that_the_editor_makes_is_taken(whole_limits, size, extent, start):
    height = min(max(size * extent, 1), size)  # as computed by `change` in editor.js
    top = min(max(size * start, 0), size - height)
    view = {**whole_limits.view, "original_size": size, "top": top, "height": height, "width": size}
    assert whole_limits.check(0, *GOOD[1:5], view).view == view


@pytest.fixture(scope="module")
def whole_limits(autoencoder, tiny_denoiser):
    """The limits of a page with 8 x 8 images and 3 classes."""
    from improved_ldm import ImprovedLDMPipeline
    from improved_ldm.diffusion.schedules import variance_preserving_scheduler

    pipe = ImprovedLDMPipeline(
        vae=autoencoder,
        transformer=tiny_denoiser("dit", num_classes=3),
        scheduler=variance_preserving_scheduler("epsilon"),
        class_names=["boot", "coat", "bag"],
    )
    return Limits(pipe)


@pytest.mark.parametrize(("label", "number"), [(0, 0), (2, 2), (1.0, 1), ("bag", 2)])
def test_a_class_is_a_number_or_a_name(whole_limits, label, number):
    assert whole_limits.check(label, *GOOD[1:]).subject == number


@pytest.mark.parametrize("label", [-1, 3, 0.5, "shoe", "1", True, None, [0], float("nan")])
def test_what_is_no_class_is_refused(whole_limits, label):
    with pytest.raises(ValueError, match=r"^`class_labels` is .*; it must be a whole number from 0 to 2"):
        whole_limits.check(label, *GOOD[1:])


def test_the_defaults_of_a_pipeline_are_within_its_limits(text_pipeline):
    pipe = text_pipeline()
    pipe.register_to_config(default_guidance_scale=17.5, default_num_inference_steps=250)
    limits = Limits(pipe)
    assert limits.guidance_scale.check("a", 17.5) == 17.5 and limits.num_inference_steps.check("a", 250) == 250


@given(ANYTHING)
def test_a_shown_value_is_short_and_on_one_line(value):
    line = shown(value)
    assert len(line.splitlines()) <= 1 and len(line) < 1000


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: row.name)
def test_a_choice_is_one_of_the_shown_values(class_pipeline, row):
    limits = Limits(class_pipeline(control_parts=CONTROL_PARTS))
    choices = [False, True] if row.is_switch else ["", *row.shown((8, 8))]
    for choice in choices:
        view = limits.check(0, *GOOD[1:5], {**WHOLE, row.name: choice}).view
        assert view[row.name] == choice
        asked = view_arguments(view, CONTROL_INPUTS).get(row.name)
        assert bool(asked) == bool(choice)
    for choice in ("?", 7, None, [choices[-1]]):
        with pytest.raises(ValueError, match=f"^`view.{row.name}` is .*; it must be "):
            limits.check(0, *GOOD[1:5], {**WHOLE, row.name: choice})


def test_choices_that_are_left_out_are_as_by_default(class_pipeline):
    limits = Limits(class_pipeline(control_parts=CONTROL_PARTS))
    rectangle = {name: WHOLE[name] for name in RECTANGLE}
    assert limits.check(0, *GOOD[1:5], rectangle).view == limits.view


@pytest.mark.parametrize("shape", ["9x9", None, 3, True, ["8x8"], "8×8"])
def test_a_shape_is_one_of_the_pipeline(whole_limits, shape):
    with pytest.raises(ValueError, match=r"^`view.shape` is .*; it must be one of \[''\]"):
        whole_limits.check(0, *GOOD[1:5], WHOLE | {"shape": shape})
