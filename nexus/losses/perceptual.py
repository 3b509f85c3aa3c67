"""Picture distances that weigh edges, where plain pixel distances blur."""

import torch.nn.functional as F
from torch import Tensor


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C, H, W] -> differences of neighbours, down [B, C, H-1, W] and across [B, C, H, W-1]."""
    return x.diff(dim=2), x.diff(dim=3)


def edge_distance(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """Mean |gradient difference| of x and y [B, C, H, W], averaged over `scales` halvings of both: a scalar.

    The gradient difference loss of Mathieu et al. 2016 at several scales; zero when x - y is constant.
    """
    error, total = x - y, x.new_zeros(())
    for _ in range(scales):
        total = total + sum(part.abs().mean() for part in gradients(error))
        error = F.avg_pool2d(error, 2)
    return total / scales
