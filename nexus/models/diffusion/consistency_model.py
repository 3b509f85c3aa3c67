"""Consistency models: pictures in one or two steps. Song et al. 2023, arXiv:2303.01469; Song & Dhariwal 2023 (iCT),
arXiv:2310.14189.

f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, 250 ln sigma), the identity at sigma_min. It is distilled
from an EDM teacher (CD) or learned from the data alone (CT, iCT).
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nexus.errors import ModelError, UsageError
from nexus.losses.lpips import NEEDED
from nexus.models.diffusion.unet import UNetConfig
from nexus.process import consistency as cm
from nexus.process import edm
from nexus.process.codec import SHARED_CODEC
from nexus.process.jump import Consistency, JumpConfig, Pair
from nexus.process.paths import VEPath
from nexus.process.predictions import denoiser, network_input, over
from nexus.text.conditioner import Cond, LabelCondConfig, NoCondConfig, TextCondConfig

_CD = {"scales": "fixed", "s0": 40, "levels": "uniform", "target": "fixed", "weighting": "uniform", "distance": "l2",
       "steps": 2}
_CT = {"scales": "progressive", "s0": 2, "levels": "uniform", "target": "adaptive", "weighting": "uniform",
       "distance": "l2", "steps": 2}
_EMOJI = {"net": UNetConfig.presets["emoji-labels"], "codec": SHARED_CODEC, "clip": False, "steps": 2,
          "conditioner": LabelCondConfig.presets["emoji"], "path": {"sigma_data": 1.0}}
_BEDROOM = {"net": UNetConfig.presets["lsun-256"], "size": 256, "conditioner": {"kind": "none"}}


class ConsistencyPath(VEPath):
    """The VE path with the noise levels that a run of few steps visits.

    points: levels of the grid, 0 the noisiest. visits: those of a run of len(visits) steps; other runs go evenly.
    """

    log_clock: float = Field(250.0, ge=0)
    points: int = Field(40, ge=2)
    visits: tuple[int, ...] = ()

    def times(self, steps: int, *, schedule: str = "native", shape=None, strength: float = 1.0) -> Tensor:
        """Sigmas of a run over the last `strength` of the grid; UsageError for a schedule, or more steps than levels.

        A run that has fewer levels left than steps visits every one.
        """
        if schedule != "native":
            raise UsageError("a consistency model visits the levels it was trained at", hint="leave --schedule out")
        if steps > self.points:
            raise UsageError(f"{steps} steps, but this model knows {self.points} noise levels",
                             hint=f"use --steps {self.points} or fewer")
        left = int(self.points * strength)
        every = left // min(steps, left) if left else 1
        even = [self.points - left + i * every for i in range(min(steps, left))]
        chosen = self.visits if strength == 1 and len(self.visits) == steps else even
        return edm.karras_sigmas(self.points, self.sigma_min, self.sigma_max, self.rho)[list(chosen)]


class ConsistencyConfig(JumpConfig):
    """Consistency distillation with `teacher`, else consistency training.

    scales: noise levels N(k): `s0` throughout ("fixed"), growing from s0 to s1 over `total` training steps with the
    square root of time ("progressive", CT) or by doubling ("doubling", iCT). levels: which of them are drawn.
    target: how the slow copy follows: a fixed decay mu, the one that goes with the levels ("adaptive", CT), or none
    (iCT: the network itself). distance: how far apart jumps end; "lpips" as the paper's best, with the weights in the
    file `lpips`. weighting: "uniform", or 1 over the gap of the two levels ("gap", iCT).
    """

    net: UNetConfig = UNetConfig()
    path: ConsistencyPath = ConsistencyPath()
    prediction: Literal["edm"] = "edm"
    conditioner: LabelCondConfig | TextCondConfig | NoCondConfig = Field(LabelCondConfig(), discriminator="kind")
    p_uncond: float = Field(0.0, ge=0, le=1)
    clip: bool = True
    scales: Literal["fixed", "progressive", "doubling"] = "doubling"
    s0: int = Field(10, ge=2)
    s1: int = Field(1280, ge=2)
    total: int = Field(400_000, ge=1)
    levels: Literal["uniform", "lognormal"] = "lognormal"
    level_mean: float = -1.1
    level_std: float = Field(2.0, gt=0)
    target: Literal["none", "fixed", "adaptive"] = "none"
    mu: float = Field(0.95, gt=0, lt=1)
    weighting: Literal["uniform", "gap"] = "gap"
    distance: Literal[(*cm.DISTANCES, "lpips")] = "pseudo-huber"
    lpips: str = ""

    @model_validator(mode="after")
    def _lpips_has_weights(self) -> Self:
        if self.distance == "lpips" and not self.lpips:
            raise ValueError(NEEDED)
        return self

    def count(self, step: int) -> int:
        """N(k), the noise levels at a training step."""
        if self.scales == "fixed":
            return self.s0
        grown = cm.progressive_scales if self.scales == "progressive" else cm.doubling_scales
        return grown(min(step, self.total), self.total, self.s0, self.s1)

    def decay(self, step: int) -> float | None:
        """mu(k) of the target; None when there is none."""
        if self.target == "adaptive":
            return cm.adaptive_decay(self.count(step), self.s0, self.mu)
        return self.mu if self.target == "fixed" else None

    def jump(self, net, x: Tensor, t: Tensor, cond: Cond | None = None, prepared: dict | None = None) -> Tensor:
        """f(x, sigma = t); sigma_min stands in c_skip and c_out, so that f is the identity there."""
        p = self.path
        c_skip, c_out = (over(c(t.double(), p.sigma_data, p.sigma_min), x) for c in (edm.c_skip, edm.c_out))
        clock = p.network_time(t.double()).to(x.device, torch.float32).expand(len(x))
        out = net(network_input(p, "edm", x, t), clock, cond, prepared).to(x.dtype)
        if t.ndim:
            c_skip, c_out = c_skip.to(x), c_out.to(x)
        return c_skip * x + c_out * out

    def neighbours(self, system: Consistency, x0: Tensor, cond: Cond | None, rng: torch.Generator, step: int) -> Pair:
        """Two adjacent levels and one noise; the teacher's Heun step leads from one to the other, or the data do."""
        p = self.path
        sigmas = edm.karras_sigmas(self.count(step), p.sigma_min, p.sigma_max, p.rho)
        i = (cm.uniform_levels(sigmas, len(x0), rng) if self.levels == "uniform" else
             cm.lognormal_levels(sigmas, len(x0), rng, self.level_mean, self.level_std))
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        t, s = sigmas[i].to(x0.device), sigmas[i + 1].to(x0.device)
        return self.pair(system.teacher, x0, eps, t, s, cond)

    def pair(self, teacher, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, cond: Cond | None) -> Pair:
        """The pair at levels t, s [B] for a given noise."""
        x = x0 + over(t, x0).to(x0) * eps
        near = (x0 + over(s, x0).to(x0) * eps if teacher is None else
                cm.heun_step(denoiser(teacher, self.path, "edm", cond), x, t, s))
        return Pair(x, t, near, s, cond, 1.0 if self.weighting == "uniform" else (1 / (t - s)).to(x))

    def check_teacher(self, other: Any) -> None:
        """ModelError for a teacher that is no EDM denoiser with this model's clock and data."""
        path = getattr(other, "path", None)
        same = isinstance(path, VEPath) and (path.log_clock, path.sigma_data) == (self.path.log_clock,
                                                                                  self.path.sigma_data)
        if not same or other.prediction != "edm":
            raise ModelError(f"teacher {self.teacher} is no EDM denoiser with log_clock {self.path.log_clock:g} and "
                             f"sigma_data {self.path.sigma_data:g}", hint="--set path.log_clock and path.sigma_data")

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny"], "size": 16, "s0": 4, "s1": 16, "total": 20, "steps": 2},
        "emoji": _EMOJI | {"s1": 160, "total": 20_000, "level_mean": -0.4},
        "emoji-distil": _CD | _EMOJI | {"path": {"sigma_data": 1.0, "visits": (0, 20)}},    # --set teacher=RUN
        "imagenet-64": _CD | {"net": UNetConfig.presets["imagenet-64"], "size": 64, "path": {"visits": (0, 22)}},
        "imagenet-64-ct": _CT | {"net": UNetConfig.presets["imagenet-64"], "size": 64, "s1": 200, "total": 800_000,
                                 "path": {"points": 201, "visits": (0, 106)}},
        "bedroom-256": _CD | _BEDROOM | {"path": {"visits": (0, 17)}},
        "bedroom-256-ct": _CT | _BEDROOM | {"s1": 150, "total": 1_000_000, "path": {"points": 151, "visits": (0, 67)}},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": {"steps": 20_000, "batch_size": 64, "lr": 5e-4, "warmup": 200, "schedule": "linear", "final_lr": 0.05,
                  "ema": 0.998, "save_every": 500, "cache_latents": True, "betas": (0.9, 0.99)},
        "emoji-distil": {"steps": 10_000, "batch_size": 64, "lr": 2e-4, "warmup": 200, "schedule": "linear",
                         "final_lr": 0.05, "ema": 0.998, "save_every": 500, "cache_latents": True,
                         "betas": (0.9, 0.99)},
        "imagenet-64": {"steps": 600_000, "batch_size": 2048, "lr": 8e-6, "ema": 0.9999, "save_every": 10_000},
        "imagenet-64-ct": {"steps": 800_000, "batch_size": 2048, "lr": 1e-4, "ema": 0.9999, "save_every": 10_000},
    }
