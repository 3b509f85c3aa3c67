"""SEANet: the convolutional encoder and decoder of sound behind EnCodec, with an LSTM at the frame rate.

Tagliasacchi et al. 2020; Defossez et al. 2022. B items, C channels, T samples, F frames, D numbers a frame.

A convolution keeps the length of its weight apart from its direction (weight norm, Salimans & Kingma 2016) as `gain`
beside `conv.weight`: training is then what it was for the published weights, and a conversion is exact both ways. The
product is made anew in each call, which costs as much as one sample of sound.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Keeps the size of what a soft ELU has gone through (as He et al. 2015). PyTorch's own weights are half as large, and
# through twenty layers nothing of a sound would be left at first.
ELU_SPREAD = 1.25
BRANCH_SPREAD = 0.4         # of the last layer of a branch that is added to its input

Padding = Literal["reflect", "constant", "replicate"]
ConvNorm = Literal["weight", "group", "none"]


class Kind(NamedTuple):
    """How all convolutions of a network pad and are normalised.

    causal: all padding is before the first sample. norm: "weight", or "group" = over all of an item's values.
    trim_right: the share of what a causal convolution has too much on its way up that is cut off at the end.
    """

    causal: bool
    padding: Padding
    norm: ConvNorm
    trim_right: float = 1.0


class Shape(NamedTuple):
    """The sizes of an encoder and its decoder; see EncodecConfig."""

    channels: int
    dim: int
    filters: int
    ratios: tuple[int, ...]
    blocks: int
    kernel: int
    last_kernel: int
    block_kernel: int
    dilation: int
    compress: int
    lstm: int
    conv_shortcut: bool
    kind: Kind


def padded(x: Tensor, left: int, right: int, padding: Padding) -> Tensor:
    """x [B, C, T] with so many more samples at its ends; what is too short to be mirrored is first made longer."""
    if padding != "reflect":
        return F.pad(x, (left, right), padding)
    lack = max(0, max(left, right) + 1 - x.shape[-1])
    mirrored = F.pad(F.pad(x, (0, lack)), (left, right), "reflect")
    return mirrored[..., :mirrored.shape[-1] - lack]


class Conv(nn.Module):
    """x [B, C, T] -> [B, D, ceil(T / stride)]; up: -> [B, D, T * stride].

    spread: variance of a new weight, over the number of values that it is summed with.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, kind: Kind, *, stride: int = 1,
                 dilation: int = 1, up: bool = False, spread: float = ELU_SPREAD):
        super().__init__()
        self.kind, self.up, self.stride, self.dilation = kind, up, stride, dilation
        self.conv = (nn.ConvTranspose1d if up else nn.Conv1d)(in_channels, out_channels, kernel, stride)
        fan = in_channels * kernel / (stride if up else 1)
        nn.init.normal_(self.conv.weight, std=(spread / fan) ** 0.5)
        nn.init.zeros_(self.conv.bias)
        weight = self.conv.weight.detach()
        # A norm on the meta device would import torch's compiler, which takes a second.
        length = weight[:, :1, :1].clone() if weight.is_meta else weight.norm(dim=(1, 2), keepdim=True)
        self.gain = nn.Parameter(length) if kind.norm == "weight" else None
        self.norm = nn.GroupNorm(1, out_channels) if kind.norm == "group" else None
        self.surplus = (kernel - 1) * dilation + 1 - stride

    def forward(self, x: Tensor) -> Tensor:
        half = self.surplus // 2
        if self.up:
            made = self._normed(F.conv_transpose1d(x, self._weight(), self.conv.bias, self.stride))
            right = math.ceil(self.surplus * self.kind.trim_right) if self.kind.causal else half
            return made[..., self.surplus - right:made.shape[-1] - right]
        right = 0 if self.kind.causal else half
        filled = right + -x.shape[-1] % self.stride         # the last frame is made a whole one
        x = padded(x, self.surplus - right, filled, self.kind.padding)
        return self._normed(F.conv1d(x, self._weight(), self.conv.bias, self.stride, dilation=self.dilation))

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _weight(self) -> Tensor:
        weight = self.conv.weight
        if self.gain is None:
            return weight
        v = weight.float()
        return (v * (self.gain.float() / v.norm(dim=(1, 2), keepdim=True))).to(weight.dtype)


class Recurrent(nn.Module):
    """An LSTM over the frames, added to its input: x [B, C, F] -> [B, C, F]."""

    def __init__(self, channels: int, layers: int):
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(2, 0, 1)
        return (self.lstm(x)[0] + x).permute(1, 2, 0)


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a convolution or nothing: x [B, C, T] -> [B, C, T]."""

    def __init__(self, channels: int, dilation: int, shape: Shape):
        super().__init__()
        hidden = channels // shape.compress
        self.conv1 = Conv(channels, hidden, shape.block_kernel, shape.kind, dilation=dilation)
        self.conv2 = Conv(hidden, channels, 1, shape.kind, spread=BRANCH_SPREAD)
        self.shortcut = Conv(channels, channels, 1, shape.kind, spread=1.0) if shape.conv_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.shortcut is None else self.shortcut(x)
        return skip + self.conv2(F.elu(self.conv1(F.elu(x))))


class Stage(nn.Module):
    """Residual blocks at one rate, and the convolution that leaves it (down) or came to it (up)."""

    def __init__(self, channels: int, ratio: int, shape: Shape, *, up: bool):
        super().__init__()
        ends = (2 * channels, channels) if up else (channels, 2 * channels)
        self.up = up
        self.blocks = nn.ModuleList(Block(channels, shape.dilation ** j, shape) for j in range(shape.blocks))
        self.resample = Conv(*ends, 2 * ratio, shape.kind, stride=ratio, up=up)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = self.resample(F.elu(x))
        for block in self.blocks:
            x = block(x)
        return x if self.up else self.resample(F.elu(x))


class Encoder(nn.Module):
    """x [B, C, T] -> [B, D, F]: `fast` is all that runs above the frame rate, `slow` the rest."""

    def __init__(self, shape: Shape):
        super().__init__()
        wide = shape.filters * 2 ** len(shape.ratios)
        self.first = Conv(shape.channels, shape.filters, shape.kernel, shape.kind, spread=1.0)
        self.stages = nn.ModuleList(Stage(shape.filters * 2 ** i, ratio, shape, up=False)
                                    for i, ratio in enumerate(reversed(shape.ratios)))
        self.recurrent = Recurrent(wide, shape.lstm) if shape.lstm else None
        self.last = Conv(wide, shape.dim, shape.last_kernel, shape.kind)

    def fast(self, x: Tensor) -> Tensor:
        """x [B, C, T] -> [B, W, F]."""
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return x

    def slow(self, h: Tensor) -> Tensor:
        """h [B, W, F] -> [B, D, F]."""
        return self.last(F.elu(h if self.recurrent is None else self.recurrent(h)))

    def forward(self, x: Tensor) -> Tensor:
        return self.slow(self.fast(x))


class Decoder(nn.Module):
    """z [B, D, F] -> [B, C, T]: `slow` is what runs at the frame rate, `fast` all above it."""

    def __init__(self, shape: Shape):
        super().__init__()
        levels = len(shape.ratios)
        wide = shape.filters * 2 ** levels
        self.first = Conv(shape.dim, wide, shape.kernel, shape.kind, spread=1.0)
        self.recurrent = Recurrent(wide, shape.lstm) if shape.lstm else None
        self.stages = nn.ModuleList(Stage(shape.filters * 2 ** (levels - 1 - i), ratio, shape, up=True)
                                    for i, ratio in enumerate(shape.ratios))
        self.last = Conv(shape.filters, shape.channels, shape.last_kernel, shape.kind)

    def slow(self, z: Tensor) -> Tensor:
        """z [B, D, F] -> [B, W, F]."""
        h = self.first(z)
        return h if self.recurrent is None else self.recurrent(h)

    def fast(self, h: Tensor) -> Tensor:
        """h [B, W, F] -> [B, C, T]."""
        for stage in self.stages:
            h = stage(h)
        return self.last(F.elu(h))

    def forward(self, z: Tensor) -> Tensor:
        return self.fast(self.slow(z))


def in_pieces(run: Callable[[Tensor], Tensor], x: Tensor, *, unit: int, size: int, context: int) -> Tensor:
    """What run(x) gives, computed from `size` frames at a time with `context` frames on either side.

    x [B, C, T], `unit` of its samples a frame; run gives a whole number of samples a frame, and none of them depends on
    what is further than `context` frames away.
    """
    count, parts = -(-x.shape[-1] // unit), []
    for a in range(0, count, size):
        b, start = min(a + size, count), max(a - context, 0)
        end = min(b + context, count)
        made = run(x[..., start * unit:end * unit])
        per = made.shape[-1] // (end - start)
        parts.append(made[..., (a - start) * per:(b - start) * per])
    return torch.cat(parts, -1)
