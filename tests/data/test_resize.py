import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from improved_ldm.data.resize import RESAMPLING, resized

SIDE = st.one_of(st.integers(1, 5), st.integers(1, 300))
SEED = st.integers(0, 2**32 - 1)


def noise(height, width, seed=0, extreme=False):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(values > 127, 255, 0).astype(np.uint8) if extreme else values)


def differences(image, size, box):
    expected = image.resize(size[::-1], RESAMPLING, box)
    return np.abs(resized(image, size, box).astype(int) - np.asarray(expected))


@st.composite
def boxes(draw, height, width):
    """(left, top, right, bottom) with starts and ends at whole pixels, or between them."""
    ends = []
    for side in (width, height):
        start = draw(st.one_of(st.just(0.0), st.integers(0, side - 1), st.floats(0, side * 0.9)))
        ends.append((start, draw(st.one_of(st.just(side), st.floats(start + side / 100, side)))))
    (left, right), (top, bottom) = ends
    return left, top, right, bottom


@given(SIDE, SIDE, SIDE, SIDE, SEED, st.booleans(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_box_is_scaled_as_by_pil(height, width, to_height, to_width, seed, extreme, data):
    if height > 100 * width:  # PIL then scales the columns before the rows
        return
    box = data.draw(boxes(height, width))
    assert differences(noise(height, width, seed, extreme), (to_height, to_width), box).max() <= 2


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("size", [(512, 512), (256, 256), (300, 451), (61, 40), (3, 1500), (1, 1)])
def test_few_values_differ_from_those_of_pil(size, extreme):
    box = (0, 0, size[1] - 0.25, size[0] - 0.5)
    assert (differences(noise(*size, extreme=extreme), (224, 160), box) > 0).mean() < 0.01


@pytest.mark.parametrize("value", [0, 1, 127, 254, 255])
def test_one_colour_stays_the_same(value):
    for size in ((1, 1), (7, 640), (300, 200), (1000, 3)):
        image = Image.new("RGB", size[::-1], (value, 255 - value, value))
        made = resized(image, (224, 50), (0, 0, size[1] - 0.3, size[0] - 0.3))
        assert np.array_equal(made, np.broadcast_to(np.asarray(image)[0, 0], (224, 50, 3)))


def test_a_side_that_keeps_its_length_shows_a_shorter_box():
    image = noise(40, 60)
    assert differences(image, (20, 60), (0, 0, 59.25, 40)).max() <= 2
    assert differences(image, (40, 30), (0, 0, 60, 39.25)).max() <= 2


def test_a_tiny_box_costs_no_more_memory_than_its_result():
    assert resized(Image.new("RGB", (2, 2)), (64, 64), (0, 0, 1e-6, 1e-6)).shape == (64, 64, 3)


SCALE_SOME = """
import hashlib, numpy, torch
from PIL import Image
from improved_ldm.data.resize import resized
rng, digest = numpy.random.default_rng(0), hashlib.sha256()
for number in range(200):
    height, width, *size = rng.integers(1, 200, 4).tolist()
    if number % 10 == 0:
        size[number % 20 // 10] = 1
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=numpy.uint8))
    digest.update(resized(image, size, (0, 0, width, max(1, height - 0.4))).tobytes())
made = digest.hexdigest()
"""


def test_cpus_without_avx2_make_the_same_values():
    exec(SCALE_SOME, scope := {})
    script = SCALE_SOME + "print(torch.backends.cpu.get_cpu_capability(), made)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "default"}
    output = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
    assert output.split() == ["DEFAULT", scope["made"]]
