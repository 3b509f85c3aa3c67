"""MMDiT: text and picture tokens in one attention, on a straight path. Esser et al. 2024 (SD3), arXiv:2403.03206.

The family of FLUX has its network in flux.py; both are this system. B = batch, C = latent channels, L = text tokens,
N = patches, D = hidden width, S = times of a sampling run.
"""

from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig
from nexus.config import Config
from nexus.errors import InputError, UsageError
from nexus.models.diffusion.dit import DiTConfig
from nexus.models.diffusion.flux import FluxNetConfig
from nexus.nn.embed import TimestepMLP, sincos_2d
from nexus.nn.joint import (
    JointBlock,
    alone,
    joint_mask,
    modulations,
    needed,
    prepared_modulations,
    vector_mlp,
)
from nexus.nn.modulation import modulate, start_as_identity
from nexus.nn.patches import unpatched
from nexus.nn.perturb import Perturb
from nexus.process import clocks
from nexus.process.codec import SHARED_CODEC
from nexus.process.diffusion import Diffusion, DiffusionConfig
from nexus.process.paths import RectifiedPath
from nexus.process.schedules import Grid
from nexus.process.steer import Task, scale_of, steered
from nexus.requests import SampleRequest
from nexus.text.conditioner import TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig

TIME_FREQS = 256                 # width of the sinusoid before the time MLP


class MMDiTNetConfig(Config):
    """The network of SD3 and SD3.5 alone. The defaults are SD3-medium."""

    kind: Literal["sd3"] = "sd3"
    size: int = Field(128, gt=0, description="side of the latent whose positions count in whole patches")
    patch: int = Field(2, gt=0, description="side of a patch, in latent pixels")
    in_channels: int = Field(16, gt=0)
    hidden: int = Field(1536, gt=0, description="token width")
    depth: int = Field(24, gt=0)
    heads: int = Field(24, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    context_dim: int = Field(4096, gt=0, description="width of a text token")
    pooled_dim: int = Field(2048, gt=0, description="width of the text's own vector")
    positions: int = Field(192, gt=0, description="side of the table of positions, in patches")
    stored_positions: bool = Field(False, description="the table is the checkpoint's, not computed")
    qk_norm: bool = Field(False, description="RMS norm of queries and keys (SD3.5)")
    dual: tuple[int, ...] = Field((), description="blocks where pictures also attend to themselves (SD3.5-medium)")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} is not a multiple of 4, which the position table needs")
        if self.size % self.patch or self.size // self.patch > self.positions:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}, {self.positions} at most")
        if bad := [i for i in self.dual if not 0 <= i < self.depth]:
            raise ValueError(f"dual names block {bad[0]}, but the blocks are 0 to {self.depth - 1}")
        return self

    @property
    def mlp(self) -> int:
        """Hidden width of every MLP."""
        return round(self.hidden * self.mlp_ratio)

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return self.patch

    def build(self) -> "MMDiT":
        """The network with its initial weights."""
        return MMDiT(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"size": 8, "in_channels": 4, "hidden": 32, "depth": 2, "heads": 2, "context_dim": 16,
                 "pooled_dim": 16, "positions": 6, "qk_norm": True, "dual": (0,)},
        "sd3-medium": {},
        "sd35-medium": {"positions": 384, "qk_norm": True, "dual": tuple(range(13))},
        "sd35-large": {"hidden": 2432, "depth": 38, "heads": 38, "qk_norm": True},
    }


class MMDiT(nn.Module):
    """x [B, C, H, W], t [B] in [0, 1000] -> velocity [B, C, H, W].

    cond: "context" [B, L, E], "pooled" [B, P], and optionally "context_mask" [B, L].
    """

    def __init__(self, config: MMDiTNetConfig):
        super().__init__()
        self.config = c = config
        self.layers, self.middle = c.depth, c.depth // 2
        dim = c.hidden
        self.patch = nn.Conv2d(c.in_channels, dim, c.patch, c.patch)
        self.time = TimestepMLP(TIME_FREQS, dim)
        self.pooled = vector_mlp(c.pooled_dim, dim)
        self.context_in = nn.Linear(c.context_dim, dim)
        self.blocks = nn.ModuleList(
            JointBlock(dim, c.heads, c.mlp, qk_norm=c.qk_norm, second=i in c.dual, last=i == c.depth - 1)
            for i in range(c.depth))
        self.final_adaln = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, c.patch**2 * c.in_channels)
        self.register_buffer("positions", _stored(c) if c.stored_positions else None)
        start_as_identity(self)

    def adalns(self) -> list[nn.Linear]:
        """The layers that make modulations, in the order of their use."""
        return [layer for block in self.blocks for layer in (block.x.adaln, block.context.adaln)] + [self.final_adaln]

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None,
                prepared: dict | None = None, perturb: Perturb = Perturb()) -> Tensor:
        """`prepared` is what `prepare` returned for the same `cond`. Raises InputError on bad sides or no text."""
        needed(cond, "context")
        rows, cols = self._grid(x)
        mods = modulations(self, t, cond, prepared)
        context = prepared["context"] if prepared else self._words(cond)
        mask = joint_mask(cond, rows * cols)
        x = self.patch(x.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)              # [B, N, D]
        x = x + self._places(rows, cols, x)
        for i, block in enumerate(self.blocks):
            if i not in perturb.skip:
                seen = alone(mask, context.shape[1], x.shape[1], x.device) if i in perturb.identity else mask
                x, context = block(x, context, *mods[2 * i:2 * i + 2], mask=seen)
        x = self.final(modulate(x, *mods[-1].chunk(2, -1)))                                   # [B, N, p * p * C]
        return unpatched(x, rows, cols, self.config.patch)

    def embed(self, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """The condition c [B, D]: time plus the text's own vector."""
        return self.time(t) + self.pooled(needed(cond, "pooled").to(self.patch.weight.dtype))

    def prepare(self, times: Tensor, cond: dict[str, Tensor] | None = None) -> dict:
        """Of a run with times [S]: every modulation, computed in one product a layer, and the text's tokens."""
        needed(cond, "context")
        return prepared_modulations(self, times, cond, ("pooled",)) | {"context": self._words(cond)}

    def _words(self, cond: dict[str, Tensor]) -> Tensor:
        return self.context_in(cond["context"].to(self.patch.weight.dtype))

    def _grid(self, x: Tensor) -> tuple[int, int]:
        p, most = self.config.patch, self.config.positions
        rows, cols = x.shape[-2] // p, x.shape[-1] // p
        if (rows * p, cols * p) != x.shape[-2:] or max(rows, cols) > most:
            raise InputError(f"a latent of {x.shape[-2]}x{x.shape[-1]} is not made of patches of {p}x{p}, {most} a "
                             "side at most", hint=f"choose sides that are multiples of {p}, up to {most * p}")
        return rows, cols

    def _places(self, rows: int, cols: int, x: Tensor) -> Tensor:
        """The centre of the table: [N, D]."""
        if self.positions is None:
            return _computed(self.config, rows, cols, x.device, x.dtype)
        side = self.config.positions
        top, left = (side - rows) // 2, (side - cols) // 2
        table = self.positions.view(side, side, -1)[top:top + rows, left:left + cols]
        return table.flatten(0, 1).to(x.dtype)


@lru_cache(maxsize=16)
def _computed(config: MMDiTNetConfig, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return position_table(config, rows, cols).to(device, dtype)


def position_table(config: MMDiTNetConfig, rows: int = 0, cols: int = 0) -> Tensor:
    """The centre of the sine-cosine table, [rows * cols, D] in float32 on the CPU; by default all of it."""
    side, base = config.positions, config.size // config.patch
    rows, cols = rows or side, cols or side
    with torch.inference_mode(False), torch.device("cpu"):
        return sincos_2d(config.hidden, rows, cols, scale=side / base, top=(side - rows) // 2, left=(side - cols) // 2)


def _stored(config: MMDiTNetConfig) -> Tensor:
    table = torch.empty(1, config.positions**2, config.hidden)
    return table if table.is_meta else table.copy_(position_table(config))      # on meta it would be work for nothing


class SD3Path(RectifiedPath):
    """The straight line with SD3's sampling grid: evenly from 1 to the least of 1000 shifted times, then shifted.

    The published code shifts its table of times and then shifts the grid through it once more.
    """

    kind: Literal["sd3"] = "sd3"

    def uniform(self, steps: int) -> Tensor:
        least = clocks.warp(torch.tensor(1e-3, dtype=torch.float64), self.shift)
        return torch.linspace(1, least.item(), steps, dtype=torch.float64)


class Told(NamedTuple):
    """A conditioner whose conditions hold a guidance scale too."""

    inner: Any
    scale: float

    def prompts(self, prompts: list[str | None], device: torch.device) -> tuple[dict, tuple[dict, ...]]:
        """As the inner one's, with "guidance" [B]."""
        cond, notes = self.inner.prompts(prompts, device)
        return cond | {"guidance": torch.full((len(prompts),), self.scale, device=device)}, notes


class Seen(NamedTuple):
    """The parts of a system that steering looks at."""

    config: Any
    net: nn.Module
    conditioner: Told


class Distilled(Diffusion):
    """A network that was distilled from its guided self: the scale is one more input, and a step is one call."""

    def _check_steering(self, request: SampleRequest) -> None:
        kind = request.guidance_kind or "cfg"
        shaped = request.guidance_rescale or request.guidance_interval != (0.0, 1.0)
        if kind not in ("cfg", "pag", "slg") or request.negative_prompt or (kind == "cfg" and shaped):
            raise UsageError("this model's guidance is an input of its network, there is nothing to steer away from",
                             hint="--guidance alone, or with --guidance-kind pag or slg; no --negative-prompt")
        super()._check_steering(_alone(request))

    def _denoiser(self, request: SampleRequest, points: Grid, n: int, device: torch.device, **more):
        seen = Seen(self.config, self.net, Told(self.conditioner, scale_of(self.config, request)))
        return steered(Task(seen, _alone(request), points, n, device, **more))


def _alone(request: SampleRequest) -> SampleRequest:
    """The request so that there is no second half of the batch."""
    return request.model_copy(update={"guidance": 1.0})


_TINY = {"conditioner": TextCondConfig.presets["tiny"], "codec": {"net": KLConfig.presets["tiny"]}, "steps": 4,
         "guidance": 2.0}
SYSTEMS: dict[str, dict] = {     # what a published network implies for its system
    "sd3": {"path": {"kind": "sd3", "shift": 3.0, "time_sampling": "logit-normal"}, "guidance": 5.0, "steps": 50,
            "conditioner": {"kind": "pretrained", "recipe": "sd3"}},
    "flux-dev": {"path": {"kind": "rectified", "dynamic_shift": (0.5, 1.15), "time_sampling": "logit-normal"},
                 "guidance": 3.5, "steps": 50, "conditioner": {"kind": "pretrained", "recipe": "flux"}},
    "flux-schnell": {"path": {"kind": "rectified", "time_sampling": "logit-normal"}, "guidance": 1.0, "steps": 4,
                     "conditioner": {"kind": "pretrained", "recipe": "flux", "length": 256}},
}


def _published(system: str, net: dict, codec: str) -> dict:
    return SYSTEMS[system] | {"net": net, "size": 128, "codec": {"net": KLConfig.presets[codec]}}


class MMDiTConfig(DiffusionConfig):
    """SD3 as published: the straight path shifted by 3, logit-normal training times, guidance over text."""

    net: MMDiTNetConfig | FluxNetConfig = Field(MMDiTNetConfig(), discriminator="kind")
    path: Annotated[SD3Path | RectifiedPath, Field(discriminator="kind")] = SD3Path(
        shift=3.0, time_sampling="logit-normal")
    prediction: Literal["flow"] = "flow"
    conditioner: PretrainedCondConfig | TextCondConfig = Field(
        PretrainedCondConfig(recipe="sd3"), discriminator="kind")
    steps: int = Field(50, ge=1)
    guidance: float = Field(5.0, ge=0)
    sampler: str = "euler"

    def build(self) -> Diffusion:
        """The system with its initial weights; with distilled guidance where the network has it."""
        return Distilled(self) if self.net.kind == "flux" and self.net.guidance else Diffusion(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": _TINY | {"net": {"kind": "sd3"} | MMDiTNetConfig.presets["tiny"]},
        "tiny-flux": _TINY | {"net": {"kind": "flux"} | FluxNetConfig.presets["tiny"],
                              "path": SYSTEMS["flux-dev"]["path"]},
        "emoji": {"net": {"kind": "flux"} | FluxNetConfig.presets["emoji"], "codec": SHARED_CODEC, "steps": 20,
                  "guidance": 3.0, "path": SYSTEMS["flux-schnell"]["path"],
                  "conditioner": TextCondConfig.presets["emoji"]},
    } | {
        name: _published("sd3", {"kind": "sd3"} | MMDiTNetConfig.presets[name], "sd3")
        for name in ("sd3-medium", "sd35-medium", "sd35-large")
    } | {
        name: _published(name, {"kind": "flux"} | FluxNetConfig.presets[name], "flux")
        for name in ("flux-dev", "flux-schnell")
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": DiTConfig.recipes["emoji"],                    # a network of the same size on the same latents
    }
