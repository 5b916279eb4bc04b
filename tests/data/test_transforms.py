import math
from collections import Counter
from random import Random
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from improved_ldm.conditioning.control import Control, control_tensor
from improved_ldm.data.images import EXIF_ORIENTATION, JPEG_FACTORS, TURNS, read_image
from improved_ldm.data.resize import resized
from improved_ldm.data.transforms import CropPolicy, ImageTransform, pixel_values, render, to_pixels
from tests.data.sets import encode

SIDE = st.integers(5, 150)


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def gradient(height, width):
    """An image whose red value is the row and whose green value is the column, as fractions of the sides."""
    rows, columns = np.mgrid[0:height, 0:width]
    channels = [(rows + 0.5) / height * 255, (columns + 0.5) / width * 255, 0 * rows]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


@st.composite
def transforms(draw, may_reduce=True):
    policy = draw(st.sampled_from(get_args(CropPolicy)))
    resolution = (draw(st.integers(4, 48)), draw(st.integers(4, 48)))
    enlarged = draw(st.floats(1, 2))
    return ImageTransform(
        resolution=resolution,
        crop_policy=policy,
        crop_position=draw(st.sampled_from(["random", "centre"])),
        min_crop=draw(st.floats(0.1, 1)) if policy == "crop_then_resize" else 1.0,
        flip_probability=0.5,
        reduce_probability=0.5 if may_reduce else 0.0,
        min_original_size=draw(st.integers(1, 60)),
        target_scale=tuple(math.ceil(side * enlarged) for side in resolution) if "target" in policy else None,
    )


@given(transforms(), SIDE, SIDE, st.integers(0, 2**63 - 1))
@settings(max_examples=150, deadline=None)
def test_record_of_a_sample_renders_the_same_pixels(transform, height, width, seed):
    image = noise(height, width)
    pixels, control = transform(image, Random(seed))
    assert pixels.shape == (3, *transform.sample_size) and pixels.dtype == torch.uint8
    assert torch.equal(render(image, control), pixels)
    row = control_tensor([control])[0].double()
    assert_close(row, torch.tensor(control.to_row(), dtype=torch.float64), rtol=0, atol=0, equal_nan=True)


@given(transforms(), SIDE, SIDE, st.integers(0, 2**63 - 1))
@settings(max_examples=150, deadline=None)
def test_record_stays_inside_the_image(transform, height, width, seed):
    control = transform.sample_control((height, width), Random(seed))
    for axis, side in enumerate((height, width)):
        start, extent = control.crops_coords_top_left[axis], control.crop_size[axis]
        whole = control.original_size[axis]
        assert start >= 0 and extent > 0 and start + extent <= whole * (1 + 1e-6) and whole <= side
    assert min(control.original_size) >= min(transform.min_original_size, height, width)


@given(st.integers(20, 80), st.integers(20, 80), st.data())
@settings(max_examples=50, deadline=None)
def test_crop_of_the_target_size_is_a_plain_crop(height, width, data):
    image = noise(height, width)
    crop_height, crop_width = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    top, left = data.draw(st.integers(0, height - crop_height)), data.draw(st.integers(0, width - crop_width))
    control = Control((height, width), (top, left), (crop_height, crop_width), (crop_height, crop_width))
    expected = image.crop((left, top, left + crop_width, top + crop_height))
    assert torch.equal(render(image, control), to_pixels(expected))


def test_whole_pixel_box_is_a_crop_then_a_resize():
    image = noise(40, 60)
    control = Control((40, 60), (7, 11), (21, 30), (14, 20))
    expected = to_pixels(image.crop((11, 7, 41, 28)).resize((20, 14), Image.Resampling.BICUBIC))
    assert (render(image, control).int() - expected.int()).abs().max() <= 2


def test_no_pixel_outside_the_crop_is_read():
    # without the crop, an antialiasing filter would mix the white frame into the border of the sample
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (10, 20, 50, 60))
    assert render(image, Control((64, 64), (20, 10), (40, 40), (16, 16))).max() == 0
    assert render(image, Control((64, 64), (20.3, 10.2), (39.5, 39.5), (16, 16))).max() == 0


@given(transforms(), st.integers(60, 200), st.integers(60, 200), st.integers(0, 2**63 - 1))
@settings(max_examples=80, deadline=None)
def test_sample_shows_what_the_record_says(transform, height, width, seed):
    pixels, control = transform(gradient(height, width), Random(seed))
    if min(control.original_size) < 16:  # too coarse to compare gradients
        return
    shown = pixels / 255
    for axis, channel in enumerate(shown[:2]):
        along = channel.mean(1 - axis)
        if axis == 1 and control.flip:
            along = along.flip(0)
        whole, start, extent = (
            control.original_size[axis],
            control.crops_coords_top_left[axis],
            control.crop_size[axis],
        )
        centre = (start + extent / 2) / whole
        assert along.mean().item() == pytest.approx(centre, abs=1 / whole + 0.01)
        assert along[-1] >= along[0]


def test_flip_is_the_mirror_image():
    image = noise(30, 50)
    plain, mirrored = ImageTransform(24), ImageTransform(24, flip_probability=1.0)
    pixels, control = plain(image, Random(0))
    flipped, flipped_control = mirrored(image, Random(0))
    assert torch.equal(flipped, pixels.flip(-1))
    assert not control.flip and flipped_control.flip


def test_reduction_loses_detail_and_is_recorded():
    image = noise(128, 192)
    transform = ImageTransform(64, reduce_probability=1.0, min_original_size=16)
    sizes = []
    for seed in range(200):
        pixels, control = transform(image, Random(seed))
        height, width = control.original_size
        sizes.append(height)
        assert 16 <= height <= 128 and abs(width - 1.5 * height) <= 1
        expected = Image.fromarray(resized(image, (height, width)))
        whole = Control((height, width), control.crops_coords_top_left, control.crop_size, (64, 64))
        assert torch.equal(pixels, render(expected, whole))
    octaves = np.histogram(np.log2(sizes), bins=3, range=(4, 7))[0]
    assert octaves.min() > 45  # log-uniform: a third in each interval


def test_image_decoded_smaller_is_cropped_at_the_same_place():
    image = gradient(240, 320)
    control = Control((240, 320), (60, 80), (120, 160), (24, 32))
    small = render(image.resize((160, 120), Image.Resampling.BOX), control)
    assert (small.int() - render(image, control).int()).abs().max() <= 2


@given(transforms(may_reduce=False), st.integers(5, 900), st.integers(5, 900), st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_crops_start_at_whole_pixels_of_every_decoded_size(transform, height, width, seed):
    encoded = encode(Image.new("RGB", (width, height)), "jpeg")
    small, size = read_image(encoded, transform.decode_size)
    factor = next(one for one in JPEG_FACTORS if small.size == (math.ceil(width / one), math.ceil(height / one)))
    control = transform.sample_control(size, Random(seed))
    assert all(start % factor == 0 for start in control.crops_coords_top_left)


@pytest.mark.parametrize("policy", ["resize_then_crop", "crop_then_resize"])
@pytest.mark.parametrize("size", [(100, 199), (450, 131), (64, 640), (30, 45)])
def test_crops_are_uniform_over_places_a_pixel_of_the_sample_apart(policy, size):
    transform = ImageTransform(32, policy, "random")
    scale, axis = min(size) / 32, size.index(max(size))
    free = max(size) - min(size)
    controls = [transform.sample_control(size, Random(seed)) for seed in range(4000)]
    places = Counter(control.crops_coords_top_left[axis] for control in controls)
    steps = np.diff(sorted(places))
    assert steps.min() == steps.max() <= max(scale, 1)
    assert min(places) == 0 and free - steps[0] < max(places) <= free
    expected = 4000 / len(places)
    assert all(abs(count - expected) < 5 * expected**0.5 for count in places.values())
    centre = ImageTransform(32, policy).sample_control(size, Random(0)).crops_coords_top_left[axis]
    assert abs(centre - free / 2) <= max(scale, 1)


def wave(height, width):
    """An image that is smooth, and brightest at points that are far apart, so that a shift shows."""
    rows, columns = np.mgrid[0:height, 0:width] + 0.5
    values = 127 + 120 * np.sin(rows / 9) * np.sin(columns / 9)
    return Image.fromarray(np.stack([values] * 3, -1).round().astype(np.uint8))


@pytest.mark.parametrize("orientation", [1, *TURNS])
@pytest.mark.parametrize("size", [(256, 384), (255, 383), (257, 391), (390, 263)])
def test_a_jpeg_image_that_is_decoded_smaller_is_cropped_at_the_same_place(size, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    encoded = encode(wave(*size), "jpeg", quality=98, exif=exif)
    for seed in range(4):
        transform = ImageTransform(48, crop_position="random")
        small, original = read_image(encoded, transform.decode_size)
        pixels, control = transform(small, Random(seed), original)
        whole, same = transform(read_image(encoded)[0], Random(seed))
        assert control == same
        assert (pixels.int() - whole.int()).abs().float().mean() < 1.5


def test_resize_then_crop_at_the_target_height_copies_pixels():
    image = noise(32, 48)
    pixels, control = ImageTransform(32, crop_position="random")(image, Random(3))
    left = int(control.crops_coords_top_left[1])
    assert control.crops_coords_top_left[1] == left and control.crop_size == (32, 32)
    assert torch.equal(pixels, to_pixels(image.crop((left, 0, left + 32, 32))))


def test_defaults_leave_nothing_to_chance():
    image = noise(50, 80)
    transform = ImageTransform(24)
    (first, record), (second, _) = transform(image, Random(1)), transform(image, Random(2))
    assert torch.equal(first, second)
    assert record.crop_size == (50, 50) and record.crops_coords_top_left[1] == pytest.approx(15, abs=2)


def test_extent_is_uniform_above_min_crop():
    transform = ImageTransform(32, "crop_then_resize", "random", min_crop=0.5)
    extents = [transform.sample_control((1000, 1500), Random(seed)).crop_size[0] for seed in range(400)]
    assert 500 <= min(extents) < 520 and 980 < max(extents) <= 1000 and np.mean(extents) == pytest.approx(750, abs=25)


def test_pixels_span_minus_one_to_one():
    image = Image.new("RGB", (2, 1))
    image.putpixel((1, 0), (255, 255, 255))
    assert pixel_values(to_pixels(image)).unique().tolist() == [-1.0, 1.0]


def test_pixel_values_are_those_of_float32_arithmetic():
    every = torch.arange(256, dtype=torch.uint8)
    expected = every.numpy().astype(np.float32) / np.float32(127.5) - np.float32(1)
    assert np.array_equal(pixel_values(every).numpy(), expected)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"resolution": 0}, "resolution"),
        ({"resolution": (32, 32, 3)}, "resolution"),
        ({"crop_policy": "stretch"}, "crop_policy"),
        ({"crop_position": "left"}, "crop_position"),
        ({"crop_policy": "crop_then_resize", "min_crop": 0.0}, "min_crop"),
        ({"crop_policy": "resize_then_crop", "min_crop": 0.5}, "min_crop"),
        ({"flip_probability": 1.5}, "flip_probability"),
        ({"reduce_probability": 0.5}, "min_original_size"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**{"resolution": 32, **arguments})


@given(st.tuples(*[st.integers(0, 255)] * 3), st.integers(0, 2**63 - 1))
def test_the_record_has_the_colour_of_the_sample_or_none(rgb, seed):
    image = Image.new("RGB", (16, 16), rgb)
    image.paste("black", (0, 0, 8, 16))
    _, control = ImageTransform(16, measured=["colour"])(image, Random(seed))
    luminance = np.dot(rgb, (0.299, 0.587, 0.114)) / 255 / 2  # of both halves
    saturation = (max(rgb) - min(rgb)) / max(*rgb, 1) / 2
    known = [luminance, luminance, saturation, saturation]
    assert control.colour is None or control.colour == pytest.approx(known, abs=0.5 / 255)


def test_one_sample_in_ten_has_no_colour():
    image, transform = noise(8, 8), ImageTransform(8, measured=["colour"])
    unknown = [transform(image, Random(seed))[1].colour is None for seed in range(1000)]
    assert 70 < sum(unknown) < 130


def test_what_is_not_asked_for_is_not_measured():
    assert ImageTransform(8)(noise(8, 8), Random(0))[1].colour is None


@pytest.mark.parametrize("size", [(32, 64), (64, 32), (48, 40)])
def test_a_shape_is_cropped_at_the_scale_of_its_own_shape_with_the_area_of_the_target(size):
    last = (2 * size[0], 2 * size[1])
    small = ImageTransform(size, "crop_at_target_scale", target_scale=last).sample_control((400, 500), Random(0))
    whole = ImageTransform(last).sample_control((400, 500), Random(0))
    assert small.crop_size == pytest.approx([side / 2 for side in whole.crop_size], rel=1e-6)
    same = ImageTransform(last, "crop_at_target_scale", target_scale=last).sample_control((400, 500), Random(0))
    assert same.crop_size == pytest.approx(whole.crop_size, rel=1e-6)
    assert same.crops_coords_top_left == pytest.approx(whole.crops_coords_top_left, abs=1e-3)
    with pytest.raises(ValueError, match="`target_scale` is"):
        ImageTransform(last, "crop_at_target_scale", target_scale=size)
