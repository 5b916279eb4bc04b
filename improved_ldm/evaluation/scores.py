"""Numbers that compare a set of samples with a set of real images."""

import scipy.fft
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance


def frechet_distance(real_features: torch.Tensor, fake_features: torch.Tensor) -> float:
    """Fréchet distance of two sets of features, each taken as a Gaussian; FID if the features are Inception's.

    Args:
        real_features: (real, dim).
        fake_features: (fake, dim). Sets of a few times `dim` samples or more give a stable number.

    Returns:
        The distance, ≥ 0; 0 for equal means and covariances.

    Raises:
        ValueError: if the widths differ or a set has fewer than 2 samples.

    Source: Heusel et al. 2017, as torchmetrics computes it.
    """
    _check_features(real_features, fake_features, at_least=2)
    identity = nn.Identity()
    identity.num_features = real_features.shape[1]
    metric = FrechetInceptionDistance(feature=identity).to(real_features.device)
    metric.update(real_features.float(), real=True)
    metric.update(fake_features.float(), real=False)
    return metric.compute().item()


def coverage(real_features: torch.Tensor, fake_features: torch.Tensor, nearest_k: int = 5) -> float:
    """Share of the real samples that have a fake one nearer than their `nearest_k`-th nearest real neighbour.

    Args:
        real_features: (real, dim).
        fake_features: (fake, dim).
        nearest_k: neighbours that set the radius around each real sample.

    Returns:
        A number in [0, 1]; it falls when samples miss a mode of the real ones.

    Raises:
        ValueError: if the widths differ, or there are not more than `nearest_k` real samples.

    Source: Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative models", Eq. 10.
    """
    _check_features(real_features, fake_features, at_least=1)
    if not 1 <= nearest_k < len(real_features):
        raise ValueError(
            f"`nearest_k` is {nearest_k}; with {len(real_features)} real samples it must be in [1, real)."
        )
    between_reals = torch.cdist(real_features, real_features).fill_diagonal_(0)
    radii = between_reals.kthvalue(nearest_k + 1, dim=1).values  # the nearest is the sample itself
    nearest_fake = torch.cdist(real_features, fake_features).amin(1)
    return (nearest_fake < radii).float().mean().item()


def high_frequency_energy(pixels: torch.Tensor) -> torch.Tensor:
    """Share of each image's spectral energy, its mean left out, above half the Nyquist frequency in either direction.

    An image that was reduced to half its size or less and enlarged again has nearly none.

    Args:
        pixels: (batch, channels, height, width).

    Returns:
        (batch,) float32 in [0, 1]; 0 for a uniform image.

    Source: our choice; the cosine transform meets no jump at the image's border, as a Fourier transform does.
    """
    height, width = pixels.shape[2:]
    spectrum = scipy.fft.dctn(pixels.double().cpu().numpy(), axes=(2, 3), norm="ortho")
    energy = torch.from_numpy(spectrum).square().sum(1)  # (batch, height, width)
    energy[:, 0, 0] = 0
    low = energy[:, : height // 2, : width // 2].sum((1, 2))
    total = energy.sum((1, 2))
    return torch.where(total > 1e-12, 1 - low / total.clamp(min=1e-12), 0).float()


def _check_features(real_features: torch.Tensor, fake_features: torch.Tensor, at_least: int):
    for name, features in (("real_features", real_features), ("fake_features", fake_features)):
        if features.ndim != 2 or len(features) < at_least:
            raise ValueError(f"`{name}` is {tuple(features.shape)}; it must be (samples ≥ {at_least}, dim).")
    if real_features.shape[1] != fake_features.shape[1]:
        raise ValueError(
            f"`real_features` has {real_features.shape[1]} dimensions, `fake_features` {fake_features.shape[1]}."
        )
