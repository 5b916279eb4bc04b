import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm import ImprovedLDMPipeline
from improved_ldm.conditioning.control import CONTROL_INPUTS, CONTROL_PARTS, Control, whole_image_size
from improved_ldm.conditioning.control_ranges import ControlRanges
from improved_ldm.demo.comparison import (
    CHOICES,
    Settings,
    View,
    compare,
    default_view,
    described,
    shapes,
    view_arguments,
    whole_view,
)


@st.composite
def views(draw):
    """Rectangles inside square images, at fractions of a pixel as computed by a browser."""
    side = draw(st.floats(1, 4096))
    height, width = (side * draw(st.floats(0.01, 1)) for _ in range(2))
    top, left = ((side - extent) * draw(st.floats(0, 1)) for extent in (height, width))
    return view_of(side, top, left, height, width, draw(st.booleans()))


def view_of(side, top, left, height, width, flip=False) -> View:
    rectangle = {"original_size": side, "top": top, "left": left, "height": height, "width": width}
    return {**rectangle, "flip": flip, "shape": ""}


@given(views())
def test_every_view_inside_the_image_is_the_control_of_the_same_rectangle(view):
    control = Control(target_size=(8, 8), **view_arguments(view, CONTROL_INPUTS))
    side, *rectangle, flip, _ = view.values()
    assert control.to_row()[:9] == [side, side, *rectangle, 8, 8, float(flip)]


@given(views(), st.sets(st.sampled_from(sorted(CONTROL_INPUTS))))
def test_a_view_asks_for_nothing_that_is_not_read(view, read):
    everything = view_arguments(view, CONTROL_INPUTS)
    assert view_arguments(view, frozenset(read)) == {name: everything[name] for name in read & everything.keys()}


def test_a_view_says_what_is_special_about_it():
    assert described(whole_view(28, CONTROL_INPUTS)) == "28 px"
    assert described(view_of(28, 2, 4.5, 20, 10, flip=True)) == "28 px · crop 20×10 at 2, 4.5 · flip"


@pytest.fixture
def settings():
    return Settings("a red boot", 3, 2.0, 1.5, 2, view_of(8, 1, 2, 6, 4, flip=True))


def _pixels(image):
    return np.asarray(image, dtype=int)


def _assert_same(one, other):
    assert (
        one.size == other.size and abs(_pixels(one) - _pixels(other)).max() <= 1
    )  # one level, because batches round differently in float32


def test_left_is_the_default_of_the_pipeline_and_right_the_asked_view(text_pipeline, settings):
    pipe = text_pipeline()
    common = {"control_guidance_scale": 1.5, "guidance_scale": 2.0, "num_inference_steps": 2}
    plain, asked = compare(pipe, settings)
    _assert_same(plain, pipe("a red boot", generator=[_generator(3)], **common).images[0])
    control = {"original_size": (8, 8), "crops_coords_top_left": (1, 2), "crop_size": (6, 4), "flip": True}
    _assert_same(asked, pipe("a red boot", generator=[_generator(3)], **common, **control).images[0])
    assert (_pixels(plain) != _pixels(asked)).any()


def test_a_default_original_size_holds_for_the_plain_image(text_pipeline, settings):
    pipe = text_pipeline()
    pipe.register_to_config(default_original_size=5)
    plain, asked = compare(pipe, settings._replace(view=whole_view(5, CONTROL_INPUTS)))
    _assert_same(plain, asked)


@pytest.fixture
def shaped_pipeline(class_pipeline):
    """A pipeline of 24 x 24 images, 3 x 3 patches, that is known to have seen aspect ratios from 1:2 to 2:1."""
    ranges = ControlRanges({})
    for size in ((12, 24), (24, 12)):
        ranges.add(torch.tensor([Control.of_whole_image(size, size, flip).to_row() for flip in (False, True)]))
    return ImprovedLDMPipeline(**class_pipeline().components, default_size=(24, 24), control_seen=ranges.record())


def test_shapes_are_those_that_the_model_is_known_to_have_seen(class_pipeline, shaped_pipeline):
    assert shapes(class_pipeline()) == {"": (8, 8)}  # nothing is known
    assert shapes(shaped_pipeline) == {
        "": (24, 24),
        "32x16": (32, 16),
        "28x20": (28, 20),
        "20x28": (20, 28),
        "16x32": (16, 32),
    }
    wide = ImprovedLDMPipeline(**shaped_pipeline.components, default_size=(16, 32))
    labels, sizes = shapes(wide).keys(), list(shapes(wide).values())
    assert sizes[0] == (16, 32) and "" in labels and "24x20" in labels and "16x32" not in labels
    assert sizes[1:] == sorted(sizes[1:], key=lambda size: size[1] / size[0])


def test_a_shape_is_drawn_and_its_whole_view_is_that_of_the_pipeline(shaped_pipeline, settings):
    side = shaped_pipeline.default_original_side
    for label, size in shapes(shaped_pipeline).items():
        view = default_view(shaped_pipeline, label)
        plain, asked = compare(shaped_pipeline, settings._replace(subject=1, view=view))
        assert (plain.height, plain.width) == size
        _assert_same(plain, asked)
        arguments = view_arguments(view, CONTROL_INPUTS, size)
        control = Control(target_size=size, **arguments)
        assert control == Control.of_whole_image(whole_image_size(size, side), size)


def test_progress_counts_the_steps(text_pipeline, settings):
    steps = []
    compare(text_pipeline(), settings, steps.append)
    assert steps == [1, 2]


@pytest.mark.parametrize("conditioning", ["disentangled", "published"])  # the published DiT does not read control
def test_class_models_are_asked_as_far_as_they_read(class_pipeline, settings, conditioning):
    pipe = class_pipeline(conditioning=conditioning)
    plain, asked = compare(pipe, settings._replace(subject=2, control_guidance_scale=1.0))
    _assert_same(plain, pipe(class_labels=2, generator=[_generator(3)], num_inference_steps=2).images[0])
    assert (_pixels(plain) == _pixels(asked)).all() == (conditioning == "published")


def test_every_choice_changes_the_drawing_and_is_said(class_pipeline, settings):
    pipe = class_pipeline(control_parts=CONTROL_PARTS)
    for row in CHOICES:
        choice = True if row.is_switch else next(iter(row.shown((8, 8))))
        view = default_view(pipe) | {row.name: choice}
        plain, asked = compare(pipe, settings._replace(subject=1, view=view))
        assert (_pixels(plain) != _pixels(asked)).any() and row.name in described(view)


def test_the_pipeline_refuses_a_view_outside_the_image(text_pipeline, settings):
    with pytest.raises(ValueError, match="`crops_coords_top_left` 7 plus `crop_size` 6 leaves the image"):
        compare(text_pipeline(), settings._replace(view=view_of(8, 7, 0, 6, 8)))


def _generator(seed):
    return torch.Generator().manual_seed(seed)
