"""Adaptive layer norm: shift, scale and gate of a token stream by a condition."""

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm over the last axis, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift for x [B, L, D], shift and scale [B, D]. adaLN, Peebles & Xie 2022."""
    return torch.addcmul(shift[:, None], plain_norm(x), 1 + scale[:, None])


def gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """x + gate * branch for x and branch [B, L, D], gate [B, D]."""
    return torch.addcmul(x, gate[:, None], branch)
