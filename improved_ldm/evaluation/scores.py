"""Scores that compare a set of samples with a set of real images."""

from functools import cached_property

import scipy.fft
import torch
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from improved_ldm.evaluation.gaussian import Gaussian

MAX_DISTANCES = 2**24  # pairwise distances in memory at once: 128 MB
CMMD_BANDWIDTH, CMMD_SCALE = 10, 1000


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Fréchet distance between two sets of features, each modelled as a Gaussian. With Inception features, it is FID.

    Args:
        real: Features (real, dim).
        fake: Features (fake, dim). The number is stable if both sets have at least a few times `dim` samples.

    Returns:
        The distance, ≥ 0; 0 for equal means and covariances.

    Raises:
        ValueError: If the dimensions differ, a set has fewer than 2 samples, or a feature is not finite.

    Source: Heusel et al. 2017.
    """
    _check_features(real, fake, at_least=2)
    return Gaussian.of(real).distance(Gaussian.of(fake.to(real.device)))


def kernel_distance(
    real: torch.Tensor, fake: torch.Tensor, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy between two sets of features. With Inception features, it is KID.

    The kernel is (x·y / dim + 1)³. The estimate is unbiased, so it can be slightly negative.

    Args:
        real: Features (real, dim).
        fake: Features (fake, dim).
        num_subsets: Number of random subsets of both sets to compare.
        subset_size: Samples per subset, drawn without replacement.
        seed: Seed of the subsets. They equal those of torch-fidelity with the real set as its first input.

    Returns:
        Mean and standard deviation over the subsets.

    Raises:
        ValueError: If the dimensions differ, a set is smaller than a subset, or a feature is not finite.

    Source: Bińkowski et al. 2018, as torch-fidelity computes it.
    """
    _check_features(real, fake, at_least=2)
    _check_count("num_subsets", num_subsets, 1)
    smaller = min(len(real), len(fake))
    if not 2 <= subset_size <= smaller:
        raise ValueError(
            f"`subset_size` is {subset_size}; with {len(real)} real and {len(fake)} fake samples it must be in "
            f"[2, {smaller}]."
        )
    result = kid_features_to_metric(
        real.double(),
        fake.double(),
        kid_subsets=num_subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def clip_discrepancy(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Squared maximum mean discrepancy between two sets of CLIP embeddings: CMMD.

    The kernel is exp(−|x − y|² / (2 σ²)) with σ = 10. The estimate is the biased one, over all pairs with those of an
    embedding and itself.

    Args:
        real: Embeddings (real, dim) of length 1.
        fake: Embeddings (fake, dim) of length 1.

    Returns:
        1000 times the discrepancy, ≥ 0 up to rounding.

    Raises:
        ValueError: If the dimensions differ, a set is empty, or an embedding is not finite.

    Source: Jayasumana et al. 2024, with the bandwidth, the estimate and the factor of their code.
    """
    _check_features(real, fake, at_least=1)
    real, fake = real.double(), fake.double().to(real.device)
    similarity = _mean_kernel(real, real) + _mean_kernel(fake, fake) - 2 * _mean_kernel(real, fake)
    return CMMD_SCALE * similarity


def inception_score(probabilities: torch.Tensor, num_splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception score exp E KL(p(y|x) ‖ p(y)).

    It is high if a classifier is sure of each sample and the samples are spread evenly over its classes.

    Args:
        probabilities: Class probabilities (samples, classes); each row sums to 1.
        num_splits: Number of parts of the set that are scored separately.
        seed: Seed of the order in which the samples are split.

    Returns:
        Mean and standard deviation over the parts, in [1, classes].

    Raises:
        ValueError: If there are fewer samples than parts, or a row is not a distribution.

    Source: Salimans et al. 2016, as torch-fidelity computes it.
    """
    _check_count("num_splits", num_splits, 1)
    _check_set("probabilities", probabilities, at_least=num_splits)
    probabilities = probabilities.double().cpu()
    if probabilities.min() < 0 or (probabilities.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("`probabilities` must be ≥ 0 and each row must sum to 1.")
    logits = probabilities.clamp(min=torch.finfo(torch.float64).tiny).log()
    result = isc_features_to_metric(logits, num_splits, rng_seed=seed)
    return result[KEY_METRIC_ISC_MEAN], result[KEY_METRIC_ISC_STD]


def manifold_scores(
    real: torch.Tensor, fake: torch.Tensor, nearest_k: int = 5, real_radii: torch.Tensor | None = None
) -> dict[str, float]:
    """Precision, recall, density and coverage: how far two sets of features overlap.

    Each sample stands for a ball whose radius is the distance to its `nearest_k`-th nearest neighbour.

    Args:
        real: Features (real, dim).
        fake: Features (fake, dim).
        nearest_k: Number of neighbours in the same set that sets the radius of each ball.
        real_radii: `nearest_radii` of the real features, to reuse them for several fake sets.

    Returns:
        precision: Share of the fake samples inside at least one real ball, in [0, 1].
        recall: Share of the real samples inside at least one fake ball, in [0, 1].
        density: Number of real balls around a fake sample, averaged and divided by `nearest_k`; about 1 for equal
            distributions.
        coverage: Share of the real balls that contain a fake sample, in [0, 1]; it falls if a mode is missing.

    Raises:
        ValueError: If the dimensions differ, a set has at most `nearest_k` samples, or a feature is not finite.

    Source: Kynkäänniemi et al. 2019, Eq. 2, for precision and recall, with closed balls; Naeem et al. 2020, Eqs. 9
    and 10, for density and coverage, with open balls as in their code.
    """
    _check_count("nearest_k", nearest_k, 1)
    _check_features(real, fake, at_least=nearest_k + 1)
    real, fake = real.double(), fake.double().to(real.device)
    if real_radii is None:
        real_radii = nearest_radii(real, nearest_k)
    fake_radii = nearest_radii(fake, nearest_k)

    precise = torch.zeros(len(fake), dtype=torch.bool, device=real.device)
    num_recalled = num_covered = num_held = 0
    for rows in _row_blocks(len(real), len(fake)):
        distances = torch.cdist(real[rows], fake)  # (rows, fake)
        radii = real_radii[rows, None]
        precise |= (distances <= radii).any(0)
        num_recalled += (distances <= fake_radii).any(1).sum().item()
        held = distances < radii
        num_held += held.sum().item()
        num_covered += held.any(1).sum().item()
    return {
        "precision": precise.double().mean().item(),
        "recall": num_recalled / len(real),
        "density": num_held / (nearest_k * len(fake)),
        "coverage": num_covered / len(real),
    }


class RealFeatures:
    """Features of real images, to compare with any number of sets of samples.

    Args:
        vectors: Features (real, dim).
        nearest_k: Number of neighbours that sets the radii of `manifold_scores`.
    """

    def __init__(self, vectors: torch.Tensor, nearest_k: int = 5):
        self.vectors, self.nearest_k = vectors, nearest_k

    def fid(self, fake: torch.Tensor) -> float:
        """The Fréchet distance to the features (fake, dim) of samples."""
        return frechet_distance(self.vectors, fake)

    def manifold_scores(self, fake: torch.Tensor) -> dict[str, float]:
        """Precision, recall, density and coverage of the features (fake, dim) of samples."""
        return manifold_scores(self.vectors, fake, self.nearest_k, self._radii)

    @cached_property
    def _radii(self) -> torch.Tensor:
        _check_set("real", self.vectors, at_least=self.nearest_k + 1)
        return nearest_radii(self.vectors, self.nearest_k)


def high_frequency_energy(pixels: torch.Tensor) -> torch.Tensor:
    """Share of each image's spectral energy above half the Nyquist frequency in either direction, without the mean.

    It is close to 0 for an image that was reduced to at most half its size and enlarged again.

    Args:
        pixels: Images (batch, channels, height, width).

    Returns:
        Shares (batch,), float32 in [0, 1]; 0 for a uniform image.

    Source: our choice; unlike a Fourier transform, the cosine transform has no jump at the border of the image.
    """
    height, width = pixels.shape[2:]
    spectrum = scipy.fft.dctn(pixels.double().cpu().numpy(), axes=(2, 3), norm="ortho")
    energy = torch.from_numpy(spectrum).square().sum(1)  # (batch, height, width)
    energy[:, 0, 0] = 0
    low = energy[:, : height // 2, : width // 2].sum((1, 2))
    total = energy.sum((1, 2))
    return torch.where(total > 1e-12, 1 - low / total.clamp(min=1e-12), 0).float()


def nearest_radii(features: torch.Tensor, nearest_k: int) -> torch.Tensor:
    """Distance (samples,) of each sample (samples, dim) to its `nearest_k`-th nearest neighbour, in float64."""
    features, radii = features.double(), []
    for rows in _row_blocks(len(features), len(features)):
        distances = torch.cdist(features[rows], features)
        radii.append(distances.kthvalue(nearest_k + 1, dim=1).values)  # the nearest neighbour is the sample itself
    return torch.cat(radii)


def _mean_kernel(rows: torch.Tensor, columns: torch.Tensor) -> float:
    """Mean of the Gaussian kernel of CMMD over all pairs of two sets (samples, dim)."""
    blocks = _row_blocks(len(rows), len(columns))
    squares = (torch.cdist(rows[block], columns).square() for block in blocks)
    total = sum(torch.exp(-square / (2 * CMMD_BANDWIDTH**2)).sum().item() for square in squares)
    return total / (len(rows) * len(columns))


def _row_blocks(num_rows: int, num_columns: int) -> list[slice]:
    """Slices of a matrix's rows such that no block has more than `MAX_DISTANCES` values."""
    size = max(1, MAX_DISTANCES // num_columns)
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def _check_features(real: torch.Tensor, fake: torch.Tensor, at_least: int):
    _check_set("real", real, at_least)
    _check_set("fake", fake, at_least)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"`real` has {real.shape[1]} dimensions and `fake` {fake.shape[1]}; they must be equal.")


def _check_set(name: str, values: torch.Tensor, at_least: int):
    if values.ndim != 2 or len(values) < at_least:
        raise ValueError(f"`{name}` is {tuple(values.shape)}; it must be (samples ≥ {at_least}, dim).")
    bad = ~values.isfinite().all(1)
    if bad.any():
        raise ValueError(f"`{name}` has NaN or infinity in {bad.sum().item()} of {len(values)} samples.")


def _check_count(name: str, value: int, at_least: int):
    if value < at_least:
        raise ValueError(f"`{name}` is {value}; it must be ≥ {at_least}.")
