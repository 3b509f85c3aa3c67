"""Normalisation inside attention; a plain RMS norm is torch.nn.RMSNorm."""

import torch.nn.functional as F
from torch import Tensor, nn


class QKNorm(nn.Module):
    """RMS norm with a gain of queries and keys [..., D], each over its last axis: keeps attention scores bounded.

    Zhang & Sennrich 2019 (the norm); Esser et al. 2024, section 5.3.2 (its use in MMDiT).
    """

    def __init__(self, dim: int, *, eps: float = 1e-6):
        super().__init__()
        self.q, self.k = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # Under autocast q is bfloat16 and the gain float32, which the fused kernel refuses.
        return tuple(F.rms_norm(v, norm.normalized_shape, norm.weight.to(v.dtype), norm.eps)
                     for v, norm in ((q, self.q), (k, self.k)))
