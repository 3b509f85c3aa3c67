"""NCSN++ and DDPM++, the networks of score SDEs and of rectified flow's published weights. Song et al. 2021,
arXiv:2011.13456, appendix H.

B = batch, C = channels, E = 4 x base channels (the embedding), S = times of a sampling run.
"""

import math
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError
from nexus.nn.conv import Downsample, Upsample
from nexus.nn.embed import TimestepMLP, with_ids
from nexus.nn.fir import FirConvDown, fir_down, fir_up
from nexus.nn.resnet import SelfAttention2d

EPS = 1e-6                       # of every GroupNorm


class NCSNppConfig(Config):
    """The network alone. The defaults are the 61.8M parameters of rectified flow on CIFAR-10 (DDPM++)."""

    in_channels: int = Field(3, gt=0, description="channels of x, and of the output")
    channels: int = Field(128, gt=0, description="base width")
    mult: tuple[int, ...] = Field((1, 2, 2, 2), min_length=2, description="width of each level / base width")
    blocks: int = Field(4, gt=0, description="residual blocks of a level (one more on the way up)")
    attention: tuple[int, ...] = Field((1,), description="levels with attention, 0 = full resolution")
    block: Literal["biggan", "ddpm"] = Field("biggan", description="residual blocks, or convolutions, resample")
    fir: bool = Field(False, description="resample by a binomial filter; else by averages and nearest neighbours")
    skip_rescale: bool = Field(True, description="sums of two branches are divided by the root of 2")
    embedding: Literal["positional", "fourier"] = Field("positional", description="fourier: of log t, random")
    fourier_scale: float = Field(16.0, gt=0, description="spread of the random frequencies")
    scale_by_time: bool = Field(False, description="the output is divided by t (networks of a standard deviation)")
    progressive: Literal["none", "output_skip"] = Field("none", description="every level adds a picture")
    progressive_input: Literal["none", "input_skip", "residual"] = Field(
        "none", description="every level sees the shrunken picture, through a matrix or through convolutions")
    dropout: float = Field(0.15, ge=0, lt=1)
    num_classes: int = Field(0, ge=0, description="0 = no labels")
    null_class: bool = Field(True, description="one more row, for guidance: label num_classes means none")
    num_styles: int = Field(0, ge=0, description="a second label with a null row of its own; 0 = none")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.channels % 4 or any(w % groups(w) for w in self.widths):
            raise ValueError(f"channels {self.channels} does not split in groups of 4, or of a 32nd")
        if bad := [i for i in self.attention if not 0 <= i < len(self.mult)]:
            raise ValueError(f"attention at level {bad[0]}, but the levels are 0 to {len(self.mult) - 1}")
        if self.fir and self.block == "ddpm":
            raise ValueError("ddpm blocks resample by plain convolutions: fir must be false")
        if self.scale_by_time and self.embedding != "fourier":
            raise ValueError("scale_by_time is for networks with the fourier embedding")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(m * self.channels for m in self.mult)

    @property
    def emb(self) -> int:
        """Width of the embedding that every residual block sees."""
        return 4 * self.channels

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return 2 ** (len(self.mult) - 1)

    def build(self) -> "NCSNpp":
        """The network with its initial weights."""
        return NCSNpp(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"channels": 16, "mult": (1, 2), "blocks": 1, "dropout": 0.0},
        "cifar10": {"block": "biggan", "embedding": "positional"},
        "ncsnpp-cifar10": {"fir": True, "embedding": "fourier", "progressive_input": "residual", "dropout": 0.1,
                           "scale_by_time": True},
        "ncsnpp-256": {"mult": (1, 1, 2, 2, 2, 2, 2), "blocks": 2, "attention": (4,), "fir": True, "dropout": 0.0,
                       "embedding": "fourier", "scale_by_time": True, "progressive": "output_skip",
                       "progressive_input": "input_skip"},
    }


def groups(width: int) -> int:
    """Groups of the norm of so many channels: 4 channels each, 32 groups at most."""
    return min(width // 4, 32)


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups(width), width, EPS)


def _resampled(x: Tensor, way: str, fir: bool) -> Tensor:
    """x [B, C, H, W] with its sides halved ("down"), doubled ("up") or as they are ("")."""
    if way == "down":
        return fir_down(x) if fir else F.avg_pool2d(x, 2)
    if way == "up":
        return fir_up(x) if fir else F.interpolate(x, scale_factor=2.0, mode="nearest")
    return x


class FourierMLP(nn.Module):
    """t [B] > 0 -> [B, E] through sines and cosines of log t at fixed random frequencies. Tancik et al. 2020."""

    def __init__(self, freqs: int, out: int, scale: float):
        super().__init__()
        self.register_buffer("freqs", torch.randn(freqs) * scale)
        self.fc1 = nn.Linear(2 * freqs, out)
        self.fc2 = nn.Linear(out, out)

    def forward(self, t: Tensor) -> Tensor:
        angles = t.float().log()[:, None] * self.freqs.float() * (2 * math.pi)
        wave = torch.cat([angles.sin(), angles.cos()], -1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(wave)))


class Block(nn.Module):
    """A residual block of NCSN++: x [B, C, H, W] -> [B, O, H', W']; `way` "down" or "up" resamples both branches."""

    def __init__(self, config: NCSNppConfig, width: int, out: int, way: str = ""):
        super().__init__()
        self.way, self.fir, self.dropout = way, config.fir, config.dropout
        self.share = math.sqrt(0.5) if config.skip_rescale else 1.0
        self.norm1 = _norm(width)
        self.conv1 = nn.Conv2d(width, out, 3, 1, 1)
        self.emb_proj = nn.Linear(config.emb, out)
        self.norm2 = _norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(width, out, 1) if width != out or way else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """emb [B, E] is the embedding AFTER its SiLU."""
        h = self.conv1(_resampled(F.silu(self.norm1(x)), self.way, self.fir))
        h = h + self.emb_proj(emb)[:, :, None, None]
        h = self.conv2(F.dropout(F.silu(self.norm2(h)), self.dropout, self.training))
        x = _resampled(x, self.way, self.fir)
        return self.share * (h + (x if self.skip is None else self.skip(x)))


class Level(nn.Module):
    """One resolution's modules: blocks, attentions or none, a resampling or none; join: what the shrunken picture
    enters by; side: what a picture leaves by."""

    def __init__(self, res: list[Block], attn: list[nn.Module], resample: nn.Module | None = None,
                 join: nn.Module | None = None, side: nn.Module | None = None):
        super().__init__()
        self.res, self.attn = nn.ModuleList(res), nn.ModuleList(attn)
        self.resample, self.join, self.side = resample, join, side


class Head(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution: x [B, C, H, W] -> [B, O, H, W]."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm = _norm(width)
        self.conv = nn.Conv2d(width, out, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(x)))


class NCSNpp(nn.Module):
    """Noisy x [B, C, H, W] and times t [B] -> the prediction [B, C, H, W]; sides: multiples of 2^(levels-1).

    cond: "label" [B] and "style" [B] ids (the number of classes or styles = none). Raises InputError when x does not
    fit, or a label is missing that the network has no null for.
    """

    def __init__(self, config: NCSNppConfig):
        super().__init__()
        self.config = c = config
        self.share = math.sqrt(0.5) if c.skip_rescale else 1.0
        self.time = (FourierMLP(c.channels, c.emb, c.fourier_scale) if c.embedding == "fourier" else
                     TimestepMLP(c.channels, c.emb, shift=1, sin_first=True))
        self.label = nn.Embedding(c.num_classes + c.null_class, c.emb) if c.num_classes else None
        self.style = nn.Embedding(c.num_styles + 1, c.emb) if c.num_styles else None
        self.conv_in = nn.Conv2d(c.in_channels, c.channels, 3, 1, 1)
        skips = self._build_down()
        width = c.widths[-1]
        self.mid = Level([Block(c, width, width) for _ in range(2)], [self._attention(width)])
        self._build_up(skips)
        self.out = Head(c.widths[0], c.in_channels) if c.progressive == "none" else None
        self._init_weights()

    def _build_down(self) -> list[int]:
        """The way down; returns the widths of its skips."""
        c, last = self.config, len(self.config.mult) - 1
        self.down, skips, pictured = nn.ModuleList(), [c.channels], c.in_channels
        for i, width in enumerate(c.widths):
            res = [Block(c, skips[-1] if j == 0 else width, width) for j in range(c.blocks)]
            attn = [self._attention(width) for _ in res] if i in c.attention else []
            resample = join = None
            if i < last:
                resample = Block(c, width, width, "down") if c.block == "biggan" else Downsample(width, corner=True)
                join = self._join(pictured, width)
                pictured = width if c.progressive_input == "residual" else pictured
            self.down.append(Level(res, attn, resample, join))
            skips += [width] * (c.blocks + (i < last))
        return skips

    def _build_up(self, skips: list[int]) -> None:
        c, below = self.config, self.config.widths[-1]
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(c.widths))):
            res = [Block(c, (below if j == 0 else width) + skips.pop(), width) for j in range(c.blocks + 1)]
            attn = [self._attention(width)] if i in c.attention else []
            resample = (Block(c, width, width, "up") if c.block == "biggan" else Upsample(width)) if i else None
            side = Head(width, c.in_channels) if c.progressive == "output_skip" else None
            self.up.append(Level(res, attn, resample, side=side))
            below = width

    def _attention(self, width: int) -> SelfAttention2d:
        return SelfAttention2d(width, groups=groups(width), eps=EPS)

    def _join(self, pictured: int, width: int) -> nn.Module | None:
        c = self.config
        if c.progressive_input == "input_skip":
            return nn.Conv2d(pictured, width, 1)
        if c.progressive_input == "residual":
            return FirConvDown(pictured, width) if c.fir else Downsample(pictured, width, corner=True)
        return None

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():        # every block starts as the identity, and the network as zero
            if isinstance(module, Block | SelfAttention2d | Head):
                last = getattr(module, {Block: "conv2", SelfAttention2d: "proj", Head: "conv"}[type(module)])
                nn.init.zeros_(last.weight)

    @torch.no_grad()
    def prepare(self, times: Tensor, cond: dict[str, Tensor] | None = None) -> dict:
        """The embedding of each time of a sampling run [S]."""
        waves = self.time(times.to(self.conv_in.weight.device))
        return {float(t): wave[None] for t, wave in zip(times, waves, strict=True)}

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None,
                prepared: dict | None = None) -> Tensor:
        self._check(x)
        emb = F.silu(self._embed(t, cond or {}, prepared or {}))
        picture = x.to(self.conv_in.weight.dtype)
        h = self.conv_in(picture)
        skips = [h]
        for level in self.down:
            for i, res in enumerate(level.res):
                h = self._attended(level, i, res(h, emb))
                skips.append(h)
            if level.resample is not None:
                h, picture = self._joined(level, _change(level.resample, h, emb), picture)
                skips.append(h)
        h = self.mid.res[1](self._attended(self.mid, 0, self.mid.res[0](h, emb)), emb)
        out = None
        for level in self.up:
            for res in level.res:
                h = res(torch.cat([h, skips.pop()], 1), emb)
            h = self._attended(level, 0, h)
            if level.side is not None:
                out = level.side(h) if out is None else _resampled(out, "up", self.config.fir) + level.side(h)
            if level.resample is not None:
                h = _change(level.resample, h, emb)
        out = (self.out(h) if out is None else out).to(x.dtype)
        return out / t.to(out).view(-1, 1, 1, 1) if self.config.scale_by_time else out

    def _attended(self, level: Level, i: int, h: Tensor) -> Tensor:
        return self.share * level.attn[i](h) if level.attn else h

    def _joined(self, level: Level, h: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on after the shrunken picture has entered, and that picture."""
        kind = self.config.progressive_input
        if kind == "input_skip":
            picture = _resampled(picture, "down", self.config.fir)
            return h + level.join(picture), picture
        if kind == "residual":
            h = self.share * (h + level.join(picture))
            return h, h
        return h, picture

    def _embed(self, t: Tensor, cond: dict[str, Tensor], prepared: dict) -> Tensor:
        """Time plus label plus style: [B, E], or [1, E] with a prepared time alone."""
        emb = prepared.get(float(t[0])) if prepared else None
        emb = self.time(t) if emb is None else emb
        return with_ids(emb, cond, self.label, self.style, null_label=self.config.null_class)

    def _check(self, x: Tensor) -> None:
        c = self.config
        if x.shape[1] != c.in_channels or x.shape[-2] % c.multiple or x.shape[-1] % c.multiple:
            raise InputError(f"this NCSN++ takes {c.in_channels} channels and sides that are multiples of "
                             f"{c.multiple}, got {list(x.shape[1:])}", hint="crop or pad")


def _change(resample: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    return resample(h, emb) if isinstance(resample, Block) else resample(h)
