"""Seeds that are fixed functions of integers, so that a run can be repeated and resumed."""

import hashlib
import struct


def derive_seed(*parts: int) -> int:
    """A 63-bit seed that is a fixed function of some integers, such as a seed, an epoch and a position."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
