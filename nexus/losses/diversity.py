"""How different made pictures are from one another: what mode collapse takes away, without a feature network."""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 8            # pictures are compared at this size, so that fine noise is no diversity


def diversity(fake: Tensor, real: Tensor) -> Tensor:
    """Mean distance of made pictures [B, C, H, W] from each other, as a share of that of real ones: 0 = collapsed."""
    return _spread(fake) / _spread(real).clamp_min(1e-6)


def _spread(x: Tensor) -> Tensor:
    """The mean L2 distance over pairs of different pictures; 0 for one picture."""
    small = F.adaptive_avg_pool2d(x.detach().float(), SIDE).flatten(1)
    return torch.pdist(small).mean() if len(small) > 1 else small.new_zeros(())
