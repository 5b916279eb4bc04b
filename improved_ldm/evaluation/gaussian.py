"""Mean and covariance of a set of features, and the Fréchet distance between two of them."""

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian that stands for a set of features in the Fréchet distance.

    Args:
        mean: Mean (dim,), float64.
        covariance: Unbiased covariance (dim, dim), float64.
    """

    mean: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Gaussian":
        """The Gaussian of features (samples ≥ 2, dim). A ValueError is raised if one of them is not finite."""
        if not features.isfinite().all():
            raise ValueError(f"`features` is {tuple(features.shape)} and has NaN or infinity; it must be finite.")
        features = features.double()
        return cls(features.mean(0), torch.atleast_2d(torch.cov(features.T)))

    def distance(self, other: "Gaussian") -> float:
        """Fréchet distance |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), ≥ 0.

        The trace of the root is the sum of the roots of the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½.

        Source: Dowson and Landau 1982; the symmetric product is our choice.
        """
        shift = (self.mean - other.mean).square().sum()
        product = self._half.T @ other.covariance @ self._half
        overlap = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
        return max((shift + self.covariance.trace() + other.covariance.trace() - 2 * overlap).item(), 0.0)

    @cached_property
    def _half(self) -> torch.Tensor:
        """A matrix H (dim, dim) with H Hᵀ = Σ, whose columns are orthogonal."""
        values, vectors = torch.linalg.eigh(self.covariance)
        return vectors * values.clamp(min=0).sqrt()
