"""Data-parallel ranks under `torchrun`: start-up, gradient averaging, and flags that all ranks share."""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class World(NamedTuple):
    """This process among its peers."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files."""
        return self.rank == 0


def join(device: torch.device) -> World:
    """Join the group that torchrun describes (NCCL on CUDA, gloo elsewhere), or stand alone."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return World()
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")     # flags are CPU tensors
    return World(dist.get_rank(), dist.get_world_size())


def leave(world: World) -> None:
    """Close the group, if there is one."""
    if world.size > 1:
        dist.destroy_process_group()


def average_gradients(params: list[nn.Parameter], world: World) -> None:
    """Average every gradient over the ranks, as one flat buffer a dtype. Losses stay plain functions this way."""
    if world.size == 1:
        return
    for dtype in {p.grad.dtype for p in params if p.grad is not None}:
        grads = [p.grad for p in params if p.grad is not None and p.grad.dtype == dtype]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= world.size
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def average(values: Tensor, world: World) -> Tensor:
    """The mean of a tensor over the ranks."""
    if world.size > 1:
        dist.all_reduce(values)
        values = values / world.size
    return values


def any_rank(flag: int, world: World) -> int:
    """The largest of the ranks' flags, so that all ranks stop at the same step."""
    if world.size == 1:
        return flag
    value = torch.tensor(flag)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return int(value)


def broadcast_state(tensors: list[Tensor], world: World) -> None:
    """Every rank takes rank 0's values."""
    if world.size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def barrier(world: World) -> None:
    """Wait for all ranks."""
    if world.size > 1:
        dist.barrier()


def apart(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Those that FSDP2 has cut over the ranks, and the whole ones: torch's operations on lists take no mixture."""
    kinds = [[t for t in tensors if isinstance(t, DTensor) == cut] for cut in (True, False)]
    return [kind for kind in kinds if kind]
