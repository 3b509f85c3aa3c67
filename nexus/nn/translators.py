"""Networks from picture to picture: CycleGAN's residual generator and pix2pix's U-Net.

B pictures, I channels in, O channels out, H W pixels.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.gan_blocks import gaussian_weights, norm_of, normed
from nexus.rng import ItemNoise

DEEPEST = 8         # the U-Net's width grows to at most so many times the first


class ResnetConfig(Config):
    """Two halvings, residual blocks, two doublings; the defaults are CycleGAN's for 256 pixels. Johnson et al. 2016."""

    kind: Literal["resnet"] = "resnet"
    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    width: int = Field(64, ge=1)
    blocks: int = Field(9, ge=1)
    norm: Literal["instance", "batch"] = "instance"
    dropout: bool = False

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return 4

    def build(self) -> "Resnet":
        """The network with its initial weights."""
        return Resnet(self)


class ReflectBlock(nn.Module):
    """x [B, C, H, W] + two 3x3 convolutions of it, edges reflected."""

    def __init__(self, channels: int, norm: str, dropout: bool):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, bias=norm == "instance") for _ in range(2))
        self.norm1, self.norm2 = norm_of(norm, channels), norm_of(norm, channels)
        self.dropout = dropout

    def forward(self, x: Tensor, noise: ItemNoise | None = None, own: bool = False) -> Tensor:
        h = F.relu(normed(self.norm1, self.conv1(_reflected(x, 1)), own))
        if self.dropout:
            h = halved(h, self.training, noise)
        return x + normed(self.norm2, self.conv2(_reflected(h, 1)), own)


class Resnet(nn.Module):
    """x [B, I, H, W] -> [B, O, H, W] in (-1, 1), sides multiples of 4, at least 16. noise and own: see `halved`."""

    def __init__(self, config: ResnetConfig):
        super().__init__()
        self.config, c = config, config
        w, bias = c.width, c.norm == "instance"     # a batch norm subtracts a bias again
        self.first = nn.Conv2d(c.in_channels, w, 7, bias=bias)
        self.downs = nn.ModuleList(nn.Conv2d(w * i, 2 * w * i, 3, 2, 1, bias=bias) for i in (1, 2))
        self.blocks = nn.ModuleList(ReflectBlock(4 * w, c.norm, c.dropout) for _ in range(c.blocks))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(2 * w * i, w * i, 3, 2, 1, 1, bias=bias) for i in (2, 1))
        self.norms = nn.ModuleList(norm_of(c.norm, w * i) for i in (1, 2, 4, 2, 1))
        self.last = nn.Conv2d(w, c.out_channels, 7)
        gaussian_weights(self)

    def forward(self, x: Tensor, noise: ItemNoise | None = None, own: bool = False) -> Tensor:
        h = F.relu(normed(self.norms[0], self.first(_reflected(x, 3)), own))
        for conv, norm in zip(self.downs, self.norms[1:3], strict=True):
            h = F.relu(normed(norm, conv(h), own))
        for block in self.blocks:
            h = block(h, noise, own)
        for conv, norm in zip(self.ups, self.norms[3:], strict=True):
            h = F.relu(normed(norm, conv(h), own))
        return torch.tanh(self.last(_reflected(h, 3)))


class UNetConfig(Config):
    """depth: halvings; the defaults are pix2pix's for 256 pixels; dropout is its only noise. Isola et al. 2017."""

    kind: Literal["unet"] = "unet"
    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    width: int = Field(64, ge=1)
    depth: int = Field(8, ge=3)
    norm: Literal["instance", "batch"] = "batch"
    dropout: bool = True

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return 2**self.depth

    def build(self) -> "UNet":
        """The network with its initial weights."""
        return UNet(self)


class UNet(nn.Module):
    """x [B, I, H, W] -> [B, O, H, W] in (-1, 1), sides multiples of 2^depth. noise and own: see `halved`."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config, c = config, config
        bias = c.norm == "instance"
        widths = [c.width * min(2**i, DEEPEST) for i in range(c.depth)]
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1, bias=bias)
                                   for a, b in zip([c.in_channels, *widths], widths, strict=False))
        # From the deepest on; all but the deepest also see what went down at their level.
        ends = [c.out_channels, *widths]
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(ends[i + 1] * (1 if i + 1 == c.depth else 2), ends[i], 4, 2, 1, bias=bias or i == 0)
            for i in reversed(range(c.depth)))
        self.down_norms = nn.ModuleList(norm_of(c.norm, w) for w in widths[1:-1])
        self.up_norms = nn.ModuleList(norm_of(c.norm, w) for w in reversed(widths[:-1]))
        gaussian_weights(self)

    def forward(self, x: Tensor, noise: ItemNoise | None = None, own: bool = False) -> Tensor:
        maps = [self.downs[0](x)]
        for i, conv in enumerate(self.downs[1:]):
            h = conv(F.leaky_relu(maps[-1], 0.2))
            maps.append(normed(self.down_norms[i], h, own) if i < len(self.down_norms) else h)
        h = maps.pop()
        for i, (conv, norm) in enumerate(zip(self.ups, self.up_norms, strict=False)):
            h = normed(norm, conv(F.relu(h)), own)
            if self.config.dropout and 0 < i <= self.config.depth - 5:
                h = halved(h, self.training, noise)
            h = torch.cat([maps.pop(), h], 1)
        return torch.tanh(self.ups[-1](F.relu(h)))


def _reflected(x: Tensor, pad: int) -> Tensor:
    return F.pad(x, (pad,) * 4, mode="reflect")


def halved(h: Tensor, training: bool, noise: ItemNoise | None) -> Tensor:
    """Half of h dropped: in training from torch's stream, else by each item's own `noise`, or not at all without one.

    pix2pix leaves its dropout on when it is used, and its batch norms at the statistics of the picture (`own`).
    """
    if training or noise is None:
        return F.dropout(h, 0.5, training)
    return torch.where(noise(h) > 0, 2 * h, torch.zeros_like(h))
