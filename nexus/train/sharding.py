"""FSDP2: weights, gradients and optimiser state cut over the ranks, by a flag."""

import torch
from torch import Tensor, nn

from nexus.train.args import TrainArgs
from nexus.train.distributed import World, apart
from nexus.train.state import whole


def shard(system: nn.Module, args: TrainArgs, world: World, device: torch.device) -> nn.Module:
    """Cut the system's network over the ranks when args.sharding is "fsdp2"; else return it as it is."""
    if args.sharding != "fsdp2" or world.size == 1:
        return system
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh(device.type, (world.size,))
    # The network is one unit: DiT reads its blocks' modulation weights outside the blocks' own forward. What else is
    # trained (a small text encoder) stays whole on every rank.
    fully_shard(system.net, mesh=mesh)
    return system


def clip_grads(params: list[nn.Parameter], most: float) -> Tensor:
    """Scale the gradients of all parameters to a common norm of `most` at most; the norm that they had.

    Cut and whole tensors each give a norm of their own.
    """
    grads = apart([p.grad for p in params if p.grad is not None])
    norms = [whole(nn.utils.get_total_norm(kind, foreach=True)) for kind in grads]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in apart(params):
        nn.utils.clip_grads_with_norm_(kind, most, norm, foreach=True)
    return norm
