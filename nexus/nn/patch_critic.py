"""PatchGAN: a critic that scores overlapping patches. Isola et al. 2017; 70x70 pixels with three strided layers."""

import torch.nn.functional as F
from torch import Tensor, nn

from nexus.nn.gan_blocks import norm_of

LARGEST = 8         # the width grows to at most so many times the first


class PatchCritic(nn.Module):
    """x [B, C, H, W] in [-1, 1] -> scores [B, 1, h, w], one a patch.

    width: channels of the first layer, doubled by each next one up to eight times. layers: strided layers, each of
    which halves the map. norm: "instance", "batch" or "none" of all layers but the first and the last.
    """

    def __init__(self, channels: int = 3, width: int = 64, layers: int = 3, norm: str = "instance"):
        super().__init__()
        widths = [width * min(2**i, LARGEST) for i in range(layers + 1)]
        self.first = nn.Conv2d(channels, widths[0], 4, 2, 1)
        # A bias before a batch norm would be subtracted again.
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 4, 2 if i + 1 < layers else 1, 1, bias=norm != "batch")
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)))
        self.norms = nn.ModuleList(norm_of(norm, b) for b in widths[1:])
        self.last = nn.Conv2d(widths[-1], 1, 4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x)[-1])

    def features(self, x: Tensor) -> list[Tensor]:
        """The hidden maps after each activation, from the first layer on; `last` of the last is the score."""
        maps = [F.leaky_relu(self.first(x), 0.2)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps.append(F.leaky_relu(norm(conv(maps[-1])), 0.2))
        return maps
