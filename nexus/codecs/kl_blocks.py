"""The halves of the KL picture codec: convolutional encoder and decoder. Rombach et al. 2022, after VQGAN."""

from collections.abc import Iterator
from itertools import zip_longest

import torch.nn.functional as F
from torch import Tensor, nn

from nexus.nn.conv import Downsample, Upsample
from nexus.nn.resnet import ResBlock, SelfAttention2d


class Stage(nn.Module):
    """`count` residual blocks at one resolution, which may attend after each, then an optional change of resolution."""

    def __init__(self, channels: int, out: int, count: int, attends: bool, resample: nn.Module | None, norm: dict):
        super().__init__()
        self.blocks = nn.ModuleList(ResBlock(channels if i == 0 else out, out, **norm) for i in range(count))
        self.attentions = nn.ModuleList(SelfAttention2d(out, **norm) for _ in range(count if attends else 0))
        self.resample = resample

    def forward(self, x: Tensor) -> Tensor:
        for block, attention in self.pairs():
            x = block(x)
            x = x if attention is None else attention(x)
        return x if self.resample is None else self.resample(x)

    def pairs(self) -> Iterator[tuple[ResBlock, SelfAttention2d | None]]:
        """Each block with the attention after it."""
        return zip_longest(self.blocks, self.attentions)


class Middle(nn.Module):
    """Residual block, optional attention over all positions, residual block: x [B, C, H, W] -> the same shape."""

    def __init__(self, channels: int, attention: bool, norm: dict):
        super().__init__()
        self.block1 = ResBlock(channels, **norm)
        self.attention = SelfAttention2d(channels, **norm) if attention else None
        self.block2 = ResBlock(channels, **norm)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)
        return self.block2(x if self.attention is None else self.attention(x))


class KLEncoder(nn.Module):
    """Picture x [B, C, H, W] -> features [B, out, H/f, W/f]; `patch` squared pixels become channels first.

    levels: those that attend, 0 the largest; attention: whether the middle does. Likewise in the decoder.
    """

    def __init__(self, channels: int, out: int, widths: tuple[int, ...], blocks: int, *, patch: int,
                 levels: tuple[int, ...], attention: bool, norm: dict):
        super().__init__()
        self.patch = patch
        self.conv_in = nn.Conv2d(channels * patch**2, widths[0], 3, 1, 1)
        before = (widths[0], *widths[:-1])
        self.stages = nn.ModuleList(
            Stage(c, o, blocks, i in levels, Downsample(o, corner=True) if i + 1 < len(widths) else None, norm)
            for i, (c, o) in enumerate(zip(before, widths, strict=True)))
        self.middle = Middle(widths[-1], attention, norm)
        self.norm_out = nn.GroupNorm(norm["groups"], widths[-1], norm["eps"])
        self.conv_out = nn.Conv2d(widths[-1], out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for stage in self.stages:
            x = stage(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class KLDecoder(nn.Module):
    """Latents z [B, L, h, w] -> picture [B, out, f*h, f*w]; the stages run from the smallest resolution upwards."""

    def __init__(self, latents: int, out: int, widths: tuple[int, ...], blocks: int, *, patch: int,
                 levels: tuple[int, ...], attention: bool, norm: dict):
        super().__init__()
        self.patch = patch
        widths = widths[::-1]
        self.conv_in = nn.Conv2d(latents, widths[0], 3, 1, 1)
        self.middle = Middle(widths[0], attention, norm)
        before = (widths[0], *widths[:-1])
        self.stages = nn.ModuleList(
            Stage(c, o, blocks + 1, len(widths) - 1 - i in levels, Upsample(o) if i + 1 < len(widths) else None, norm)
            for i, (c, o) in enumerate(zip(before, widths, strict=True)))
        self.norm_out = nn.GroupNorm(norm["groups"], widths[-1], norm["eps"])
        self.conv_out = nn.Conv2d(widths[-1], out * patch**2, 3, 1, 1)

    def forward(self, z: Tensor) -> Tensor:
        z = self.middle(self.conv_in(z))
        for stage in self.stages:
            z = stage(z)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(z))), self.patch)
