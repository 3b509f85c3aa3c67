"""Attention over heads: the one place that calls a kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, identity: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for q [B, H, L, D], k and v [B, H, S, D] -> [B, H, L, D].

    mask: bool, broadcastable to [B, H, L, S], True = may be seen. Without gradients, short bfloat16 sequences and
    single queries on the CPU take plain products, which run about twice as fast there as the fused kernel
    (docs/design.md). identity: every query sees its own place alone, whatever the scores (Ahn et al. 2024).
    """
    if identity:
        return v
    if _plain_is_faster(q, k):
        scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return torch.matmul(scores.softmax(-1), v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    return q.device.type == "cpu" and (q.shape[-2] == 1 or q.dtype == torch.bfloat16 and k.shape[-2] <= 1024)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """x [B, L, H*D] -> [B, H, L, D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """x [B, H, L, D] -> [B, L, H*D]."""
    return x.transpose(1, 2).flatten(2)
