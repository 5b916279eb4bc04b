from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from improved_ldm.data.loader import make_pass
from improved_ldm.data.sources import open_rows
from improved_ldm.data.transforms import ImageTransform, pixel_values
from improved_ldm.evaluation import scores
from improved_ldm.evaluation.scores import (
    frechet_distance,
    high_frequency_energy,
    inception_score,
    kernel_distance,
    manifold_scores,
    nearest_radii,
)


@pytest.fixture(scope="module")
def batch():
    """1000 images of the embedded test split."""
    rows = open_rows("embedded:fashion-mnist", split="test", label_column="label")
    batch = next(iter(make_pass(rows, ImageTransform(32), batch_size=1000)))
    return batch | {"pixels": pixel_values(batch["pixels"])}


@pytest.fixture(scope="module")
def features(judge, batch):
    with torch.no_grad():
        return judge.features(batch["pixels"])


def blur(pixels, times=1):
    for _ in range(times):
        pixels = F.interpolate(F.avg_pool2d(pixels, 2), scale_factor=2, mode="bilinear")
    return pixels


def two_sets(num_real, num_fake, dim, shift=0.3, seed=0):
    """Correlated features of a real set and of a shifted and scaled fake set."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator) / dim**0.5
    real, fake = (torch.randn(count, dim, generator=generator) @ mixing for count in (num_real, num_fake))
    return real, 1.1 * fake + shift


def sqrtm_distance(real, fake):
    """The Fréchet distance by its definition."""
    real, fake = real.double().numpy(), fake.double().numpy()
    shift, covariances = real.mean(0) - fake.mean(0), [np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, fake)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return shift @ shift + np.trace(covariances[0] + covariances[1] - 2 * root.real)


def all_pairs(a, b):
    """Distances between all pairs, without a matrix product."""
    return np.linalg.norm(a.double().numpy()[:, None] - b.double().numpy()[None], axis=-1)


def whole_manifold_scores(real, fake, nearest_k):
    """The four scores from full distance matrices, by their definitions."""
    between = all_pairs(real, fake)
    real_radii, fake_radii = (np.sort(all_pairs(x, x), axis=1)[:, nearest_k] for x in (real, fake))
    return {
        "precision": (between <= real_radii[:, None]).any(0).mean(),
        "recall": (between <= fake_radii).any(1).mean(),
        "density": (between < real_radii[:, None]).sum() / nearest_k / len(fake),
        "coverage": (between.min(1) < real_radii).mean(),
    }


feature_sets = st.builds(
    two_sets,
    num_real=st.integers(8, 40),
    num_fake=st.integers(8, 40),
    dim=st.integers(1, 12),
    shift=st.floats(0, 2),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize(("num_real", "num_fake", "dim"), [(500, 300, 48), (40, 30, 128), (300, 30, 64), (20, 20, 1)])
def test_frechet_distance_is_that_of_the_matrix_root(num_real, num_fake, dim):
    real, fake = two_sets(num_real, num_fake, dim)
    assert frechet_distance(real, fake) == pytest.approx(sqrtm_distance(real, fake), rel=1e-4)


@given(feature_sets)
def test_frechet_distance_is_symmetric_and_sees_no_order_and_no_common_shift(sets):
    real, fake = sets
    distance = frechet_distance(real, fake)
    assert distance >= 0
    assert frechet_distance(fake.flip(0) + 3, real + 3) == pytest.approx(distance, rel=1e-3, abs=1e-4)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift():
    samples = torch.randn(2000, 4)
    assert frechet_distance(samples, samples + torch.tensor([3.0, 0, 0, 0])) == pytest.approx(9, rel=1e-4)


def test_frechet_distance_is_near_zero_for_halves_and_grows_with_every_harm(features, judge, batch):
    real, pixels, labels = features[::2], batch["pixels"][1::2], batch["label"][1::2]
    halves = frechet_distance(real, features[1::2])
    noise = torch.randn_like(pixels)
    with torch.no_grad():
        versions = {
            "blur": [judge.features(blur(pixels, times)) for times in (1, 2, 4)],
            "noise": [judge.features(pixels + strength * noise) for strength in (0.2, 0.4, 0.8)],
            "missing classes": [features[1::2][labels < count] for count in (8, 5, 2)],
        }
    for harm, sets in versions.items():
        distances = [frechet_distance(real, fake) for fake in sets]
        assert 2 * halves < distances[0] < distances[1] < distances[2], (harm, halves, distances)
        assert halves < 0.1 * distances[2]


def test_kernel_distance_is_that_of_torch_fidelity():
    real, fake = two_sets(300, 250, 32)
    expected = kid_features_to_metric(real, fake, kid_subsets=20, kid_subset_size=100, rng_seed=5, verbose=False)
    distance = kernel_distance(real, fake, num_subsets=20, subset_size=100, seed=5)
    assert distance == pytest.approx(tuple(expected.values()), rel=1e-4)


def test_kernel_distance_of_whole_sets_is_the_unbiased_discrepancy():
    real, fake = two_sets(60, 60, 8)
    kernel = lambda a, b: (a.double() @ b.double().T / 8 + 1) ** 3  # noqa: E731
    within = [(matrix.sum() - matrix.trace()) / (60 * 59) for matrix in (kernel(real, real), kernel(fake, fake))]
    expected = (sum(within) - 2 * kernel(real, fake).mean()).item()
    mean, deviation = kernel_distance(real, fake, num_subsets=3, subset_size=60)
    assert mean == pytest.approx(expected, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_of_halves_is_near_zero_and_grows_with_blur(features, judge, batch):
    with torch.no_grad():
        versions = [judge.features(blur(batch["pixels"][1::2], times)) for times in (0, 1, 2)]
    halves, one, two = (kernel_distance(features[::2], fake, 20, 250)[0] for fake in versions)
    assert abs(halves) < 0.2 * one < 0.2 * two


def test_inception_score_is_that_of_torch_fidelity():
    logits = 3 * torch.randn(203, 10)
    expected = isc_features_to_metric(logits, splits=4, rng_seed=7)
    assert inception_score(logits.softmax(1), 4, seed=7) == pytest.approx(tuple(expected.values()), rel=1e-4)


def test_inception_score_is_one_for_no_knowledge_and_the_number_of_classes_for_all_of_it():
    assert inception_score(torch.full((50, 8), 1 / 8), 2) == pytest.approx((1, 0), abs=1e-6)
    assert inception_score(torch.eye(8).repeat(50, 1), 1)[0] == pytest.approx(8, rel=1e-6)


@pytest.mark.parametrize("nearest_k", [1, 3, 5])
@pytest.mark.parametrize("max_distances", [1, 1000, 2**24])
def test_manifold_scores_do_not_depend_on_blocks(monkeypatch, nearest_k, max_distances):
    real, fake = two_sets(180, 130, 16)
    monkeypatch.setattr(scores, "MAX_DISTANCES", max_distances)
    assert manifold_scores(real, fake, nearest_k) == pytest.approx(whole_manifold_scores(real, fake, nearest_k))


@given(feature_sets, st.integers(1, 7))
def test_manifold_scores_are_those_of_the_definition_for_all_sets(sets, nearest_k):
    assert manifold_scores(*sets, nearest_k) == pytest.approx(whole_manifold_scores(*sets, nearest_k))


def test_manifold_scores_are_those_of_torch_fidelity(features, judge, batch):
    with torch.no_grad():
        fake = judge.features(blur(batch["pixels"][1::2]))
    expected = prc_features_to_metric(fake, features[::2], prc_neighborhood=3, prc_batch_size=100, verbose=False)
    found = manifold_scores(features[::2], fake, nearest_k=3)
    for name in ("precision", "recall"):
        assert 0 < found[name] < 1
        assert found[name] == pytest.approx(expected[name], rel=1e-4)


def test_radii_of_the_real_set_can_be_given():
    real, fake = two_sets(40, 30, 8)
    found = manifold_scores(real, fake, 3, nearest_radii(real, 3))
    assert found == manifold_scores(real, fake, 3)
    assert manifold_scores(real, fake, 3, torch.zeros(40))["precision"] == 0


def test_manifold_scores_are_those_of_prdc(features, judge, batch):
    prdc = pytest.importorskip("prdc")
    with torch.no_grad():
        fake = judge.features(blur(batch["pixels"][1::2]))
    expected = prdc.compute_prdc(features[::2].double().numpy(), fake.double().numpy(), nearest_k=5)
    assert manifold_scores(features[::2], fake) == pytest.approx(expected, rel=1e-4)


def test_manifold_scores_of_a_set_with_itself_are_one(features):
    assert manifold_scores(features, features) == {"precision": 1, "recall": 1, "density": 1, "coverage": 1}


def test_manifold_scores_of_far_samples_are_zero(features):
    assert set(manifold_scores(features, features + 1000).values()) == {0}


def test_coverage_and_recall_fall_when_modes_are_missing_and_precision_does_not(features, batch):
    real, fake, labels = features[::2], features[1::2], batch["label"][1::2]
    of_all, of_half, of_one = (manifold_scores(real, fake[labels < count]) for count in (10, 5, 1))
    for name in ("coverage", "recall"):
        assert of_all[name] > of_half[name] + 0.2 > of_one[name] + 0.4
    assert min(of_half["precision"], of_one["precision"]) > of_all["precision"] - 0.1


def test_manifold_scores_count_the_balls_that_hold_a_fake():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii with one neighbour: 1, 1, 1, 8
    fake = torch.tensor([[2.5], [20.0]])  # both 17.5; 2.5 is in the balls around 2 and 10
    expected = {"precision": 0.5, "recall": 1.0, "density": 1.0, "coverage": 0.5}
    assert manifold_scores(real, fake, nearest_k=1) == expected


@pytest.mark.parametrize("score", [frechet_distance, manifold_scores, partial(kernel_distance, subset_size=5)])
def test_scores_of_two_sets_name_what_is_wrong(score):
    good, bad = torch.rand(9, 4), torch.rand(9, 4)
    bad[3, 1] = torch.nan
    for real, fake, message in (
        (good, torch.rand(9, 5), "`real` has 4 dimensions and `fake` 5"),
        (good, bad, "`fake` has NaN or infinity in 1 of 9 samples"),
        (bad, good, "`real` has NaN or infinity in 1 of 9 samples"),
        (good, good[:1], r"`fake` is \(1, 4\); it must be \(samples ≥"),
        (good[0], good, r"`real` is \(4,\); it must be \(samples ≥"),
    ):
        with pytest.raises(ValueError, match=message):
            score(real, fake)


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda x: manifold_scores(x, x, nearest_k=9), r"`real` is \(9, 4\); it must be \(samples ≥ 10, dim\)"),
        (lambda x: manifold_scores(x, x, nearest_k=0), "`nearest_k` is 0; it must be ≥ 1"),
        (lambda x: kernel_distance(x, x), r"`subset_size` is 1000; with 9 real and 9 fake .* in \[2, 9\]"),
        (lambda x: kernel_distance(x, x, num_subsets=0, subset_size=5), "`num_subsets` is 0; it must be ≥ 1"),
        (lambda x: inception_score(x), r"`probabilities` is \(9, 4\); it must be \(samples ≥ 10, dim\)"),
        (lambda x: inception_score(x, 3), "each row must sum to 1"),
    ],
)
def test_impossible_settings_are_refused(score, message):
    with pytest.raises(ValueError, match=message):
        score(torch.rand(9, 4))


def test_high_frequency_energy_falls_with_blur(batch):
    pixels = batch["pixels"]
    assert (high_frequency_energy(blur(pixels)) < high_frequency_energy(pixels)).float().mean() > 0.99


def test_high_frequency_energy_of_known_images():
    column = torch.arange(32) + 0.5
    low, high = (torch.cos(torch.pi * k * column / 32).expand(1, 3, 32, 32) for k in (5, 20))
    uniform = torch.full((1, 3, 32, 32), 0.7)
    energy = high_frequency_energy(torch.cat([low, high, uniform, low + high]))
    torch.testing.assert_close(energy, torch.tensor([0, 1, 0, 0.5]), atol=1e-5, rtol=0)
