"""Halving and doubling a picture's sides."""

import torch.nn.functional as F
from torch import Tensor, nn


class Downsample(nn.Module):
    """x [B, C, H, W] -> [B, O, H/2, W/2] by a strided 3x3 convolution, or by averaging when `conv` is False.

    `corner` pads right and bottom only, as the KL codec of Stable Diffusion and the original DDPM do.
    """

    def __init__(self, channels: int, out: int | None = None, *, conv: bool = True, corner: bool = False):
        super().__init__()
        self.corner = corner
        self.conv = nn.Conv2d(channels, out or channels, 3, 2, 0 if corner else 1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is None:
            return F.avg_pool2d(x, 2)
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.corner else x)


class Upsample(nn.Module):
    """x [B, C, H, W] -> [B, O, 2H, 2W]: nearest neighbour, then a 3x3 convolution unless `conv` is False."""

    def __init__(self, channels: int, out: int | None = None, *, conv: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(channels, out or channels, 3, 1, 1) if conv else None

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return x if self.conv is None else self.conv(x)
