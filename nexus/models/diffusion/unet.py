"""The UNet of diffusion models. Ho et al. 2020, arXiv:2006.11239; Dhariwal & Nichol 2021, arXiv:2105.05233
(ADM); Rombach et al. 2022, arXiv:2112.10752 (words by cross-attention).

B = batch, C = channels, E = 4 x base channels (the embedding), L = words, D = a word's width, S = times.
"""

from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nexus.config import Config
from nexus.errors import InputError
from nexus.nn.conv import Downsample, Upsample
from nexus.nn.embed import TimestepMLP, sinusoid, with_ids
from nexus.nn.perturb import Perturb
from nexus.nn.resnet import ResBlock, SelfAttention2d
from nexus.nn.spatial_transformer import KeyValue, SpatialTransformer
from nexus.process.codec import SHARED_LATENTS

_TINY = {"channels": 16, "mult": (1, 2), "blocks": 1, "groups": 8}
_LATENT = {"in_channels": SHARED_LATENTS, "out_channels": SHARED_LATENTS, "mult": (1, 2), "blocks": 1}
EMOJI_RECIPE = {"steps": 20_000, "batch_size": 32, "lr": 1e-3, "warmup": 200, "schedule": "linear", "final_lr": 0.05,
                "precision": "auto", "ema": 0.998, "save_every": 500, "cache_latents": True, "betas": (0.9, 0.99)}


class UNetConfig(Config):
    """The network alone. The defaults are the 35.7M parameters of DDPM on CIFAR-10."""

    in_channels: int = Field(3, gt=0, description="channels of x and of a concatenated condition together")
    out_channels: int = Field(3, gt=0, description="twice x's channels with a learned variance")
    channels: int = Field(128, gt=0, description="base width")
    mult: tuple[int | float, ...] = Field((1, 2, 2, 2), min_length=1,
                                          description="width of each level / base width")
    blocks: int = Field(2, gt=0, description="residual blocks of a level (one more on the way up)")
    attention: tuple[int, ...] = Field((1,), description="levels with attention, 0 = full resolution")
    mid_attention: bool = True
    heads: int = Field(1, gt=0, description="heads of every attention, unless head_dim is set")
    head_dim: int = Field(0, ge=0, description="channels of a head; 0 = use heads")
    depth: tuple[int, ...] = Field((), description="transformer blocks of each level's attention; empty = 1")
    context_dim: int = Field(0, ge=0, description="width of a word for cross-attention; 0 = no words")
    linear_proj: bool = Field(False, description="a fact of published files: projections of transformers are "
                              "linear layers (SD 2, SDXL), not 1x1 convolutions; the arithmetic is the same")
    pooled_dim: int = Field(0, ge=0, description="width of a vector added to the embedding; 0 = none")
    micro: int = Field(0, ge=0, description="numbers of SDXL's size conditioning, beside pooled; 0 = none")
    micro_freqs: int = Field(256, gt=0, description="width of the sinusoid of each of those numbers")
    pixels: int = Field(8, gt=0, description="pixels to a place of x, for the size it is told when micro is missing")
    guidance_dim: int = Field(0, ge=0, description="width of LCM's guidance embedding; 0 = none")
    num_classes: int = Field(0, ge=0, description="0 = no labels")
    null_class: bool = Field(True, description="one more row, for guidance: label num_classes means none")
    num_styles: int = Field(0, ge=0, description="a second label with a null row of its own; 0 = none")
    scale_shift: bool = Field(False, description="the embedding scales and shifts (AdaGN); else it is added")
    resblock_updown: bool = Field(False, description="residual blocks, not convolutions, resample")
    dropout: float = Field(0.0, ge=0, lt=1)
    groups: int = Field(32, gt=0, description="groups of every GroupNorm")
    eps: float = Field(1e-5, gt=0, description="of every GroupNorm outside the transformers")
    corner_pad: bool = Field(False, description="pad right and bottom before a strided convolution (DDPM)")
    sin_first: bool = Field(False, description="sines before cosines in the time embedding (DDPM)")
    freq_shift: float = Field(0.0, ge=0, description="1 in the original DDPM's frequencies, else 0")
    checkpoint: bool = Field(False, description="recompute blocks in the backward pass to save memory")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for width in self.widths:
            if width % self.groups:
                raise ValueError(f"a level of width {width} does not split in {self.groups} groups")
        if bad := [i for i in self.attention if not 0 <= i < len(self.mult)]:
            raise ValueError(f"attention at level {bad[0]}, but the levels are 0 to {len(self.mult) - 1}")
        last = {len(self.mult) - 1} if self.mid_attention else set()
        for width in {self.widths[i] for i in {*self.attention} | last}:
            if width % (self.head_dim or self.heads):
                unit = f"heads of {self.head_dim}" if self.head_dim else f"{self.heads} heads"
                raise ValueError(f"a level of width {width} does not split in {unit}")
        if self.depth and len(self.depth) != len(self.mult):
            raise ValueError(f"depth has {len(self.depth)} entries for {len(self.mult)} levels")
        if self.micro and not self.pooled_dim:
            raise ValueError("micro needs pooled_dim")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(round(m * self.channels) for m in self.mult)

    @property
    def emb(self) -> int:
        """Width of the embedding that every residual block sees."""
        return 4 * self.channels

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return 2 ** (len(self.mult) - 1)

    def heads_of(self, width: int) -> int:
        """Heads of an attention over `width` channels."""
        return width // self.head_dim if self.head_dim else self.heads

    def depth_of(self, level: int) -> int:
        """Transformer blocks of one attention of a level; the middle is as deep as the last level."""
        return self.depth[level] if self.depth else 1

    def build(self) -> "UNet":
        """The network with its initial weights."""
        return UNet(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": _TINY,
        "tiny-words": _TINY | {"attention": (1,), "heads": 2, "context_dim": 16, "pooled_dim": 16},
        "tiny-sd": _TINY | {"in_channels": 4, "out_channels": 4, "attention": (0, 1), "heads": 2, "context_dim": 16},
        "emoji": _LATENT | {"channels": 56, "attention": (1,), "head_dim": 28, "groups": 14, "context_dim": 128,
                            "pooled_dim": 128},
        "emoji-labels": _LATENT | {"channels": 48, "attention": (1,), "head_dim": 24, "groups": 12,
                                   "scale_shift": True},
        "emoji-sd": _LATENT | {"channels": 48, "attention": (0, 1), "head_dim": 24, "groups": 12, "context_dim": 128},
        "cifar10": {"dropout": 0.1, "eps": 1e-6, "corner_pad": True, "sin_first": True, "freq_shift": 1},
        "ddpm-256": {"mult": (1, 1, 2, 2, 4, 4), "attention": (4,), "eps": 1e-6, "corner_pad": True,
                     "sin_first": True, "freq_shift": 1},
        "imagenet-64": {"channels": 192, "mult": (1, 2, 3, 4), "blocks": 3, "attention": (1, 2, 3),
                        "head_dim": 64, "num_classes": 1000, "null_class": False, "scale_shift": True,
                        "resblock_updown": True},
        "lsun-256": {"channels": 256, "mult": (1, 1, 2, 2, 4, 4), "attention": (3, 4, 5), "head_dim": 64,
                     "resblock_updown": True},
    } | {
        name: {"in_channels": 4, "out_channels": 4, "channels": 320, "mult": (1, 2, 4, 4),
               "attention": (0, 1, 2), "heads": 8, "context_dim": 768} | extra
        for name, extra in (
            ("sd15", {}), ("sd15-inpaint", {"in_channels": 9}), ("lcm", {"guidance_dim": 256}),
            ("sd21", {"context_dim": 1024, "head_dim": 64, "linear_proj": True}),
            ("sdxl", {"context_dim": 2048, "head_dim": 64, "linear_proj": True, "mult": (1, 2, 4),
                      "attention": (1, 2), "depth": (1, 2, 10), "pooled_dim": 1280, "micro": 6}))
    }


class Level(nn.Module):
    """One resolution's modules: residual blocks, an attention after each or none, a resampling or none."""

    def __init__(self, res: list[ResBlock], attn: list[nn.Module], resample: nn.Module | None = None):
        super().__init__()
        self.res = nn.ModuleList(res)
        self.attn = nn.ModuleList(attn)
        self.resample = resample


class Words:
    """What the attentions of one forward pass need: words, or their keys and values, the mask, and what is weakened."""

    def __init__(self, context: Tensor | None, mask: Tensor | None, ready: dict[int, list[KeyValue]],
                 identity: set[int], skip: set[int]):
        self.context, self.ready, self.identity, self.skip = context, ready, identity, skip
        self.mask = None if mask is None else mask[:, None, None, :]

    def of(self, attention: SpatialTransformer) -> list[KeyValue]:
        """Keys and values for one attention, prepared or computed here."""
        found = self.ready.get(id(attention))
        return attention.words(self.context) if found is None else found


def _res(config: UNetConfig, width: int, out: int, resample: str = "") -> ResBlock:
    return ResBlock(width, out, emb=config.emb, groups=config.groups, eps=config.eps, zero_last=True,
                    scale_shift=config.scale_shift, dropout=config.dropout, resample=resample)


def _attention(config: UNetConfig, level: int) -> nn.Module:
    width = config.widths[level]
    heads = config.heads_of(width)
    if config.context_dim:
        return SpatialTransformer(width, heads, config.depth_of(level), config.context_dim,
                                  groups=config.groups)
    return SelfAttention2d(width, heads, groups=config.groups, eps=config.eps, zero_last=True)


def _resample(config: UNetConfig, width: int, way: str) -> nn.Module:
    if config.resblock_updown:
        return _res(config, width, width, way)
    return Downsample(width, corner=config.corner_pad) if way == "down" else Upsample(width)


class UNet(nn.Module):
    """Noisy x [B, C, H, W] and times t [B] -> the prediction [B, O, H, W]; sides: multiples of 2^(levels-1).

    cond: "label" [B] and "style" [B] ids (the number of classes or styles = none), "context" [B, L, D] with
    "context_mask" [B, L], "pooled" [B, P], "micro" [B, 6] (SDXL: original size, crop corner, target size in
    pixels, height first; a missing one is x's size, uncropped), "guidance" [B] (LCM's w = guidance scale - 1),
    "concat" [B, C', H, W].
    Raises InputError when a condition the network was built for is missing, or x does not fit.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c, widths, last = config, config.widths, len(config.mult) - 1
        self.time = TimestepMLP(c.channels, c.emb, shift=c.freq_shift, sin_first=c.sin_first)
        self.label = nn.Embedding(c.num_classes + c.null_class, c.emb) if c.num_classes else None
        self.style = nn.Embedding(c.num_styles + 1, c.emb) if c.num_styles else None
        self.guidance = nn.Linear(c.guidance_dim, c.channels, bias=False) if c.guidance_dim else None
        self.pooled = self._pooled()
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, 1, 1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [widths[0]]
        for level, width in enumerate(widths):
            ins = [skips[-1]] + [width] * (c.blocks - 1)
            resample = _resample(c, width, "down") if level < last else None
            self.down.append(self._level([(i, width) for i in ins], level, resample))
            skips += [width] * (c.blocks + (level < last))
        middle = [_attention(c, last)] if c.mid_attention else []
        self.mid = Level([_res(c, widths[-1], widths[-1]) for _ in range(2)], middle)
        below = widths[-1]
        for level in reversed(range(last + 1)):
            ins = [below + skips.pop()] + [widths[level] + skips.pop() for _ in range(c.blocks)]
            resample = _resample(c, widths[level], "up") if level else None
            self.up.append(self._level([(i, widths[level]) for i in ins], level, resample))
            below = widths[level]
        self.layers, self.middle = len(self._attentions()), sum(len(level.attn) for level in self.down)
        self.norm_out = nn.GroupNorm(c.groups, widths[0], c.eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, 1, 1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def _pooled(self) -> nn.Module | None:
        c = self.config
        if not c.pooled_dim:
            return None
        if not c.micro:
            return nn.Linear(c.pooled_dim, c.emb)
        wide = c.pooled_dim + c.micro * c.micro_freqs
        return nn.Sequential(nn.Linear(wide, c.emb), nn.SiLU(), nn.Linear(c.emb, c.emb))

    def _level(self, widths: list[tuple[int, int]], level: int, resample: nn.Module | None) -> Level:
        attends = level in self.config.attention
        return Level([_res(self.config, width, out) for width, out in widths],
                     [_attention(self.config, level) for _ in widths] if attends else [], resample)

    @torch.no_grad()
    def prepare(self, times: Tensor, cond: dict[str, Tensor] | None = None) -> dict:
        """What a sampling run over `times` [S] needs once: embedding of each, the words' keys and values."""
        prepared: dict = {"time": {}, "words": {}}
        if self.guidance is None:
            waves = self.time(times.to(self.conv_in.weight.device))
            prepared["time"] = {float(t): wave[None] for t, wave in zip(times, waves, strict=True)}
        if cond is not None and "context" in cond:
            context = cond["context"].to(self.conv_in.weight.dtype)
            prepared["words"] = {id(m): m.words(context) for m in self.modules()
                                 if isinstance(m, SpatialTransformer)}
        return prepared

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None,
                prepared: dict | None = None, perturb: Perturb = Perturb()) -> Tensor:
        """cond's "control", a list: a ControlNet's residuals, one for each skip and at last the middle's."""
        cond = cond or {}
        h, skips, emb, words = self.encode(x, t, cond, prepared, perturb)
        if "control" in cond:
            *sides, middle = cond["control"]
            h, skips = h + middle, [skip + side for skip, side in zip(skips, sides, strict=True)]
        for level in self.up:
            for i, res in enumerate(level.res):
                h = torch.cat([h, skips.pop()], 1)
                h = self._block(res, level.attn[i] if level.attn else None, h, emb, words)
            if level.resample is not None:
                h = _change(level.resample, h, emb)
        return self.conv_out(F.silu(self.norm_out(h))).to(x.dtype)

    def encode(self, x: Tensor, t: Tensor, cond: dict[str, Tensor], prepared: dict | None, perturb: Perturb,
               added: Tensor | float = 0.0) -> tuple[Tensor, list[Tensor], Tensor, Words]:
        """The way down and the middle: its result, the skips, the embedding and the words.

        added: joins what the first convolution makes.
        """
        prepared = prepared or {"time": {}, "words": {}}
        dtype = self.conv_in.weight.dtype
        inputs = torch.cat([x, cond["concat"]], 1) if "concat" in cond else x
        self._check(inputs)
        emb = self._embed(t, cond | self._size(x, cond), prepared)
        words = self._words(cond, prepared, dtype, perturb)
        h = self.conv_in(inputs.to(dtype)) + added
        skips = [h]
        for level in self.down:
            for i, res in enumerate(level.res):
                h = self._block(res, level.attn[i] if level.attn else None, h, emb, words)
                skips.append(h)
            if level.resample is not None:
                h = _change(level.resample, h, emb)
                skips.append(h)
        h = self._block(self.mid.res[0], self.mid.attn[0] if self.mid.attn else None, h, emb, words)
        return self.mid.res[1](h, emb), skips, emb, words

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != self.config.in_channels:
            raise InputError(f"this UNet takes {self.config.in_channels} channels, got {x.shape[1]}",
                             hint='a picture it is conditioned on goes in cond["concat"]')
        unit = 2 ** (len(self.config.mult) - 1)
        if x.shape[-2] % unit or x.shape[-1] % unit:
            raise InputError(f"this UNet takes sides that are multiples of {unit}, "
                             f"got {x.shape[-2]}x{x.shape[-1]}",
                             hint=f"crop or pad to a multiple of {unit}")

    def _size(self, x: Tensor, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """SDXL's numbers for a picture of x's size that nobody cropped, where they are needed and not given."""
        if not self.config.micro or "micro" in cond:
            return {}
        height, width = (side * self.config.pixels for side in x.shape[2:])
        return {"micro": x.new_tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(len(x), 6)}

    def _embed(self, t: Tensor, cond: dict[str, Tensor], prepared: dict) -> Tensor:
        """Everything that is one vector per picture, summed: [B, E], or [1, E] with a prepared time alone."""
        c, dtype = self.config, self.conv_in.weight.dtype
        emb = prepared["time"].get(float(t[0])) if prepared["time"] else None
        if emb is None:
            w = None
            if self.guidance is not None:
                wave = sinusoid(1000 * self._need(cond, "guidance"), c.guidance_dim, shift=1, sin_first=True)
                w = self.guidance(wave.to(dtype))
            emb = self.time(t, w)
        emb = with_ids(emb, cond, self.label, self.style, null_label=c.null_class)
        if self.pooled is not None:
            pooled = self._need(cond, "pooled").to(dtype)
            if c.micro:
                micro = self._need(cond, "micro")
                waves = sinusoid(micro.flatten(), c.micro_freqs, shift=c.freq_shift, sin_first=c.sin_first)
                pooled = torch.cat([pooled, waves.to(dtype).unflatten(0, micro.shape).flatten(1)], 1)
            emb = emb + self.pooled(pooled)
        return emb

    def _words(self, cond: dict[str, Tensor], prepared: dict, dtype: torch.dtype, perturb: Perturb) -> Words:
        order = self._attentions() if perturb.identity or perturb.skip else []
        weak = [{id(order[i]) for i in chosen} for chosen in perturb]
        if not self.config.context_dim:
            return Words(None, None, {}, *weak)
        context = None if prepared["words"] else self._need(cond, "context").to(dtype)
        return Words(context, cond.get("context_mask"), prepared["words"], *weak)

    def _attentions(self) -> list[nn.Module]:
        """In the order in which x meets them, which numbers the layers of a Perturb."""
        return [attn for level in (*self.down, self.mid, *self.up) for attn in level.attn]

    def _need(self, cond: dict[str, Tensor], key: str) -> Tensor:
        if key not in cond:
            raise InputError(f"this UNet was built for the condition '{key}', which is missing",
                             hint="conditions given: " + (", ".join(sorted(cond)) or "none"))
        return cond[key]

    def _block(self, res: ResBlock, attn: nn.Module | None, h: Tensor, emb: Tensor, words: Words) -> Tensor:
        if self.config.checkpoint and torch.is_grad_enabled():
            return checkpoint(_pair, res, attn, h, emb, words, use_reentrant=False)
        return _pair(res, attn, h, emb, words)


def _pair(res: ResBlock, attn: nn.Module | None, h: Tensor, emb: Tensor, words: Words) -> Tensor:
    """A residual block and the attention that may follow it."""
    h = res(h, emb)
    if attn is None or id(attn) in words.skip:
        return h
    alone = id(attn) in words.identity
    return attn(h, words.of(attn), words.mask, alone) if isinstance(attn, SpatialTransformer) else attn(h, alone)


def _change(resample: nn.Module, h: Tensor, emb: Tensor) -> Tensor:
    return resample(h, emb) if isinstance(resample, ResBlock) else resample(h)
