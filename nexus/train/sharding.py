"""FSDP2: weights, gradients and optimiser state cut over the ranks, by a flag."""

import torch
from torch import nn

from nexus.train.args import TrainArgs
from nexus.train.distributed import World


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
