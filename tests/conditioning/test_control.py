import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from improved_ldm.conditioning.control import (
    COLUMNS,
    CONTROL_INPUTS,
    CONTROL_PARTS,
    DEFAULT_PARTS,
    INPUTS_OF_PARTS,
    NUM_CONTROL,
    VARIABLES,
    Control,
    control_columns,
    control_tensor,
    null_control,
    required_columns,
)
from improved_ldm.conditioning.control_embedding import (
    ControlEmbedding,
    control_weight,
    high_level_variables,
    low_level_variables,
    pixart_sizes,
    sdxl_sizes,
)

POWER = st.floats(0.05, 20)
TIMESTEP = st.floats(0, 1000)
EXTENT = st.floats(1, 4096, width=32)
WHOLE = Control((64, 96), (8, 16), (32, 48), (32, 48))


@st.composite
def controls(draw):
    crop_size = draw(st.tuples(EXTENT, EXTENT))
    corner = draw(st.tuples(*[st.floats(0, 4096, width=32)] * 2))
    margin = draw(st.tuples(*[st.floats(0, 4096, width=32)] * 2))
    original_size = tuple(sum(sides) for sides in zip(crop_size, corner, margin, strict=True))
    return Control(original_size, corner, crop_size, draw(st.tuples(*[st.integers(1, 4096)] * 2)), draw(st.booleans()))


def weight(timestep, kind, power=1.0):
    return control_weight(torch.tensor([timestep]), kind, power).item()


@given(POWER)
def test_cosine_weight_runs_from_one_at_data_to_zero_at_noise(power):
    assert weight(0.0, "cosine", power) == 1
    assert weight(1000.0, "cosine", power) == 0


@given(TIMESTEP, TIMESTEP, POWER, st.sampled_from(["cosine", "linear", "constant", "zero"]))
def test_weight_falls_with_the_timestep_and_stays_between_zero_and_one(first, second, power, kind):
    early, late = sorted((first, second))
    assert 0 <= weight(late, kind, power) <= weight(early, kind, power) <= 1


@given(TIMESTEP, st.floats(1, 10), st.floats(1, 10))
def test_a_larger_power_is_steeper(timestep, power, factor):
    assert weight(timestep, "cosine", power * factor) <= weight(timestep, "cosine", power) + 1e-6


@given(TIMESTEP)
def test_the_other_weights_are_their_formulas(timestep):
    assert weight(timestep, "linear") == pytest.approx(1 - timestep / 1000, abs=1e-6)
    assert weight(timestep, "constant") == 1
    assert weight(timestep, "zero") == 0


def test_cosine_weight_is_its_formula():
    timestep = torch.tensor([0, 250, 500, 750, 1000])
    expected = torch.tensor([1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0]) ** 3
    assert_close(control_weight(timestep, "cosine", 3.0), expected)


def test_unknown_weight_is_an_error():
    with pytest.raises(ValueError, match="'sine'"):
        control_weight(torch.zeros(1), "sine")
    with pytest.raises(ValueError, match="'sine'"):
        ControlEmbedding(8, "sine", 1.0, 1000)


@given(controls())
def test_the_columns_of_a_tensor_are_the_values_of_its_records(control):
    columns = control_columns(control_tensor([control]))._asdict()
    for row in VARIABLES:
        values = [columns[name].item() for name in row.columns]
        assert_close(torch.tensor(values), torch.tensor(row.numbers(getattr(control, row.name))), equal_nan=True)


def test_the_layout_begins_as_stored_tensors_do():
    assert COLUMNS[:9] == (
        *("original_height", "original_width", "crop_top", "crop_left", "crop_height", "crop_width"),
        *("target_height", "target_width", "flip"),
    )
    assert len(set(COLUMNS)) == NUM_CONTROL


def test_control_tensor_stacks_records():
    assert control_tensor([WHOLE] * 3).shape == (3, NUM_CONTROL)
    assert control_tensor([WHOLE]).dtype == torch.float32


def test_whole_image_has_no_crop():
    control = Control.of_whole_image((20, 30), (10, 15), flip=True)
    assert control == Control((20, 30), (0, 0), (20, 30), (10, 15), True)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (((-1, 8), (0, 0), (8, 8), (8, 8)), "original_size"),
        (((0, 8), (0, 0), (8, 8), (8, 8)), "original_size"),
        (((float("nan"), 8), (0, 0), (8, 8), (8, 8)), "original_size"),
        (((8,), (0, 0), (8, 8), (8, 8)), "original_size"),
        ((8, (0, 0), (8, 8), (8, 8)), "original_size"),
        (((8, 8), (0, -1), (8, 8), (8, 8)), "crops_coords_top_left"),
        (((8, 8), (0, 1), (8, 8), (8, 8)), "crop_size"),
        (((8, 8), (0, 0), (9, 8), (8, 8)), "crop_size"),
        (((8, 8), (0, 0), (8, 0), (8, 8)), "crop_size"),
        (((8, 8), (0, 0), (8, 8), (8, 8, 8)), "target_size"),
        (((8, 8), (0, 0), (8, 8), (float("inf"), 8)), "target_size"),
        (((8, 8), (0, 0), (8, 8), (8, 8), 2), "flip"),
        (((8, 8), (0, 0), (8, 8), (8, 8), "no"), "flip"),
    ],
)
def test_impossible_records_are_errors_that_name_the_argument(arguments, name):
    with pytest.raises(ValueError, match=name):
        Control(*arguments)


def test_the_columns_of_optional_variables_may_be_left_out():
    control = control_tensor([Control.of_whole_image((40, 30), (8, 8), flip=True)])
    short, whole = control_columns(required_columns(control)), control_columns(control)
    assert_close(short, whole, equal_nan=True)
    assert torch.stack(short).isnan().any()


@pytest.mark.parametrize("length", [0, NUM_CONTROL - 1, NUM_CONTROL + 1])
def test_a_tensor_of_another_layout_is_an_error(length):
    with pytest.raises(
        ValueError, match=f"`control` has {length} columns; it must have {NUM_CONTROL}: original_height"
    ):
        control_columns(torch.ones(2, length))


@given(controls(), st.sampled_from([0.125, 0.5, 2, 16]))
def test_scaling_the_image_with_its_crop_leaves_the_high_level_variables(control, factor):
    def scaled(pair):
        return tuple(factor * value for value in pair)

    other = Control(
        scaled(control.original_size),
        scaled(control.crops_coords_top_left),
        scaled(control.crop_size),
        control.target_size,
        control.flip,
    )
    assert_close(high_level_variables(control_tensor([other])), high_level_variables(control_tensor([control])))


def test_high_level_variables_are_fractions_of_their_own_side():
    image = Control((64, 128), (8, 16), (32, 32), (32, 32))
    _, top, left, height, width, _ = high_level_variables(control_tensor([image]))[0]
    assert top == left and height == 4 * top and width == 2 * left


@pytest.mark.parametrize("column", range(NUM_CONTROL))
def test_every_column_reaches_the_variables(column):
    known = control_tensor([WHOLE]).nan_to_num(0.5)
    other = known.clone()
    other[0, column] += 1
    for row in VARIABLES:
        if COLUMNS[column] in row.columns:
            variables = {"high": high_level_variables, "low": low_level_variables}[row.level]
            assert not torch.equal(variables(known, CONTROL_PARTS), variables(other, CONTROL_PARTS))


def test_the_default_variables_and_their_order_are_those_of_saved_weights():
    control = Control((64, 128), (16, 32), (32, 32), (32, 64), flip=True)
    fractions = [64 * value for value in (16 / 64, 32 / 128, 32 / 64, 32 / 128)]
    assert high_level_variables(control_tensor([control])).tolist() == [[64, *fractions, 16]]
    assert low_level_variables(control_tensor([control])).tolist() == [[16 * 6, 16 * 7]]
    assert DEFAULT_PARTS == ("size", "crop", "flip")


@given(controls())
def test_sdxl_sizes_tell_the_image_the_corner_and_the_target(control):
    original, corner, target = sdxl_sizes(control_tensor([control]))[0].double().view(3, 2)
    assert original.tolist() == pytest.approx(control.original_size)
    assert target.tolist() == pytest.approx(control.target_size)
    for side in range(2):  # in pixels at the scale of the target
        scale = control.target_size[side] / control.crop_size[side]
        assert corner[side].item() == pytest.approx(control.crops_coords_top_left[side] * scale, rel=1e-5)


def test_sdxl_sizes_of_a_crop_without_scaling_are_its_own_numbers():
    control = Control((512, 768), (16, 40), (256, 384), (256, 384), flip=True)
    assert sdxl_sizes(control_tensor([control])).tolist() == [[512, 768, 16, 40, 256, 384]]


def test_sdxl_sizes_count_the_corner_at_the_scale_of_the_target():
    control = Control((512, 768), (16, 40), (256, 384), (128, 96))
    assert sdxl_sizes(control_tensor([control])).tolist() == [[512, 768, 8, 10, 128, 96]]


@given(controls())
def test_pixart_sizes_are_the_target_and_its_height_over_width(control):
    height, width = control.target_size
    sizes = pixart_sizes(control_tensor([control]))[0]
    assert sizes.tolist() == pytest.approx([height, width, height / width])


@pytest.mark.parametrize(("sizes", "number"), [(sdxl_sizes, 6), (pixart_sizes, 3)], ids=["sdxl", "pixart"])
def test_published_sizes_of_a_null_row_are_zero(sizes, number):
    rows = sizes(torch.cat([null_control(1), control_tensor([WHOLE])]))
    assert rows.shape == (2, number) and rows.dtype == torch.float32
    assert rows[0].tolist() == [0] * number
    assert_close(rows[1:], sizes(control_tensor([WHOLE])), rtol=0, atol=0)
    assert (rows[1] > 0).all()


def embedding(randomize, weight="cosine"):
    return randomize(ControlEmbedding(16, weight, 1.0, 1000))


def added(model, control, timestep):
    """The part of the modulation embedding that comes from the control."""
    high, gamma, low = model(control, timestep)
    return high + gamma * low


def test_embedding_starts_at_zero():
    fresh = ControlEmbedding(16, "cosine", 1.0, 1000)
    rows = torch.cat([control_tensor([WHOLE]), null_control(1)])
    assert torch.equal(added(fresh, rows, torch.tensor([0, 500])), torch.zeros(2, 16))


def test_null_rows_give_the_learned_null(randomize):
    model = embedding(randomize)
    rows = torch.cat([null_control(1), control_tensor([WHOLE])])
    nulls = model.high_level.null + model.low_level.null
    output = added(model, rows, torch.zeros(2))
    assert output.shape == (2, 16)
    assert_close(output[0], nulls)
    assert (output[1] - nulls).abs().max() > 1e-3


def test_null_rows_leave_every_gradient_finite(randomize):
    model = embedding(randomize)
    added(model, torch.cat([null_control(1), control_tensor([WHOLE])]), torch.zeros(2)).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model.high_level.null.grad.abs().max() > 0


def test_original_size_acts_at_data_and_not_at_noise(randomize):
    model = embedding(randomize)
    small, large = (control_tensor([Control.of_whole_image(size, (32, 32))]) for size in ((32, 32), (256, 256)))
    assert_close(
        added(model, small, torch.tensor([1000.0])), added(model, large, torch.tensor([1000.0])), rtol=0, atol=0
    )
    assert (added(model, small, torch.zeros(1)) - added(model, large, torch.zeros(1))).abs().max() > 1e-3


def test_flip_acts_at_every_timestep(randomize):
    model = embedding(randomize)
    plain, mirrored = (control_tensor([Control.of_whole_image((32, 32), (32, 32), flip)]) for flip in (False, True))
    for timestep in (0, 500, 1000):
        change = added(model, plain, torch.tensor([timestep])) - added(model, mirrored, torch.tensor([timestep]))
        assert change.abs().max() > 1e-3


# Changes of each part while the other parts stay the same.
CHANGED = {
    "size": Control((64, 48), (16, 8), (32, 32), (32, 32), False),
    "crop": Control((32, 24), (0, 4), (16, 16), (32, 32), False),
    "flip": Control((32, 24), (8, 4), (16, 16), (32, 32), True),
}
UNCHANGED = Control((32, 24), (8, 4), (16, 16), (32, 32), False)


@pytest.mark.parametrize("parts", [("size",), ("crop",), ("flip",), ("size", "flip"), DEFAULT_PARTS])
def test_an_embedding_sees_its_parts_alone(randomize, parts):
    model = randomize(ControlEmbedding(16, "cosine", 1.0, 1000, parts))
    plain = added(model, control_tensor([UNCHANGED]), torch.zeros(1))
    for part, control in CHANGED.items():
        change = (added(model, control_tensor([control]), torch.zeros(1)) - plain).abs().max()
        assert (change > 1e-3) == (part in parts), part
    assert model.inputs == frozenset().union(*(INPUTS_OF_PARTS[part] for part in parts))


def test_the_parts_share_out_all_inputs():
    assert frozenset().union(*INPUTS_OF_PARTS.values()) == CONTROL_INPUTS
    assert sum(map(len, INPUTS_OF_PARTS.values())) == len(CONTROL_INPUTS)


def test_an_unknown_part_is_named():
    with pytest.raises(ValueError, match=r"`control_parts` has \['zoom'\]; it may have size, crop, flip"):
        ControlEmbedding(16, "cosine", 1.0, 1000, ("size", "zoom"))
