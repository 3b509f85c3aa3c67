"""The network of FLUX: joint blocks, then blocks over one stream. Black Forest Labs 2024; Esser et al. 2024.

B = batch, C = latent channels, L = text tokens, N = picture tokens (2x2 latent pixels each), D = width.
"""

import json
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.embed import TimestepMLP
from nexus.nn.joint import (
    JointBlock,
    alone,
    joint_mask,
    modulations,
    needed,
    prepared_modulations,
    vector_mlp,
)
from nexus.nn.modulation import gated, modulate, start_as_identity
from nexus.nn.norm import QKNorm
from nexus.nn.patches import grid_of
from nexus.nn.perturb import Perturb
from nexus.nn.rope import Rotation, axial_rotation, grid_positions, rotate
from nexus.process.codec import SHARED_LATENTS

TIME_FREQS = 256                 # width of the sinusoids of time and guidance
PATCH = 2


class FluxNetConfig(Config):
    """The network alone. The defaults are FLUX.1 [dev]."""

    kind: Literal["flux"] = "flux"
    in_channels: int = Field(16, gt=0, description="channels of x and of a concatenated condition together")
    out_channels: int = Field(16, gt=0)
    hidden: int = Field(3072, gt=0, description="token width")
    heads: int = Field(24, gt=0)
    depth: int = Field(19, gt=0, description="blocks with two streams")
    single_depth: int = Field(38, gt=0, description="blocks with one stream, after them")
    mlp_ratio: float = Field(4.0, gt=0)
    context_dim: int = Field(4096, gt=0, description="width of a text token")
    pooled_dim: int = Field(768, gt=0, description="width of the text's own vector")
    axes: tuple[int, int, int] = Field((16, 56, 56), description="channels of a head turned by picture, row, column")
    theta: float = Field(10_000.0, gt=0)
    guidance: bool = Field(True, description="it is told the guidance scale (distilled guidance)")

    @field_validator("axes", mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return json.loads(value) if isinstance(value, str) else value       # as `nexus convert --set` gives it

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if sum(self.axes) != self.hidden // self.heads or any(a < 0 or a % 2 for a in self.axes):
            raise ValueError(f"axes {self.axes} are not even numbers with the sum {self.hidden // self.heads}, "
                             "the width of a head")
        return self

    @property
    def mlp(self) -> int:
        """Hidden width of every MLP."""
        return round(self.hidden * self.mlp_ratio)

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return PATCH

    def build(self) -> "Flux":
        """The network with its initial weights."""
        return Flux(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"in_channels": 4, "out_channels": 4, "hidden": 32, "heads": 2, "depth": 1, "single_depth": 2,
                 "context_dim": 16, "pooled_dim": 16, "axes": (4, 6, 6), "guidance": False},
        "emoji": {"in_channels": SHARED_LATENTS, "out_channels": SHARED_LATENTS, "hidden": 144, "heads": 3, "depth": 2,
                  "single_depth": 4, "context_dim": 128, "pooled_dim": 128, "axes": (8, 20, 20), "guidance": False},
        "flux-dev": {},
        "flux-schnell": {"guidance": False},
    }


class SingleBlock(nn.Module):
    """Attention and MLP side by side over text and picture as one stream: x [B, L + N, D] -> [B, L + N, D]."""

    def __init__(self, dim: int, heads: int, mlp: int):
        super().__init__()
        self.heads, self.sizes = heads, (3 * dim, mlp)
        self.adaln = nn.Linear(dim, 3 * dim)
        self.inner = nn.Linear(dim, 3 * dim + mlp)
        self.norm = QKNorm(dim // heads)
        self.outer = nn.Linear(dim + mlp, dim)

    def forward(self, x: Tensor, mod: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """mod [B, 3D]: shift, scale, gate."""
        shift, scale, gate = mod.chunk(3, -1)
        qkv, h = self.inner(modulate(x, shift, scale)).split(self.sizes, -1)
        q, k, v = (split_heads(part, self.heads) for part in qkv.chunk(3, -1))
        q, k = (rotate(part, rotation) for part in self.norm(q, k))
        attended = merge_heads(attend(q, k, v, mask))
        return gated(x, gate, self.outer(torch.cat([attended, F.gelu(h, approximate="tanh")], -1)))


class Flux(nn.Module):
    """x [B, C, H, W] with even sides, t [B] in [0, 1000] -> velocity [B, C, H, W].

    cond: "context" [B, L, E], "pooled" [B, P], and optionally "context_mask" [B, L], "guidance" [B] (the scale; missing
    means 1, which is what training on data stands for), "concat" [B, C', H, W] (Fill, Depth), "reference"
    [B, C, h, w] (Kontext: another picture's latent, looked at as further tokens).
    """

    def __init__(self, config: FluxNetConfig):
        super().__init__()
        self.config = c = config
        self.layers, self.middle = c.depth + c.single_depth, (c.depth + c.single_depth) // 2
        dim = c.hidden
        self.x_in = nn.Linear(PATCH**2 * c.in_channels, dim)
        self.context_in = nn.Linear(c.context_dim, dim)
        self.time = TimestepMLP(TIME_FREQS, dim)
        self.guidance = TimestepMLP(TIME_FREQS, dim) if c.guidance else None
        self.pooled = vector_mlp(c.pooled_dim, dim)
        self.blocks = nn.ModuleList(JointBlock(dim, c.heads, c.mlp, qk_norm=True) for _ in range(c.depth))
        self.singles = nn.ModuleList(SingleBlock(dim, c.heads, c.mlp) for _ in range(c.single_depth))
        self.final_adaln = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, PATCH**2 * c.out_channels)
        start_as_identity(self)

    def adalns(self) -> list[nn.Linear]:
        """The layers that make modulations, in the order of their use."""
        pairs = [layer for block in self.blocks for layer in (block.x.adaln, block.context.adaln)]
        return [*pairs, *(block.adaln for block in self.singles), self.final_adaln]

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None,
                prepared: dict | None = None, perturb: Perturb = Perturb()) -> Tensor:
        """`prepared` is what `prepare` returned for the same `cond`. Raises InputError for odd sides or no text."""
        needed(cond, "context")
        mods = modulations(self, t, cond, prepared)
        ready = prepared or self._constant(cond)
        context, other = ready["context"], ready["reference"]
        inputs = torch.cat([x, cond["concat"]], 1) if "concat" in cond else x
        tokens, grids = self._tokens(inputs), (grid_of(x, PATCH),)
        own, words = tokens.shape[1], context.shape[1]
        if other is not None:
            tokens, grids = torch.cat([tokens, other], 1), (*grids, grid_of(cond["reference"], PATCH))
        rotation = _rotation(self.config.axes, self.config.theta, words, grids, x.device)
        mask = joint_mask(cond, tokens.shape[1])
        masks = [alone(mask, words, tokens.shape[1], x.device) if i in perturb.identity else mask
                 for i in range(self.layers)]
        stream = torch.cat(self._double(tokens, context, mods, masks, rotation, perturb), 1)
        for i, single in enumerate(self.singles, len(self.blocks)):
            if i not in perturb.skip:
                stream = single(stream, mods[len(self.blocks) + i], rotation, masks[i])
        out = self.final(modulate(stream[:, words:words + own], *mods[-1].chunk(2, -1)))      # [B, N, C * 4]
        return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, grids[0]), PATCH)

    def _double(self, tokens: Tensor, context: Tensor, mods: list[Tensor], masks: list[Tensor | None],
                rotation: Rotation, perturb: Perturb) -> tuple[Tensor, Tensor]:
        """Text [B, L, D] and picture [B, N, D] after the joint blocks."""
        for i, block in enumerate(self.blocks):
            if i not in perturb.skip:
                tokens, context = block(tokens, context, *mods[2 * i:2 * i + 2], mask=masks[i], rotation=rotation)
        return context, tokens

    def embed(self, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The condition c [B, D]: time, the text's own vector, and the guidance scale where it is told."""
        pooled = needed(cond, "pooled").to(self.x_in.weight.dtype)
        c = self.time(t) + self.pooled(pooled)
        if self.guidance is None:
            return c
        return c + self.guidance(1000 * cond.get("guidance", torch.ones_like(t)).float())

    def prepare(self, times: Tensor, cond: dict[str, Tensor] | None = None) -> dict:
        """Of a run with times [S]: every modulation, and the tokens of the text and of a reference picture."""
        needed(cond, "context")
        keys = ("pooled", "guidance") if self.guidance is not None and "guidance" in cond else ("pooled",)
        return prepared_modulations(self, times, cond, keys) | self._constant(cond)

    def _constant(self, cond: dict[str, Tensor]) -> dict:
        reference = self._tokens(cond["reference"]) if "reference" in cond else None
        return {"context": self.context_in(cond["context"].to(self.x_in.weight.dtype)), "reference": reference}

    def _tokens(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, H/2 * W/2, D]."""
        grid_of(x, PATCH)
        if 4 * x.shape[1] != self.x_in.in_features:
            raise InputError(f"{x.shape[1]} channels given, {self.config.in_channels} expected",
                             hint='a picture it is conditioned on goes in cond["concat"]')
        return self.x_in(F.pixel_unshuffle(x.to(self.x_in.weight.dtype), PATCH).flatten(2).transpose(1, 2))


@lru_cache(maxsize=16)
def _rotation(axes: tuple[int, ...], theta: float, words: int, grids: tuple[tuple[int, int], ...],
              device: torch.device) -> Rotation:
    """Text at the origin, then each grid of tokens on a plane of its own, numbered from 0."""
    with torch.inference_mode(False), torch.device("cpu"):
        places = [torch.zeros(words, 3, dtype=torch.long),
                  *(grid_positions(rows, cols, first=i) for i, (rows, cols) in enumerate(grids))]
        cos, sin = axial_rotation(torch.cat(places), axes, theta=theta)
        return cos.to(device), sin.to(device)
