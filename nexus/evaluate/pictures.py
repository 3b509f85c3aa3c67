"""How near a picture is to its original, pixel by pixel: PSNR and SSIM."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import InputError

WINDOW, SIGMA = 11, 1.5         # pixels
K1, K2, PEAK = 0.01, 0.03, 255.0
PSNR_MOST = 100.0              # dB, of one picture: equal ones are infinitely near, and a mean must stay a number


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal to noise ratio in dB, x and y [N, C, H, W] in [0, 255] -> [N], at most 100 (equal pictures)."""
    _check(x, y, 1)
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(PEAK**2 / error)).clamp(max=PSNR_MOST)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity, x and y [N, C, H, W] in [0, 255] -> [N]. Wang et al. 2004.

    Gaussian 11 x 11 windows (sigma 1.5) that lie wholly inside, mean over windows and channels (the paper: grey only).
    """
    _check(x, y, WINDOW)
    x, y = x.double(), y.double()
    mx, my = _blur(x), _blur(y)
    vx, vy, vxy = _blur(x * x) - mx * mx, _blur(y * y) - my * my, _blur(x * y) - mx * my
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    similar = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return similar.flatten(1).mean(1)


def _blur(x: Tensor) -> Tensor:
    """Weighted means over every whole window, one axis after the other."""
    at = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weight = torch.exp(-at * at / (2 * SIGMA**2))
    weight = (weight / weight.sum()).expand(x.shape[1], 1, 1, WINDOW)
    rows = F.conv2d(x, weight, groups=x.shape[1])
    return F.conv2d(rows, weight.transpose(2, 3), groups=x.shape[1])


def _check(x: Tensor, y: Tensor, side: int) -> None:
    if x.shape != y.shape or x.ndim != 4:
        raise InputError(f"pictures of shape {list(x.shape)} and {list(y.shape)} cannot be compared")
    if min(x.shape[2:]) < side:
        raise InputError(f"pictures of {x.shape[3]}x{x.shape[2]} pixels are too small, {side} a side expected")
