"""PixArt-alpha: a diffusion transformer that reads captions. Chen et al. 2023, arXiv:2310.00426.

B = batch, C = latent channels, L = patches, D = hidden width, N = words of a caption, S = times of a sampling run.
"""

from functools import lru_cache
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig
from nexus.config import Config
from nexus.errors import InputError
from nexus.models.diffusion.dit import PREPARED_BYTES, TIME_FREQS, DiTConfig
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.embed import TimestepMLP, sincos_2d
from nexus.nn.modulation import gated, modulate, start_linear
from nexus.nn.patches import grid_of, unpatched
from nexus.nn.perturb import Perturb
from nexus.process.codec import SHARED_CODEC, SHARED_LATENTS
from nexus.process.diffusion import DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.text.conditioner import Cond, NoCondConfig, TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig

KeyValue = tuple[Tensor, Tensor]                # each [B, heads, N, D / heads]
Words = tuple[list[KeyValue], Tensor | None]    # one pair a block, and the mask [B, 1, 1, N]


class PixArtNetConfig(Config):
    """The network alone. The defaults are PixArt-XL/2 at 512 pixels (latents of side 64)."""

    size: int = Field(64, gt=0, description="side of the latent it is trained at")
    patch: int = Field(2, gt=0, description="side of a patch, in latent pixels")
    in_channels: int = Field(4, gt=0)
    hidden: int = Field(1152, gt=0, description="token width")
    depth: int = Field(28, gt=0)
    heads: int = Field(16, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    context_dim: int = Field(4096, gt=0, description="width of a caption's words; 4096 = T5-XXL")
    null_tokens: int = Field(120, ge=0, description="words of the stored null caption; 0 = none is stored")
    pos_scale: float = Field(1.0, gt=0, description="positions are divided by it: 0.5, 1, 2 at 256, 512, 1024 px")
    sized: bool = Field(False, description="is told the picture's size and aspect (1024-MS)")
    pixels: int = Field(8, gt=0, description="pixels to a latent position, for the size it is told")
    learn_sigma: bool = Field(True, description="a second half of channels that sets the variance")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        parts = [("hidden", self.hidden, "heads", self.heads), ("size", self.size, "patch", self.patch),
                 ("hidden", self.hidden, "the position table's", 4)]
        if self.sized:
            parts.append(("hidden", self.hidden, "the size embedders'", 3))
        for name, whole, of, part in parts:
            if whole % part:
                raise ValueError(f"{name} {whole} is not a multiple of {of} {part}")
        return self

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return self.patch

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's with a learned variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def build(self) -> "PixArt":
        """The network with its initial weights."""
        return PixArt(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"size": 8, "hidden": 24, "depth": 2, "heads": 2, "context_dim": 16, "null_tokens": 4},
        "emoji": {"size": 16, "in_channels": SHARED_LATENTS, "hidden": 144, "depth": 6, "heads": 3,
                  "context_dim": 128, "null_tokens": 0, "learn_sigma": False},
        "xl-256": {"size": 32, "pos_scale": 0.5},
        "xl-512": {},
        "xl-1024-ms": {"size": 128, "pos_scale": 2.0, "sized": True},
    }


class PixArtBlock(nn.Module):
    """Self-attention, cross-attention to the caption, an MLP: x [B, L, D] -> [B, L, D].

    The first and the last are normalised, shifted, scaled and gated; the cross-attention is not.
    """

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.cross_q = nn.Linear(dim, dim)
        self.cross_kv = nn.Linear(dim, 2 * dim)
        self.cross_proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, mlp)
        self.fc2 = nn.Linear(mlp, dim)

    def words(self, y: Tensor) -> KeyValue:
        """The projected caption y [B, N, D] -> its keys and values, which no step of a run changes."""
        k, v = self.cross_kv(y).chunk(2, -1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, mod: Tensor, words: KeyValue, mask: Tensor | None = None,
                identity: bool = False) -> Tensor:
        """mod [B or 1, 6, D], shared by all blocks: shift, scale, gate of the attention, then of the MLP."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (mod + self.table).unbind(1)
        q, k, v = (split_heads(p, self.heads) for p in self.qkv(modulate(x, shift_a, scale_a)).chunk(3, -1))
        x = gated(x, gate_a, self.proj(merge_heads(attend(q, k, v, identity=identity))))
        q = split_heads(self.cross_q(x), self.heads)
        x = x + self.cross_proj(merge_heads(attend(q, *words, mask)))
        h = F.gelu(self.fc1(modulate(x, shift_m, scale_m)), approximate="tanh")
        return gated(x, gate_m, self.fc2(h))


class PixArt(nn.Module):
    """x [B, C, H, W], t [B] (an index in [0, 1000) for the paper's models) -> [B, C or 2C, H, W].

    cond: "context" [B, N, context_dim], "context_mask" [B, N] bool, True = a word. The stored null caption takes the
    place of a missing context (under the mask, if one is given) and of an item whose mask shows no word at all.
    With `sized`: "size" [B, 2] (height, width in pixels) and "aspect" [B, 1] (height / width); missing ones are x's.
    With `learn_sigma` the second half of the channels sets the variance.
    """

    null: Tensor | None

    def __init__(self, config: PixArtNetConfig):
        super().__init__()
        self.config = config
        self.layers, self.middle = config.depth, config.depth // 2
        dim, width = config.hidden, config.context_dim
        self.patch = nn.Conv2d(config.in_channels, dim, config.patch, config.patch)
        self.time = TimestepMLP(TIME_FREQS, dim)
        self.side = TimestepMLP(TIME_FREQS, dim // 3) if config.sized else None
        self.aspect = TimestepMLP(TIME_FREQS, dim // 3) if config.sized else None
        self.adaln = nn.Linear(dim, 6 * dim)
        self.caption1 = nn.Linear(width, dim)
        self.caption2 = nn.Linear(dim, dim)
        # Random and never trained, in the paper's code too: the network learns what it means.
        null = torch.randn(config.null_tokens, width) / width**0.5 if config.null_tokens else None
        self.register_buffer("null", null)
        self.blocks = nn.ModuleList(
            PixArtBlock(dim, config.heads, int(dim * config.mlp_ratio)) for _ in range(config.depth))
        self.final_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.final = nn.Linear(dim, config.patch**2 * config.out_channels)
        self._init_weights()

    def _init_weights(self) -> None:
        start_linear(self)
        embedders = [layer for mlp in (self.time, self.side, self.aspect) if mlp for layer in (mlp.fc1, mlp.fc2)]
        for module in (*embedders, self.adaln, self.caption1, self.caption2):
            nn.init.normal_(module.weight, std=0.02)
        # The caption says nothing at first, so that a class-conditional DiT's weights are a good start.
        for module in (*(block.cross_proj for block in self.blocks), self.final):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, t: Tensor, cond: Cond | None = None, prepared: dict | None = None,
                perturb: Perturb = Perturb()) -> Tensor:
        """`prepared` is what `prepare` returned for the same `cond`. Raises InputError on sides that do not fit."""
        rows, cols = grid_of(x, self.config.patch)
        c, mod = self._modulations(x, t, cond or {}, prepared or {})
        words, mask = self._read(len(x), cond or {}, prepared or {})
        x = self.patch(x.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)              # [B, L, D]
        x = x + _positions(self.config, rows, cols, x.device, x.dtype)
        for i, (block, pair) in enumerate(zip(self.blocks, words, strict=True)):
            if i not in perturb.skip:
                x = block(x, mod, pair, mask, i in perturb.identity)
        shift, scale = (c[:, None] + self.final_table).unbind(1)      # of the time itself, not of its modulation
        x = self.final(modulate(x, shift, scale))                                             # [B, L, p * p * C']
        return unpatched(x, rows, cols, self.config.patch)

    def _modulations(self, x: Tensor, t: Tensor, cond: Cond, prepared: dict) -> tuple[Tensor, Tensor]:
        """The time (and size) c [B or 1, D], and the modulation of every block [B or 1, 6, D]. adaLN-single."""
        step = prepared["steps"].get(float(t[0])) if prepared else None
        c = self.time(t) if step is None else prepared["time"][step, None]
        if self.side is not None:
            c = c + self._size(x, cond)
        elif step is not None:
            return c, prepared["mods"][step, None]
        return c, self._shared(c)

    def _shared(self, c: Tensor) -> Tensor:
        return self.adaln(F.silu(c)).unflatten(-1, (6, -1))

    def _size(self, x: Tensor, cond: Cond) -> Tensor:
        """The embedded height, width and aspect: [B or 1, D]."""
        size = cond.get("size")
        if size is None:
            size = x.new_tensor([x.shape[-2:]], dtype=torch.float32) * self.config.pixels
        size = size.float()
        aspect = cond.get("aspect", size[:, :1] / size[:, 1:])
        each = [self.side(size[:, 0]), self.side(size[:, 1]), self.aspect(aspect[:, 0])]
        return torch.cat([e.expand(max(len(size), len(aspect)), -1) for e in each], -1)

    def _read(self, batch: int, cond: Cond, prepared: dict) -> Words:
        """The caption's keys and values for a batch: the prepared ones where they fit it."""
        words, mask = prepared.get("words") or self._words(*self._caption(cond))
        if len(words[0][0]) not in (1, batch):
            words, mask = self._words(*self._caption(cond))
        if len(words[0][0]) != batch:                                       # one null caption serves all items
            words = [(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in words]
        return words, mask

    def _words(self, context: Tensor, mask: Tensor | None) -> Words:
        h = F.gelu(self.caption1(context.to(self.caption1.weight.dtype)), approximate="tanh")
        y = self.caption2(h)
        return [block.words(y) for block in self.blocks], None if mask is None else mask[:, None, None]

    def _caption(self, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """context [B or 1, N, context_dim] and its mask [B, N], the null in its places."""
        context, mask = cond.get("context"), cond.get("context_mask")
        if context is None and self.null is None:
            raise InputError("this PixArt stores no null caption, so it needs a caption", hint="give --prompt")
        if context is None:
            return self.null.expand(1 if mask is None else len(mask), -1, -1), mask
        if mask is None or self.null is None:
            return context, mask
        length = max(context.shape[1], len(self.null))
        null, own = (F.pad(v, (0, 0, 0, length - len(self.null))) for v in (self.null, torch.ones_like(self.null)))
        context = F.pad(context, (0, 0, 0, length - context.shape[1]))
        mask = F.pad(mask, (0, length - mask.shape[1]))
        empty = ~mask.any(1, keepdim=True)
        return torch.where(empty[..., None], null.to(context), context), torch.where(empty, own[:, 0].bool(), mask)

    def prepare(self, times: Tensor, cond: Cond | None = None) -> dict:
        """The modulations of a run's times [S] and the caption's keys and values; {} when they would not fit.

        Words that no item sees are cut off. Modulations that depend on the size are left to `forward`, which knows it.
        """
        context, mask = self._caption(cond or {})
        if mask is not None:
            last = int(mask.any(0).nonzero().max()) + 1
            context, mask = context[:, :last], mask[:, :last]
        numbers = 2 * self.config.depth * context.shape[0] * context.shape[1] + 7 * len(times)
        if numbers * self.config.hidden * self.final.weight.element_size() > PREPARED_BYTES:
            return {}
        time = self.time(times)
        return {"steps": {t: s for s, t in enumerate(times.float().tolist())}, "time": time,
                "mods": self._shared(time), "words": self._words(context, mask)}


@lru_cache(maxsize=16)
def _positions(config: PixArtNetConfig, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return position_table(config, rows, cols).to(device, dtype)


def position_table(config: PixArtNetConfig, rows: int = 0, cols: int = 0) -> Tensor:
    """The fixed sine-cosine table [rows * cols, D] in float32 on the CPU; by default of the trained grid.

    Each side of another grid is stretched onto the trained one on its own, and `pos_scale` squeezes that onto the
    grid of an earlier training stage. It is no buffer: see `position_table` of dit.py.
    """
    side, half = config.size // config.patch, config.hidden // 2
    rows, cols = rows or side, cols or side
    with torch.inference_mode(False), torch.device("cpu"):
        wide = sincos_2d(config.hidden, 1, cols, scale=cols / side * config.pos_scale)[None, :, :half]
        high = sincos_2d(config.hidden, rows, 1, scale=rows / side * config.pos_scale)[:, None, half:]
        return torch.cat([wide.expand(rows, -1, -1), high.expand(-1, cols, -1)], -1).flatten(0, 1)


class PixArtConfig(DiffusionConfig):
    """PixArt-alpha as published: the linear chain of 1000 steps, eps with a learned variance, captions, a KL codec.

    Guidance steers away from the conditioner's null: the encoder's empty caption, as diffusers' pipeline has it, or
    no word at all (conditioner.null = "zeros"), which is the network's stored null, as the paper's scripts have it.
    """

    net: PixArtNetConfig = PixArtNetConfig()
    path: AnyPath = DiscretePath()
    conditioner: PretrainedCondConfig | TextCondConfig | NoCondConfig = Field(
        PretrainedCondConfig(recipe="pixart"), discriminator="kind")
    learned_variance: bool = True
    steps: int = Field(20, ge=1)
    guidance: float = Field(4.5, ge=0)
    sampler: str = "dpmpp-2m"
    pools_words: ClassVar[bool] = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if getattr(self.conditioner, "null", "") == "zeros" and not self.net.null_tokens:
            raise ValueError("conditioner.null 'zeros' asks for the stored null caption, and net.null_tokens is 0")
        return self

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": PixArtNetConfig.presets["tiny"], "steps": 4, "guidance": 2.0,
                 "codec": {"net": KLConfig.presets["tiny"]},
                 "conditioner": TextCondConfig.presets["tiny"]},
        "emoji": {"net": PixArtNetConfig.presets["emoji"], "codec": SHARED_CODEC, "learned_variance": False,
                  "guidance": 3.0, "prediction": "v",
                  "conditioner": TextCondConfig.presets["emoji"]},
    } | {
        name: {"net": PixArtNetConfig.presets[name],
               "codec": {"net": KLConfig.presets["sd-f8"] | {"size": 8 * size}}}
        for name, size in (("xl-256", 32), ("xl-512", 64), ("xl-1024-ms", 128))
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": DiTConfig.recipes["emoji"],                    # a network of the same size on the same latents
    }
