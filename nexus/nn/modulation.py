"""Adaptive layer norm: shift, scale and gate of a token stream by a condition."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def plain_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """norm(x) * (1 + scale) + shift for x [B, L, D], shift and scale [B, D]. adaLN, Peebles & Xie 2022."""
    return torch.addcmul(shift[:, None], plain_norm(x, eps), 1 + scale[:, None])


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch for x and branch [B, L, D], gate [B, D]."""
    return torch.addcmul(x, gate[:, None], branch)


def start_linear(net: nn.Module) -> None:
    """DiT's initial weights: Xavier in every linear layer, biases 0, embeddings from N(0, 0.02)."""
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # A patch convolution is a linear map of flattened patches, and starts as one.
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def start_as_identity(net: nn.Module) -> None:
    """Initial weights of an adaLN-Zero transformer: every block is the identity, the output zero. Peebles & Xie 2022.

    `net` has `time` (a TimestepMLP), `adalns()` and `final`.
    """
    start_linear(net)
    for layer in (net.time.fc1, net.time.fc2):
        nn.init.normal_(layer.weight, std=0.02)
    for layer in (*net.adalns(), net.final):
        nn.init.zeros_(layer.weight)
