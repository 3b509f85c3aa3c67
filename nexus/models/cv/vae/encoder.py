"""Small encoders of a VAE: picture -> moments of a flat latent."""

import math

from torch import Tensor, nn


class ConvEncoder(nn.Module):
    """Strided 4x4 convolutions, each halving the side, then one hidden layer: x [B, C, S, S] -> [B, out].

    The network of Burgess et al. 2018 when S = 64 and widths = (32, 32, 32, 32).
    """

    def __init__(self, channels: int, size: int, widths: tuple[int, ...], hidden: int, out: int):
        super().__init__()
        before = (channels, *widths[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(c, o, 4, 2, 1) for c, o in zip(before, widths, strict=True))
        self.fc = nn.Linear(widths[-1] * (size // 2 ** len(widths)) ** 2, hidden)
        self.out = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x).relu()
        return self.out(self.fc(x.flatten(1)).relu())


class MLPEncoder(nn.Module):
    """Fully connected tanh layers: x [B, C, S, S] -> [B, out]. Kingma & Welling 2013."""

    def __init__(self, shape: tuple[int, int, int], hidden: tuple[int, ...], out: int):
        super().__init__()
        before = (math.prod(shape), *hidden[:-1])
        self.layers = nn.ModuleList(nn.Linear(c, o) for c, o in zip(before, hidden, strict=True))
        self.out = nn.Linear(hidden[-1], out)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).tanh()
        return self.out(x)
