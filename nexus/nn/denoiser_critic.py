"""A critic that sees latents through a frozen denoiser: what its blocks make of them at many levels of noise.

As in latent adversarial diffusion distillation (Sauer et al. 2024, arXiv:2403.12015), here against a generator that
begins from nothing. B items, S blocks that are seen, D the width of their tokens, K scores an item.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config, not_above
from nexus.nn.gan_blocks import LabelledScore, Labels, lipschitz

SLOPE = 0.2
SCORED = 4              # side of the maps that are scored


class DenoiserCriticConfig(Config):
    """model: a diffusion transformer of the same latents. hidden, patch: the width of its tokens and their side.

    seen: its blocks that have a head, each `width` channels wide. least, most: shares of the way from data to noise
    that real and made latents are taken, drawn anew for each, see `looked_through`. spectral: norms of every layer, for
    games without penalties. label "projection": see ProjectedCriticConfig.
    """

    kind: Literal["denoiser"] = "denoiser"
    model: str = "dit"
    hidden: int = Field(168, ge=1)
    patch: int = Field(2, ge=1)
    seen: tuple[int, ...] = Field((1, 3, 5, 7), min_length=1)
    width: int = Field(64, ge=1)
    least: float = Field(0.02, gt=0, lt=1)
    most: float = Field(0.9, gt=0, lt=1)
    spectral: bool = False
    label: Literal["none", "projection"] = "none"
    label_dim: int = Field(64, ge=1)

    _ordered = not_above("least", "most")

    def build(self, net: Config) -> "DenoiserCritic":
        """The critic of what a generator of config `net` makes, told the labels that it is told."""
        known = net.num_classes if self.label != "none" else 0
        return DenoiserCritic(self, net.size // self.patch, Labels(known, net.num_styles, self.label_dim))


class Head(nn.Module):
    """A map [B, D, h, h] -> scores [B, k]: halved until its side is SCORED at most."""

    def __init__(self, hidden: int, side: int, width: int, told: int):
        super().__init__()
        self.first = nn.Conv2d(hidden, width, 1)
        self.downs = nn.ModuleList()
        while side > SCORED:
            self.downs.append(nn.Conv2d(width, 2 * width, 4, 2, 1))
            width, side = 2 * width, side // 2
        self.middle = nn.Conv2d(width, width, 3, 1, 1)
        self.score = LabelledScore(width, min(SCORED, side), told)

    def forward(self, h: Tensor, rows: Tensor | None) -> Tensor:
        h = F.leaky_relu(self.first(h), SLOPE)
        for down in self.downs:
            h = F.leaky_relu(down(h), SLOPE)
        return self.score(h + F.leaky_relu(self.middle(h), SLOPE), rows).flatten(1)


class DenoiserCritic(nn.Module):
    """Features [B, S * D, h, h] (and labels) -> scores [B, K] of all heads, and None: no class."""

    def __init__(self, config: DenoiserCriticConfig, side: int, labels: Labels):
        super().__init__()
        self.config = config
        self.labels = labels
        self.heads = nn.ModuleList(Head(config.hidden, side, config.width, labels.dim) for _ in config.seen)
        lipschitz(self, config.spectral)

    def forward(self, h: Tensor, cond: dict[str, Tensor] | None = None) -> tuple[Tensor, None]:
        rows, maps = self.labels(cond, h), h.chunk(len(self.heads), 1)
        return torch.cat([head(each, rows) for head, each in zip(self.heads, maps, strict=True)], 1), None
