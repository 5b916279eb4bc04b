"""One number that stands for a resolution of two sides."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.resolution import default_size_of, latent_side, resolution_of, side_of, sides_of, size_text

SIDE = st.integers(1, 2**16)


@given(SIDE)
def test_a_square_is_its_side(side):
    assert side_of(side) == side == side_of((side, side)) and resolution_of(side, side) == side
    assert sides_of(side) == (side, side) and size_text(side) == str(side) and default_size_of(side) is None


@given(SIDE, SIDE)
def test_the_side_is_that_of_the_square_with_as_many_pixels(height, width):
    assert side_of((height, width)) == pytest.approx(math.sqrt(height * width)) == side_of((width, height))
    assert sides_of(resolution_of(height, width)) == (height, width) == sides_of([height, width])


@given(st.integers(1, 64), st.sampled_from([1, 4, 8]), st.sampled_from([1, 2, 4]))
def test_a_square_of_whole_patches_has_them_exactly(patches, factor, patch_size):
    assert latent_side(patches * factor * patch_size, factor, patch_size) == patches * patch_size


@given(SIDE, SIDE, st.sampled_from([1, 4, 8]), st.sampled_from([1, 2, 4]))
def test_a_latent_side_is_whole_patches_near_the_side(height, width, factor, patch_size):
    side = latent_side((height, width), factor, patch_size)
    assert side > 0 and side % patch_size == 0
    assert abs(side - side_of((height, width)) / factor) <= patch_size / 2 or side == patch_size


def test_a_resolution_is_named_as_height_x_width():
    assert size_text((256, 384)) == size_text([256, 384]) == "256x384" and default_size_of((256, 384)) == [256, 384]
