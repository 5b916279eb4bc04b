"""Share fixed batches among processes, so that the number of processes changes neither images nor scores."""

from typing import TypeVar

import torch.distributed

Part = TypeVar("Part")


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and the number of processes; (0, 1) without `torch.distributed`."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def own_batches(count: int, batch_size: int) -> list[range]:
    """Image numbers in the batches of this process. Batch b belongs to the process with rank b % world size.

    Args:
        count: Number of images of all processes.
        batch_size: Images per batch; the last batch may have fewer.
    """
    rank, world_size = rank_and_world_size()
    starts = range(rank * batch_size, count, world_size * batch_size)
    return [range(start, min(start + batch_size, count)) for start in starts]


def gather_batches(parts: list[Part]) -> list[Part] | None:
    """Gather the results that all processes computed for their `own_batches`, in the order of the images.

    Args:
        parts: One entry per batch of this process, with tensors on the CPU.

    Returns:
        One entry per batch on the main process; None on the other processes.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return parts
    shares = [None] * world_size if rank == 0 else None
    torch.distributed.gather_object(parts, shares)
    if shares is None:
        return None
    return [shares[number % world_size][number // world_size] for number in range(sum(map(len, shares)))]
