"""Halving and doubling by a binomial filter. Zhang 2019, arXiv:1904.11486; Karras et al. 2020, arXiv:1912.04958."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = (1.0, 3.0, 3.0, 1.0)


def _filter(x: Tensor, gain: float) -> Tensor:
    """The filter of every channel of x [B, C, H, W]: [C, 1, 4, 4], its sum `gain`."""
    taps = torch.tensor(TAPS, device=x.device, dtype=torch.float32)
    square = torch.outer(taps, taps) * (gain / taps.sum() ** 2)
    return square.to(x.dtype).expand(x.shape[1], 1, -1, -1).contiguous()


def fir_down(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, C, H/2, W/2]; zeros lie outside the picture."""
    return F.conv2d(x, _filter(x, 1.0), stride=2, padding=1, groups=x.shape[1])


def fir_up(x: Tensor) -> Tensor:
    """x [B, C, H, W] -> [B, C, 2H, 2W]."""
    return F.conv_transpose2d(x, _filter(x, 4.0), stride=2, padding=1, groups=x.shape[1])


class FirConvDown(nn.Module):
    """The filter, then a strided 3x3 convolution: x [B, C, H, W] -> [B, O, H/2, W/2]."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, _filter(x, 1.0), padding=2, groups=x.shape[1]))
