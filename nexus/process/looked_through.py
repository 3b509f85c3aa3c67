"""Latents as a frozen denoiser sees them: noised by some share, and what its blocks make of that.

B items, S blocks, D the width of a token.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.errors import ModelError
from nexus.process.diffusion import Diffusion


def check_seen(system: Any, name: str, shape: tuple[int, int, int], codec: str | None, hidden: int, patch: int,
               seen: Sequence[int]) -> None:
    """ModelError unless `system` is a diffusion transformer of latents of `shape` with such blocks."""
    net = getattr(system, "net", None)
    if not isinstance(system, Diffusion) or not hasattr(net, "blocks") or system.config.concat is not None:
        raise ModelError(f"{name} is no diffusion transformer", hint="a model of dit or flow")
    its = system.config.codec
    if system.config.latent_shape != shape or (its and its.weights) != codec:
        raise ModelError(f"{name} denoises {system.config.latent_shape} of the codec {its and its.weights}, the "
                         f"generator makes {shape} of {codec}", hint="a model of the same latents")
    found = (net.config.hidden, net.config.patch)
    if found != (hidden, patch):
        raise ModelError(f"the blocks of {name} are {found[0]} wide, its patches {found[1]}: not {hidden} and {patch}",
                         hint=f"--set critic.hidden={found[0]} --set critic.patch={found[1]}")
    if not set(seen) <= set(range(len(net.blocks))):
        raise ModelError(f"{name} has {len(net.blocks)} blocks, and block {max(seen)} is to be seen",
                         hint="--set critic.seen=[...], from 0 on")


def looked_through(net: nn.Module, path: Any, x: Tensor, share: Tensor, rng: torch.Generator,
                   seen: Sequence[int]) -> Tensor:
    """x [B, C, h, w] taken `share` [B] of the way to noise -> what the blocks `seen` say, [B, S * D, h / p, w / p].

    The way is a quarter circle: noise is tan(share * pi / 2) times as large as x, whatever the path. Each block's map
    has mean 0 and variance 1: they differ in size by far. net: a DiT, without a label; rng: for the noise. Gradients
    pass to x.
    """
    t = path.t_of_log_snr(-torch.log(torch.tan(share.double().to(x.device) * math.pi / 2))).to(x)
    alpha, sigma = (value.to(x)[:, None, None, None] for value in path.at(t))
    noise = torch.randn(x.shape, generator=rng).to(x)
    found: list[Tensor] = []
    hooks = [net.blocks[i].register_forward_hook(lambda block, given, out: found.append(out)) for i in sorted(seen)]
    try:
        net(alpha * x + sigma * noise, path.network_time(t))
    finally:
        for hook in hooks:
            hook.remove()
    rows = x.shape[2] // net.config.patch
    maps = (tokens.float().transpose(1, 2).unflatten(2, (rows, -1)) for tokens in found)
    return torch.cat([F.group_norm(each, 1) for each in maps], 1)
