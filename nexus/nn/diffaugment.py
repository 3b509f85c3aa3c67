"""DiffAugment: the critic sees real and made pictures through the same random, differentiable changes. Zhao 2020.

All draws come from a CPU generator, so equal generators change pictures equally on every machine.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Policy = Literal["color", "hue", "translation", "cutout"]
SHIFT, HOLE = 1 / 8, 1 / 2      # of the side


def diff_augment(x: Tensor, rng: torch.Generator, policy: Sequence[Policy]) -> Tensor:
    """x [B, C, H, W] in [-1, 1], each picture changed by draws of its own; differentiable in x."""
    for name in policy:
        x = CHANGES[name](x, rng)
    return x


def color(x: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness plus U(-0.5, 0.5), saturation times U(0, 2), contrast times U(0.5, 1.5)."""
    brightness, saturation, contrast = (_uniform(x, rng) for _ in range(3))
    x = x + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    middle = x.mean((1, 2, 3), keepdim=True)
    return middle + (x - middle) * (contrast + 0.5)


def hue(x: Tensor, rng: torch.Generator) -> Tensor:
    """Colours turned by any angle about the grey axis, clamped to [-1, 1]; greys stay, as does one channel alone.

    A turn is the identity's share cos(t), the mean's 1 - cos(t), and sin(t) of the cross product with the axis.
    """
    if x.shape[1] != 3:
        return x
    angle = 2 * math.pi * _uniform(x, rng)
    across = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)
    return (angle.cos() * x + (1 - angle.cos()) * x.mean(1, keepdim=True) + angle.sin() * across).clamp(-1, 1)


def translation(x: Tensor, rng: torch.Generator) -> Tensor:
    """Moved by up to an eighth of each side, zeros where nothing was."""
    b, _, h, w = x.shape
    reach = [round(side * SHIFT) for side in (h, w)]
    rows, cols = (torch.randint(0, 2 * r + 1, (b, 1), generator=rng).to(x.device) + torch.arange(side, device=x.device)
                  for r, side in zip(reach, (h, w), strict=True))
    wide = F.pad(x, (reach[1], reach[1], reach[0], reach[0])).permute(0, 2, 3, 1)
    item = torch.arange(b, device=x.device)[:, None, None]
    return wide[item, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)


def cutout(x: Tensor, rng: torch.Generator) -> Tensor:
    """A rectangle of half of each side set to zero, its middle anywhere in the picture."""
    b, _, h, w = x.shape
    inside = [_covered(torch.randint(0, side + 1, (b, 1), generator=rng).to(x.device), side) for side in (h, w)]
    hole = inside[0][:, :, None] & inside[1][:, None, :]
    return x.masked_fill(hole[:, None], 0.0)


def _covered(middle: Tensor, side: int) -> Tensor:
    """middle [B, 1] -> bool [B, side]: the pixels within a quarter of the side of it."""
    from_middle = torch.arange(side, device=middle.device) - middle
    half = round(side * HOLE / 2)
    return (from_middle >= -half) & (from_middle < half)


def _uniform(x: Tensor, rng: torch.Generator) -> Tensor:
    return torch.rand(len(x), 1, 1, 1, generator=rng).to(x)


CHANGES = {"color": color, "hue": hue, "translation": translation, "cutout": cutout}
