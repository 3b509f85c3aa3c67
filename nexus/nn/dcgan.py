"""DCGAN: strided convolutions between a code and a picture, in both directions. Radford et al. 2015.

B pictures, C channels, Z = length of the code, E = width of a label's row.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.gan_blocks import LabelHead, LabelMap, Labels, LabelUse, Norm, gaussian_weights, lipschitz, norm_of

Cond = dict[str, Tensor] | None


def _halvings(size: int) -> int:
    """How often a side is halved until it is 4."""
    return round(math.log2(size)) - 2


class DCGeneratorConfig(Config):
    """The defaults are pytorch/examples'. label_dim: width of the row of the label that is joined to the code."""

    kind: Literal["dcgan"] = "dcgan"
    size: int = Field(64, ge=8, le=1024)
    channels: int = Field(3, ge=1)
    width: int = Field(64, ge=1, description="channels at half the full resolution")
    latents: int = Field(100, ge=1)
    label_dim: int = Field(50, ge=1)
    num_classes: int = Field(0, ge=0)
    num_styles: int = Field(0, ge=0)

    @field_validator("size")
    @classmethod
    def _power(cls, size: int) -> int:
        if size & (size - 1):
            raise ValueError("a power of two is expected")
        return size

    def build(self) -> "DCGenerator":
        """The network with its initial weights."""
        return DCGenerator(self)


class DCGenerator(nn.Module):
    """Codes z [B, Z] (and labels) -> pictures [B, C, size, size] in (-1, 1)."""

    def __init__(self, config: DCGeneratorConfig):
        super().__init__()
        self.config, c = config, config
        self.labels = Labels(c.num_classes, c.num_styles, c.label_dim)
        widths = [c.width * 2**i for i in reversed(range(_halvings(c.size)))]
        ends = [c.latents + self.labels.dim, *widths, c.channels]
        self.convs = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2 if i else 1, 1 if i else 0, bias=False)
                                   for i, (a, b) in enumerate(zip(ends, ends[1:], strict=False)))
        self.norms = nn.ModuleList(norm_of("batch", width) for width in widths)
        gaussian_weights(self)

    def forward(self, z: Tensor, cond: Cond = None) -> Tensor:
        rows = self.labels(cond, z)
        h = (z if rows is None else torch.cat([z, rows], 1))[:, :, None, None]
        for conv, norm in zip(self.convs, self.norms, strict=False):
            h = F.relu(norm(conv(h)))
        return torch.tanh(self.convs[-1](h))


class DCCriticConfig(Config):
    """norm: of all layers but the first and the last. spectral: divide each weight by its largest singular value."""

    kind: Literal["dcgan"] = "dcgan"
    width: int = Field(64, ge=1, description="channels at half the full resolution")
    norm: Norm = "batch"
    spectral: bool = False
    label: LabelUse = "none"

    def build(self, net: Config) -> "DCCritic":
        """The critic of what a generator of config `net` makes."""
        return lipschitz(DCCritic(self, net), self.spectral)


class DCCritic(nn.Module):
    """Pictures x [B, C, size, size] (and labels) -> scores [B, 1], and class logits [B, K] or None."""

    def __init__(self, config: DCCriticConfig, net: Config):
        super().__init__()
        self.map = LabelMap(config.label, net.size, net.num_classes, net.num_styles)
        widths = [config.width * 2**i for i in range(_halvings(net.size))]
        ends = [net.channels + self.map.channels, *widths]
        # A bias before a norm that subtracts the mean would be lost; pytorch/examples has none anywhere.
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1, bias=config.norm == "none")
                                   for a, b in zip(ends, widths, strict=False))
        self.norms = nn.ModuleList(norm_of(config.norm, width) for width in widths[1:])
        self.last = nn.Conv2d(widths[-1], 1, 4, bias=False)
        self.head = LabelHead(config.label, widths[-1], net.num_classes, net.num_styles)
        gaussian_weights(self)

    def forward(self, x: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor | None]:
        h = F.leaky_relu(self.convs[0](self.map(x, cond)), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            h = F.leaky_relu(norm(conv(h)), 0.2)
        more, logits = self.head(h.sum((2, 3)), cond)
        return self.last(h).flatten(1) + more, logits
