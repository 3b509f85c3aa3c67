"""Picture distances that weigh edges and textures, where plain pixel distances blur."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.losses.lpips import enlarged

SIDE = 128              # px: smaller pictures are enlarged to it, for networks that were trained on larger ones
DIM = 1e-4              # the length below which a feature is none


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [B, C, H, W] -> differences of neighbours, down [B, C, H-1, W] and across [B, C, H, W-1]."""
    return x.diff(dim=2), x.diff(dim=3)


def edge_distance(x: Tensor, y: Tensor, scales: int = 3) -> Tensor:
    """Mean |gradient difference| of x and y [B, C, H, W], averaged over `scales` halvings of both: a scalar.

    The gradient difference loss of Mathieu et al. 2016 at several scales; zero when x - y is constant. Sides under
    two pixels have no neighbours: pictures too small for all scales use fewer.
    """
    error, parts = x - y, [x.new_zeros(())]
    while len(parts) <= scales and min(error.shape[-2:]) > 1:
        parts.append(sum(part.abs().mean() for part in gradients(error)))
        error = F.avg_pool2d(error, 2)
    return sum(parts) / max(len(parts) - 1, 1)


def perceptual_distance(network: Callable[[Tensor], list[Tensor]], x: Tensor, y: Tensor, side: int = SIDE) -> Tensor:
    """Mean squared distance of a frozen network's maps of x and y [B, C, H, W], a mean over its levels: a scalar.

    Maps are brought to length 1 along their channels, as in LPIPS, but all channels weigh the same. Gradients reach x
    alone. After the feature loss of Johnson et al. 2016, arXiv:1603.08155.
    """
    def seen(pictures: Tensor) -> list[Tensor]:
        return [F.normalize(level, dim=1, eps=DIM) for level in network(enlarged(pictures, side))]
    with torch.no_grad():
        wanted = seen(y)
    far = [(a - b).square().sum(1).mean() for a, b in zip(seen(x), wanted, strict=True)]
    return sum(far) / len(far)
