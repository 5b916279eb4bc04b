import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.data.buckets import Buckets, default_step
from improved_ldm.data.loader import bucket_transforms
from improved_ldm.data.transforms import ImageTransform

buckets = st.builds(
    lambda parts, step, aspect: Buckets(parts * step, step, aspect),
    st.integers(4, 32),
    st.sampled_from([1, 8, 16, 64]),
    st.floats(1.8, 4),
)
sides = st.integers(1, 4000)


@given(buckets=buckets)
def test_sizes_have_the_area_and_the_limits(buckets):
    square = buckets.resolution
    assert (square, square) in buckets.sizes
    for height, width in buckets.sizes:
        assert height % buckets.step == width % buckets.step == 0
        assert max(height, width) <= buckets.max_aspect * min(height, width)
        assert abs(height * width - square**2) <= buckets.step * min(height, width) / 2
        assert (width, height) in buckets.sizes


@given(buckets=buckets, height=sides, width=sides)
def test_each_image_gets_the_bucket_that_is_nearest_in_log_ratio(buckets, height, width):
    distances = [abs(math.log(w / h * height / width)) for h, w in buckets.sizes]
    assert distances[int(buckets.nearest([(height, width)])[0])] <= min(distances) + 1e-9


@given(buckets=buckets, height=sides, width=sides, seed=st.integers(0, 99))
def test_a_sample_covers_its_bucket_and_loses_only_the_remainder(buckets, height, width, seed):
    group = int(buckets.nearest([(height, width)])[0])
    transform = bucket_transforms(ImageTransform(buckets.resolution, crop_position="random"), buckets)[group]
    control = transform.sample_control((height, width), Random(seed))
    assert control.target_size == buckets.sizes[group]
    shares = [cut / side for cut, side in zip(control.crop_size, (height, width), strict=True)]
    assert max(shares) == pytest.approx(1, abs=1e-5)  # one side is whole
    ratio = math.log(control.target_size[1] / control.target_size[0] * height / width)
    assert min(shares) == pytest.approx(math.exp(-abs(ratio)), rel=1e-4)


@given(buckets=buckets, factor=st.sampled_from([1, 2]))
def test_buckets_are_cropped_at_the_scale_of_the_area_of_a_later_stage(buckets, factor):
    target = factor * buckets.resolution
    whole = ImageTransform(buckets.resolution, "crop_at_target_scale", target_scale=target)
    for (height, width), transform in zip(buckets.sizes, bucket_transforms(whole, buckets), strict=True):
        control = transform.sample_control((4 * height, 4 * width), Random(0))  # of the bucket's own ratio
        share = min(1, math.sqrt(height * width) / target)
        assert control.crop_size == pytest.approx((share * 4 * height, share * 4 * width), rel=1e-5)


def test_images_beyond_the_limit_are_counted_and_go_to_the_ends():
    buckets = Buckets(64, 8, 2)
    sizes = [(10, 100), (100, 10), (10, 20), (20, 10), (7, 7)]
    assert buckets.beyond(sizes) == 2
    assert buckets.nearest(sizes).tolist()[:2] == [len(buckets.sizes) - 1, 0]
    assert buckets.sizes[int(buckets.nearest(np.array([(7, 7)]))[0])] == (64, 64)


@pytest.mark.parametrize("resolution", [16, 40, 64, 100, 256, 512, 1024])
def test_the_default_step_makes_buckets(resolution):
    step = default_step(resolution)
    assert resolution % step == 0 and step <= max(1, resolution // 16)
    assert len(Buckets(resolution, step).sizes) > 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((64, 12), "`bucket_step` is 12; it must divide `resolution`, which is 64"),
        ((64, 64), "leave no other size than the square"),
        ((64, 8, 1.0), "leave no other size than the square"),
        ((64, 8, 0.5), "max_aspect"),
        ((64, 8, math.nan), "max_aspect"),
        ((0, 8), "resolution"),
        ((64, 0), "bucket_step"),
    ],
)
def test_wrong_buckets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Buckets(*arguments)
