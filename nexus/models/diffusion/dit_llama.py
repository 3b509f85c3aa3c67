"""The DiT of minRF: LLaMA's block (rotary positions, SwiGLU, normed queries) steered by adaLN. Ryu 2024 (minRF), after
Peebles & Xie 2022, arXiv:2212.09748 and Zhuo et al. 2024, arXiv:2406.18583.

B = batch, C = channels, L = patches, D = hidden width, K = channels of a head, S = times of a sampling run.
"""

from functools import lru_cache
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.embed import TimestepMLP, with_ids
from nexus.nn.modulation import gated, modulate
from nexus.nn.patches import grid_of, unpatched
from nexus.nn.rope import Rotation, axial_rotation, rotate

TIME_FREQS = 256                 # width of the sinusoid before the time MLP
COND_WIDTH = 1024                # the condition is no wider than this
STEM_GROUPS = 32


class LlamaDiTConfig(Config):
    """The network alone. The defaults are minRF's."""

    size: int = Field(32, gt=0, description="side of x in training")
    patch: int = Field(2, gt=0, description="side of a patch")
    in_channels: int = Field(3, gt=0)
    hidden: int = Field(512, gt=0, description="token width")
    depth: int = Field(5, gt=0)
    heads: int = Field(16, gt=0)
    mlp_hidden: int = Field(1536, gt=0, description="width inside the SwiGLU: 8/3 of hidden, rounded up by minRF")
    num_classes: int = Field(10, ge=0, description="0 = no labels")
    null_class: bool = Field(True, description="one more row, for guidance: label num_classes means none")
    num_styles: int = Field(0, ge=0, description="a second label with a null row of its own; 0 = none")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"hidden {self.hidden} does not split in {self.heads} heads of even width")
        if self.hidden % (2 * STEM_GROUPS):
            raise ValueError(f"hidden {self.hidden} is not a multiple of {2 * STEM_GROUPS}, which the stem needs")
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        return self

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return self.patch

    def build(self) -> "LlamaDiT":
        """The network with its initial weights."""
        return LlamaDiT(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"size": 8, "hidden": 64, "depth": 1, "heads": 2, "mlp_hidden": 64},
        "mnist": {"in_channels": 1, "hidden": 64, "depth": 6, "heads": 4, "mlp_hidden": 256},
    }


class LlamaBlock(nn.Module):
    """Attention and a SwiGLU, each normed, shifted, scaled and gated by `mod`: x [B, L, D] -> [B, L, D]."""

    def __init__(self, dim: int, heads: int, mlp: int, cond: int):
        super().__init__()
        self.heads = heads
        self.adaln = nn.Linear(cond, 6 * dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * mlp, bias=False)
        self.down = nn.Linear(mlp, dim, bias=False)

    def forward(self, x: Tensor, mod: Tensor, rotation: Rotation) -> Tensor:
        """mod [B, 6D] = adaln(silu(c)): shift, scale, gate of the attention, then of the SwiGLU."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mod.chunk(6, -1)
        q, k, v = self.qkv(_shifted(self.norm1(x), shift_a, scale_a)).chunk(3, -1)
        q, k, v = (split_heads(p, self.heads) for p in (self.q_norm(q), self.k_norm(k), v))
        x = gated(x, gate_a, self.proj(merge_heads(attend(rotate(q, rotation), rotate(k, rotation), v))))
        gate, up = self.gate_up(_shifted(self.norm2(x), shift_m, scale_m)).chunk(2, -1)
        return gated(x, gate_m, self.down(F.silu(gate) * up))


def _shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, D], already normed with weights of its own, modulated by [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


@lru_cache(maxsize=16)
def _rotation(length: int, width: int, device: torch.device) -> Rotation:
    """Positions along the flattened picture, in one dimension, as minRF has them."""
    with torch.inference_mode(False):
        return axial_rotation(torch.arange(length, device=device)[:, None], (width,))


class LlamaDiT(nn.Module):
    """x [B, C, H, W], t [B] (minRF: 0 = data to 1 = noise) -> [B, C, H, W].

    cond: "label" [B] in 0..num_classes (num_classes = none), "style" [B] likewise; a missing one is none.
    Raises InputError on sides that do not fit.
    """

    def __init__(self, config: LlamaDiTConfig):
        super().__init__()
        self.config = c = config
        half, cond = c.hidden // 2, min(c.hidden, COND_WIDTH)
        self.stem = nn.Sequential(nn.Conv2d(c.in_channels, half, 5, padding=2), nn.SiLU(),
                                  nn.GroupNorm(STEM_GROUPS, half), nn.Conv2d(half, half, 5, padding=2), nn.SiLU(),
                                  nn.GroupNorm(STEM_GROUPS, half))
        self.patch = nn.Linear(c.patch**2 * half, c.hidden)
        self.time = TimestepMLP(TIME_FREQS, cond)
        self.label = nn.Embedding(c.num_classes + c.null_class, cond) if c.num_classes else None
        self.style = nn.Embedding(c.num_styles + 1, cond) if c.num_styles else None
        self.blocks = nn.ModuleList(LlamaBlock(c.hidden, c.heads, c.mlp_hidden, cond) for _ in range(c.depth))
        self.final_adaln = nn.Linear(cond, 2 * c.hidden)
        self.final = nn.Linear(c.hidden, c.patch**2 * c.in_channels)
        nn.init.zeros_(self.patch.bias)
        nn.init.zeros_(self.final.weight)
        nn.init.zeros_(self.final.bias)

    @torch.no_grad()
    def prepare(self, times: Tensor, cond: dict[str, Tensor] | None = None) -> dict:
        """The time embedding of each time of a sampling run [S]."""
        waves = self.time(times.to(self.final.weight.device))
        return {float(t): wave[None] for t, wave in zip(times, waves, strict=True)}

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None,
                prepared: dict | None = None) -> Tensor:
        p, dtype = self.config.patch, self.final.weight.dtype
        rows, cols = grid_of(x, p, "picture")
        c = F.silu(self._embed(t, cond or {}, prepared or {}))
        h = self.stem(x.to(dtype)).unflatten(3, (cols, p)).unflatten(2, (rows, p))            # [B, C', h, p, w, q]
        h = self.patch(h.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))                  # [B, L, D]
        rotation = _rotation(rows * cols, self.config.hidden // self.config.heads, x.device)
        for block in self.blocks:
            h = block(h, block.adaln(c), rotation)
        h = self.final(modulate(h, *self.final_adaln(c).chunk(2, -1)))                        # [B, L, p * q * C]
        return unpatched(h, rows, cols, p).to(x.dtype)

    def _embed(self, t: Tensor, cond: dict[str, Tensor], prepared: dict) -> Tensor:
        """The condition c: time plus label plus style, [B, D] or [1, D]."""
        c = prepared.get(float(t[0])) if prepared else None
        c = self.time(t) if c is None else c
        return with_ids(c, cond, self.label, self.style, null_label=self.config.null_class)
