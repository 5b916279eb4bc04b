"""How several processes share fixed batches, so that their number changes no image and no number."""

from typing import TypeVar

import torch.distributed

Part = TypeVar("Part")


def rank_and_world_size() -> tuple[int, int]:
    """This process, and of how many; (0, 1) without `torch.distributed`."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def own_batches(count: int, batch_size: int) -> list[range]:
    """The numbers of the images in this process's batches: batch b is for the process b % world size.

    Args:
        count: images of all processes.
        batch_size: images a batch; the last one may have fewer.
    """
    rank, world_size = rank_and_world_size()
    starts = range(rank * batch_size, count, world_size * batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts]


def gather_batches(parts: list[Part]) -> list[Part] | None:
    """What all processes made of their `own_batches`, in the order of the images.

    Args:
        parts: one entry a batch of this process, tensors on the CPU.

    Returns:
        One entry a batch on the main process, None on the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return parts
    shares = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(parts, shares)
    if shares is None:
        return None
    return [shares[number % world_size][number // world_size] for number in range(sum(map(len, shares)))]
