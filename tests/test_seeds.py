"""Random numbers as a function of a seed and a position."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from improved_ldm.seeds import derive_seeds, normal, uniform


@given(
    seed=st.integers(0, 2**63 - 1),
    place=st.integers(0, 2**48),
    start=st.sampled_from([0, 1, 1 << 40]),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
@pytest.mark.parametrize("sample", [uniform, normal])
def test_a_row_does_not_depend_on_the_others(sample, seed, place, start, shape):
    seeds = derive_seeds(seed, place + torch.arange(3))
    rows = sample(seeds, shape, start)
    assert rows.shape == (3, *shape) and rows.dtype == torch.float32 and rows.isfinite().all()
    torch.testing.assert_close(sample(seeds[1:2], shape, start), rows[1:2], rtol=0, atol=1e-6)


def test_uniform_numbers_are_uniform():
    numbers = uniform(derive_seeds(0, torch.arange(1000)), (1000,)).double()
    assert numbers.min() > 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), 100, 0, 1)
    assert ((counts - 10_000).square() / 10_000).sum() < 160  # chi square of 99 degrees of freedom, p = 1e-4
    _check_correlations((numbers - 0.5) * 12**0.5)


def test_normal_numbers_are_normal():
    numbers = normal(derive_seeds(0, torch.arange(1000)), (1000,)).double()
    moments = [numbers.pow(power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    counts = torch.histc(torch.special.ndtr(numbers).float(), 100, 0, 1)
    assert ((counts - 10_000).square() / 10_000).sum() < 160
    _check_correlations(numbers)


def _check_correlations(numbers):
    """Numbers with mean 0 and variance 1 are not correlated within rows, between rows or between halves."""
    for first, second in ((numbers[:, 1:], numbers[:, :-1]), (numbers[1:], numbers[:-1])):
        assert (first * second).mean().abs() < 0.005  # 5 standard deviations of the mean of a million values
    assert (numbers[:, :500] * numbers[:, 500:]).mean().abs() < 0.01


def test_seeds_of_many_places_differ():
    seeds = torch.cat([derive_seeds(seed, torch.arange(200_000)) for seed in range(3)])
    assert len(seeds.unique()) == 600_000
