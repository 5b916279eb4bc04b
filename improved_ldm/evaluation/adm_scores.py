"""Precision, recall and Inception score as the evaluation suite of ADM computes them."""

import torch

BLOCK = 10_000  # samples on each side of a block of distances
SPLIT_SIZE = 5000  # samples per part of the Inception score


def adm_precision_recall(real: torch.Tensor, fake: torch.Tensor, nearest_k: int = 3) -> dict[str, float]:
    """Precision and recall from squared distances that are rounded to float16.

    `manifold_scores` defines them in the same way, but without rounding. With rounding, more distances are equal, so
    slightly more samples are inside a ball.

    Args:
        real: Features (real, dim).
        fake: Features (fake, dim).
        nearest_k: Number of neighbours in the same set that sets the radius of each ball.

    Returns:
        adm_precision: Share of the fake samples inside at least one real ball, in [0, 1].
        adm_recall: Share of the real samples inside at least one fake ball, in [0, 1].

    Raises:
        ValueError: If a set has at most `nearest_k` samples.

    Source: Kynkäänniemi et al. 2019; the rounding is that of Dhariwal and Nichol 2021: a block of 10,000 by 10,000
    distances is in float16, or in float32 if one of them overflows.
    """
    if min(len(real), len(fake)) <= nearest_k:
        raise ValueError(
            f"`nearest_k` is {nearest_k}; with {len(real)} real and {len(fake)} fake samples it must be smaller."
        )
    real_radii, fake_radii = _rounded_radii(real, nearest_k), _rounded_radii(fake, nearest_k)
    precise, recalled = (torch.zeros(len(features), dtype=torch.bool) for features in (fake, real))
    for rows in _blocks(len(real)):
        for columns in _blocks(len(fake)):
            distances = _squared_distances(real[rows], fake[columns])
            precise[columns] |= (distances <= real_radii[rows, None]).any(0).cpu()
            recalled[rows] |= (distances <= fake_radii[columns]).any(1).cpu()
    return {"adm_precision": precise.double().mean().item(), "adm_recall": recalled.double().mean().item()}


def adm_inception_score(probabilities: torch.Tensor) -> float:
    """Inception score, averaged over parts of 5000 samples in their order; the last part may be smaller.

    Args:
        probabilities: Class probabilities (samples, classes); each row sums to 1.

    Returns:
        The mean over the parts, in [1, classes].

    Source: Salimans et al. 2016, with the parts of Dhariwal and Nichol 2021.
    """
    smallest = torch.finfo(torch.float64).tiny
    parts = probabilities.double().clamp(min=smallest).split(SPLIT_SIZE)
    divergences = [(part * (part.log() - part.mean(0).log())).sum(1).mean() for part in parts]
    return torch.stack(divergences).exp().mean().item()


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _rounded_radii(features: torch.Tensor, nearest_k: int) -> torch.Tensor:
    """Squared distance (samples,) of each sample to its `nearest_k`-th nearest neighbour."""
    radii = []
    for rows in _blocks(len(features)):
        nearest = [  # the smallest of each block; the nearest neighbour is the sample itself
            _smallest(_squared_distances(features[rows], features[columns]), nearest_k + 1)
            for columns in _blocks(len(features))
        ]
        radii.append(_smallest(torch.cat(nearest, 1), nearest_k + 1).amax(1))
    return torch.cat(radii)


def _smallest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The smallest values (rows, ≤ count) of each row, in any order."""
    return values.topk(min(count, values.shape[1]), largest=False, sorted=False).values


def _squared_distances(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Squared distances (rows, columns), each operation rounded to float16, or float32 if a value overflows."""
    for rounded in (_to_half, torch.Tensor.float):
        left, right = rounded(rows.float()), rounded(columns.float())
        left_norm, right_norm = (rounded(rounded(side.square()).sum(1)) for side in (left, right))
        products = rounded(2 * rounded(left @ right.T))
        distances = rounded(rounded(left_norm[:, None] - products) + right_norm).clamp(min=0)
        if distances.isfinite().all():
            break
    return distances


def _to_half(values: torch.Tensor) -> torch.Tensor:
    """Float32 values that are rounded to float16; sums of them accumulate in float32."""
    return values.half().float()
