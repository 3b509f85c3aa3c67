"""Residual generator and critic in the spirit of R3GAN: no styles, no noise inputs, no norms. Huang et al. 2024.

The blocks are inverted bottlenecks with a grouped 3x3 convolution, started as the identity with the scale of Fixup
(Zhang et al. 2019); between resolutions pictures are resampled bilinearly. With batch norms in the generator they are
near WGAN-GP's residual networks (Gulrajani et al. 2017).
B pictures, C channels, Z = length of the code, E = width of a label's row.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.gan_blocks import LabelHead, LabelledNorm, LabelMap, Labels, LabelUse, Norm, lipschitz, norm_of

Cond = dict[str, Tensor] | None
SLOPE = 0.2
START = 4           # side of the smallest maps, pixels


def _scaled(conv: nn.Conv2d | nn.Linear, gain: float) -> nn.Module:
    """The layer with weights of standard deviation gain / sqrt(inputs) and biases of 0."""
    inputs = conv.weight[0].numel()
    nn.init.normal_(conv.weight, 0.0, gain / inputs**0.5)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


# Networks of the embedded pictures. Dense convolutions: grouped ones, as R3GAN has them, cost several times as much a
# step on a processor and on a graphics card alike.
EMOJI_NET = {"kind": "resnet", "widths": (256, 256, 160, 80, 40), "blocks": 1, "expansion": 1, "group": 1024}
# The same of the shared codec's latents, 16 x 16.
LATENT_NET = {"kind": "resnet", "widths": (256, 128, 48), "blocks": 2, "expansion": 1, "group": 1024, "channels": 8}
LATENT_NORMED = LATENT_NET | {"norm": "batch"}
LATENT_CRITIC = {key: LATENT_NET[key] for key in ("kind", "widths", "blocks", "expansion", "group")}


class Block(nn.Module):
    """x [B, C, H, W] + a bottleneck of `inner` channels, grouped; emb [B, E] steers its norms where it has such.

    last: gain of the last convolution at the start; 0 = the block begins as the identity. Spectral norms forbid that: a
    weight of zeros has no largest singular value to divide by.
    """

    def __init__(self, channels: int, inner: int, group: int, norm: Norm, emb: int, depth: int, last: float = 0.0):
        super().__init__()
        gain = 2**0.5 * depth ** -0.25                  # Fixup of branches of three layers
        self.conv1 = _scaled(nn.Conv2d(channels, inner, 1), gain)
        self.conv2 = _scaled(nn.Conv2d(inner, inner, 3, 1, 1, groups=max(1, inner // group)), gain)
        self.conv3 = _scaled(nn.Conv2d(inner, channels, 1, bias=False), last)
        labelled = norm == "batch" and emb
        self.norms = nn.ModuleList(LabelledNorm(inner, emb) if labelled else norm_of(norm, inner) for _ in range(2))

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        h = x
        for conv, norm in zip((self.conv1, self.conv2), self.norms, strict=True):
            h = conv(h)
            h = F.leaky_relu(norm(h, emb) if isinstance(norm, LabelledNorm) else norm(h), SLOPE)
        return x + self.conv3(h)


class ResGeneratorConfig(Config):
    """widths: channels of each resolution from 4x4 up, each twice the side of the one before.

    blocks: of each resolution. expansion: how much wider a block is inside. group: channels of a group of its 3x3
    convolution. norm "batch" is steered by the label where there is one. bounded: tanh keeps pictures in [-1, 1].
    spectral: norms of every layer, without which a bounded generator saturates against a projected critic.
    """

    kind: Literal["resnet"] = "resnet"
    channels: int = Field(3, ge=1)
    widths: tuple[int, ...] = Field((256, 256, 192, 128, 64), min_length=2)
    blocks: int = Field(2, ge=1)
    expansion: int = Field(2, ge=1)
    group: int = Field(32, ge=1)
    norm: Literal["none", "batch"] = "none"
    bounded: bool = False
    spectral: bool = False
    latents: int = Field(64, ge=1)
    label_dim: int = Field(64, ge=1)
    num_classes: int = Field(0, ge=0)
    num_styles: int = Field(0, ge=0)

    @property
    def size(self) -> int:
        """Side of the pictures, pixels."""
        return START * 2 ** (len(self.widths) - 1)

    def build(self) -> "ResGenerator":
        """The network with its initial weights."""
        return lipschitz(ResGenerator(self), self.spectral)


class ResGenerator(nn.Module):
    """Codes z [B, Z] (and labels) -> pictures [B, C, size, size], in [-1, 1] but for overshoot where not bounded."""

    def __init__(self, config: ResGeneratorConfig):
        super().__init__()
        self.config, c = config, config
        self.labels = Labels(c.num_classes, c.num_styles, c.label_dim)
        self.code = _scaled(nn.Linear(c.latents + self.labels.dim, c.widths[0]), 1.0)
        self.basis = nn.Parameter(torch.randn(c.widths[0], START, START))
        depth, emb, last = c.blocks * len(c.widths), self.labels.dim, float(c.spectral)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(w, c.expansion * w, c.group, c.norm, emb, depth, last) for _ in range(c.blocks))
            for w in c.widths)
        self.ups = nn.ModuleList(_scaled(nn.Conv2d(a, b, 1, bias=False), 1.0)
                                 for a, b in zip(c.widths, c.widths[1:], strict=False))
        self.last = _scaled(nn.Conv2d(c.widths[-1], c.channels, 1), 1.0)

    def forward(self, z: Tensor, cond: Cond = None) -> Tensor:
        emb = self.labels(cond, z)
        h = self.basis * self.code(z if emb is None else torch.cat([z, emb], 1))[:, :, None, None]
        for i, stage in enumerate(self.stages):
            if i:
                h = F.interpolate(self.ups[i - 1](h), scale_factor=2.0, mode="bilinear", align_corners=False)
            for block in stage:
                h = block(h, emb)
        return self.last(h).tanh() if self.config.bounded else self.last(h)


class ResCriticConfig(Config):
    """widths: channels of each resolution from 4x4 up, as of a generator."""

    kind: Literal["resnet"] = "resnet"
    widths: tuple[int, ...] = Field((256, 256, 192, 128, 64), min_length=2)
    blocks: int = Field(2, ge=1)
    expansion: int = Field(2, ge=1)
    group: int = Field(32, ge=1)
    norm: Literal["none", "layer"] = "none"
    spectral: bool = False
    label: LabelUse = "none"

    def build(self, net: Config) -> "ResCritic":
        """The critic of what a generator of config `net` makes."""
        return lipschitz(ResCritic(self, net), self.spectral)


class ResCritic(nn.Module):
    """Pictures x [B, C, size, size] (and labels) -> scores [B, 1], and class logits [B, K] or None."""

    def __init__(self, config: ResCriticConfig, net: Config):
        super().__init__()
        c, widths = config, tuple(reversed(config.widths))
        self.map = LabelMap(c.label, net.size, net.num_classes, net.num_styles)
        self.first = _scaled(nn.Conv2d(net.channels + self.map.channels, widths[0], 1), 1.0)
        depth = c.blocks * len(widths)
        last = float(c.spectral)
        self.stages = nn.ModuleList(
            nn.ModuleList(Block(w, c.expansion * w, c.group, c.norm, 0, depth, last) for _ in range(c.blocks))
            for w in widths)
        self.downs = nn.ModuleList(_scaled(nn.Conv2d(a, b, 1, bias=False), 1.0)
                                   for a, b in zip(widths, widths[1:], strict=False))
        self.gather = _scaled(nn.Conv2d(widths[-1], widths[-1], START, groups=widths[-1], bias=False), 1.0)
        self.score = _scaled(nn.Linear(widths[-1], 1), 1.0)
        self.head = LabelHead(c.label, widths[-1], net.num_classes, net.num_styles)

    def forward(self, x: Tensor, cond: Cond = None) -> tuple[Tensor, Tensor | None]:
        h = self.first(self.map(x, cond))
        for i, stage in enumerate(self.stages):
            if i:
                h = self.downs[i - 1](F.avg_pool2d(h, 2))
            for block in stage:
                h = block(h)
        h = self.gather(h).flatten(1)
        more, logits = self.head(h, cond)
        return self.score(h) + more, logits
