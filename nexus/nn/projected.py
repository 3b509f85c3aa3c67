"""A critic that sees pictures through a frozen network's features, mixed at random. Sauer et al. 2021, "Projected GANs
Converge Faster", arXiv:2111.01007.

B pictures, K scores a picture. The features are EfficientNet-lite's (nn/efficientnet.py), read from a file when the
critic is first asked, so that a model without its critic needs no such file.
"""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError
from nexus.nn.efficientnet import LEVELS, EfficientNet, opened
from nexus.nn.gan_blocks import BatchNorm, LabelledScore, Labels, lipschitz

SLOPE = 0.2
SCORED = 4              # side of what a score sees of the last map


class ProjectedCriticConfig(Config):
    """weights: the file of the features. side: pictures are resized to it first, 0 = as they are.

    width: channels of the largest mixed map, twice as many in each smaller one. levels: how many maps have a critic of
    their own. end: side of the maps that are scored. label "projection": a score is the inner product of what is seen
    and of `label_dim` numbers of the label (Miyato & Koyama 2018).
    """

    kind: Literal["projected"] = "projected"
    weights: str = Field("", description="made by `nexus convert --to efficientnet`")
    side: int = Field(0, ge=0)
    width: int = Field(32, ge=1)
    levels: int = Field(4, ge=1, le=len(LEVELS))
    end: int = Field(8, ge=SCORED)
    norm: Literal["batch"] = "batch"
    label: Literal["none", "projection"] = "none"
    label_dim: int = Field(64, ge=1)

    def build(self, net: Config, size: int) -> "ProjectedCritic":
        """The critic of pictures of `size` pixels, told the labels that a generator of config `net` is told."""
        return ProjectedCritic(self, size, Labels(net.num_classes if self.label != "none" else 0, net.num_styles,
                                                  self.label_dim))


class Mixer(nn.Module):
    """Frozen at its random start: mixes the channels of each map, then every smaller map into the next larger.

    Maps of LEVELS channels, halved sides -> maps of width, width, 2 width, 4 width channels and twice their sides.
    """

    def __init__(self, width: int):
        super().__init__()
        wide = [width * 2**i for i in range(len(LEVELS))]
        narrow = [max(w // 2, width) for w in wide]
        self.channels = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(LEVELS, wide, strict=True))
        self.scales = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in zip(wide, narrow, strict=True))
        for conv in (*self.channels, *self.scales):
            nn.init.kaiming_normal_(conv.weight)
            nn.init.zeros_(conv.bias)
        self.requires_grad_(False)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The mixed maps, from the largest to the smallest."""
        out, below = [], None
        for i in reversed(range(len(maps))):
            h = self.channels[i](maps[i])
            h = h if below is None else h + below
            below = self.scales[i](F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=True))
            out.append(below)
        return out[::-1]


class Head(nn.Module):
    """A map [B, C, h, h] -> scores [B, 1, k, k]: halved until its side is `end` at most, then four pixels a score.

    told: width of the labels' rows [B, told], 0 = there are none.
    """

    def __init__(self, channels: int, side: int, end: int, widest: int, told: int):
        super().__init__()
        sides = [side]
        while sides[-1] > end:
            sides.append(sides[-1] // 2)
        widths = [channels, *(min(widest, channels * 2 ** (i + 1)) for i in range(len(sides) - 1))]
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Conv2d(a, b, 4, 2, 1, bias=False), BatchNorm(b), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*layers)
        self.score = LabelledScore(widths[-1], SCORED, told)

    def forward(self, h: Tensor, rows: Tensor | None) -> Tensor:
        return self.score(self.layers(h), rows)


class ProjectedCritic(nn.Module):
    """Pictures x [B, 3 or 1, H, W] in [-1, 1] (and labels) -> scores [B, K] of all heads, and None: no class."""

    def __init__(self, config: ProjectedCriticConfig, size: int, labels: Labels):
        super().__init__()
        self.config, side = config, config.side or size
        if side >> config.levels < SCORED:
            raise InputError(f"critic.levels: {config.levels} maps of a picture of {side} pixels end below {SCORED}",
                             hint=f"fewer levels, or critic.side={SCORED << config.levels}")
        self.mixer = Mixer(config.width)
        self.heads = nn.ModuleList(
            Head(conv.out_channels, side // 2 ** (i + 1), config.end, 8 * config.width, labels.dim)
            for i, conv in enumerate(self.mixer.scales[:config.levels]))
        self.labels = labels
        lipschitz(self.heads, True)

    def features(self, device: torch.device) -> EfficientNet:
        """The frozen network; ModelError when its file is not there."""
        return opened(self.config.weights, device)

    def forward(self, x: Tensor, cond: dict[str, Tensor] | None = None) -> tuple[Tensor, None]:
        if self.config.side and self.config.side != x.shape[-1]:
            x = F.interpolate(x, (self.config.side,) * 2, mode="bilinear", align_corners=False)
        maps, rows = self.mixer(self.features(x.device)(x)), self.labels(cond, x)
        return torch.cat([head(h, rows).flatten(1) for head, h in zip(self.heads, maps, strict=False)], 1), None
