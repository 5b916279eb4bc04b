"""Seeds and random numbers as fixed functions of integers, so that a run can be repeated, split and resumed."""

import hashlib
import math
import struct
from collections.abc import Sequence

import torch

# The constants of SplitMix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
SHIFTS = (30, 27, 31)


def derive_seed(*parts: int) -> int:
    """A 63-bit seed as a fixed function of integers, such as a seed, an epoch and a position."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def derive_seeds(seed: int, places: torch.Tensor) -> torch.Tensor:
    """A seed for each position in a sequence, (n,) int64, from a seed and (n,) int64 positions."""
    return _mix(derive_seed(seed) + places * GOLDEN_GAMMA)


def uniform(seeds: torch.Tensor, shape: Sequence[int], start: int = 0) -> torch.Tensor:
    """Uniform random numbers, each a function of only its row's seed and its position in the row.

    Args:
        seeds: (n,) int64, one per row.
        shape: Shape of a row.
        start: Position of the first number in the row's sequence.

    Returns:
        (n, *shape) float32 in the open interval (0, 1).
    """
    bits = _random_bits(seeds, math.prod(shape), start)
    fractions = (bits >> 41).float().add_(2**22 + 0.5).mul_(2**-23)  # 23 bits, exact in float32
    return fractions.view(len(seeds), *shape)


def normal(seeds: torch.Tensor, shape: Sequence[int], start: int = 0) -> torch.Tensor:
    """Standard normal random numbers, each a function of only its row's seed and its position in the row.

    Args:
        seeds: (n,) int64, one per row.
        shape: Shape of a row.
        start: Position of the first number in the row's sequence.

    Returns:
        (n, *shape) float32.

    Source: Box and Muller, 1958, on the two halves of SplitMix64's numbers; our choice.
    """
    count = math.prod(shape)
    halves = _random_bits(seeds, -(-count // 2), start).view(torch.int32).float().view(len(seeds), -1, 2)
    radius = halves[..., 0].mul(2**-32).add_(0.5).clamp_(min=2**-33).log_().mul_(-2).sqrt_()
    angle = halves[..., 1].mul(2 * math.pi * 2**-32)
    pairs = torch.stack([angle.cos(), angle.sin()]).mul_(radius)  # (2, n, count / 2)
    return torch.cat(tuple(pairs), dim=1)[:, :count].reshape(len(seeds), *shape)


def _random_bits(seeds: torch.Tensor, count: int, start: int) -> torch.Tensor:
    """(n, count) int64 of random bits: `count` numbers of SplitMix64 per seed, from number `start` on."""
    counters = torch.arange(start + 1, start + 1 + count, device=seeds.device)
    return _mix(seeds[:, None] + counters * GOLDEN_GAMMA)


def _mix(values: torch.Tensor) -> torch.Tensor:
    """The output function of SplitMix64, in place; torch's shift of int64 keeps the sign, which the masks remove."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        values.bitwise_xor_((values >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(multiplier)
    return values
