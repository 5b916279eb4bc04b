"""Which control variables the training samples varied."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.conditioning.control import CONTROL_INPUTS, VARIABLES, Control, control_tensor, null_control
from improved_ldm.conditioning.control_ranges import ControlRanges

SQUARE = Control.of_whole_image((64, 64), (32, 32))
sides = st.integers(1, 4096)


@st.composite
def records(draw) -> Control:
    height, width = draw(sides), draw(sides)
    top, left = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    crop = (draw(st.integers(1, height - top)), draw(st.integers(1, width - left)))
    return Control((height, width), (top, left), crop, (draw(sides), draw(sides)), draw(st.booleans()))


def ranges_of(*controls: Control) -> ControlRanges:
    ranges = ControlRanges({})
    ranges.add(control_tensor(list(controls)))
    return ranges


def varied(ranges: ControlRanges) -> set[str]:
    return {row.name for row in VARIABLES if ranges.varied(row)}


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], set()),
        ([Control.of_whole_image((64, 64), (16, 16))], set()),  # the size of the samples is no quantity of its own
        ([Control.of_whole_image((65, 65), (32, 32))], set()),  # less than sinusoids resolve
        ([Control.of_whole_image((32, 32), (32, 32))], {"original_size"}),  # a whole image is cropped at any size
        ([Control.of_whole_image((64, 64), (32, 32), flip=True)], {"flip"}),
        ([Control((64, 64), (0, 0), (32, 32), (32, 32))], {"crop_size"}),
        ([Control((64, 64), (8, 0), (56, 64), (32, 32))], {"crop_size", "crops_coords_top_left"}),
        ([Control((64, 128), (0, 0), (64, 128), (32, 64))], {"original_size", "target_size"}),
        ([Control((64, 64), (0, 0), (64, 64), (32, 32), colour=(0.1, 0, 0, 0))], set()),  # known of one sample alone
    ],
)
def test_what_differs_between_samples_varies(others, expected):
    assert varied(ranges_of(SQUARE, *others)) == expected


@given(st.lists(records(), min_size=1, max_size=6), st.lists(records(), min_size=1, max_size=6))
def test_ranges_hold_their_samples_and_add_up(first, second):
    together, apart = ranges_of(*first, *second), ranges_of(*first)
    apart.widen(ranges_of(*second))
    assert together.record() == apart.record() == ControlRanges(together.record()).record()
    assert all(together.holds(row, control) for row in VARIABLES for control in (*first, *second))
    assert varied(apart) >= varied(ranges_of(*first)) | varied(ranges_of(*second))
    assert math.isfinite(sum(value for bounds in together.record().values() for part in bounds for value in part))


def test_values_far_from_the_samples_are_not_held():
    ranges = ranges_of(SQUARE, Control.of_whole_image((48, 48), (32, 32)))
    rows = {row.name: row for row in VARIABLES}
    small, cropped = Control.of_whole_image((20, 20), (32, 32)), Control((64, 64), (0, 0), (20, 20), (32, 32))
    assert not ranges.holds(rows["original_size"], small) and ranges.holds(rows["crop_size"], small)
    assert not ranges.holds(rows["crop_size"], cropped) and ranges.holds(rows["original_size"], cropped)
    assert ranges.holds(rows["original_size"], Control.of_whole_image((47, 47), (32, 32)))


def test_the_null_control_adds_nothing():
    ranges = ControlRanges({})
    ranges.add(null_control(3))
    assert ranges.record() == {} and not varied(ranges)
    ranges.add(torch.cat([null_control(1), control_tensor([SQUARE])]))
    assert ranges.record() == ranges_of(SQUARE).record()


def test_what_is_not_known_may_have_varied():
    unknown = ControlRanges(None)
    assert unknown.record() is None and varied(unknown) == CONTROL_INPUTS
    assert all(unknown.holds(row, SQUARE) for row in VARIABLES)
    seen = ranges_of(SQUARE)
    seen.widen(unknown)
    assert seen.record() is None and varied(seen) == CONTROL_INPUTS


@pytest.mark.parametrize("values", [[[0]], [[0, 1], [1, 2]], "often", 3, [["no"], ["yes"]]])
def test_a_record_that_is_none_is_refused(values):
    with pytest.raises(ValueError, match=r"`control_seen` has .* for flip; it must be two lists of 1 numbers"):
        ControlRanges({"flip": values})


def test_a_variable_of_a_later_version_is_left_out():
    assert ControlRanges({"hue": [[0], [1]], "flip": [[0], [1]]}).record() == {"flip": [[0.0], [1.0]]}
