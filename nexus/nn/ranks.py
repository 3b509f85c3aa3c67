"""Statistics that a layer keeps besides its gradients, made the same on every rank of a distributed training."""

import torch
import torch.distributed as dist
from torch import Tensor


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def summed(x: Tensor) -> Tensor:
    """The sum of x over the ranks; x itself where there is one."""
    if _many():
        x = x.clone()
        dist.all_reduce(x)
    return x


def averaged(x: Tensor) -> Tensor:
    """The mean of x over the ranks; x itself where there is one."""
    return summed(x) / dist.get_world_size() if _many() else x


def of_the_first(x: Tensor) -> Tensor:
    """What x is on the first rank; x itself where there is one."""
    if _many():
        x = x.clone()
        dist.broadcast(x, 0)
    return x


def of_other_ranks(tensors: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Rank (1, 2, ...) -> those of its tensors of these names that differ from the first rank's; on every rank."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, own in tensors.items() if _many() else ():
        every = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(every, own.contiguous())
        for rank, other in enumerate(every):
            if not torch.equal(other, every[0]):
                found.setdefault(rank, {})[name] = other
    return found
