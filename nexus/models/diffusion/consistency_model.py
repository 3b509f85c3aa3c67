"""Consistency models: pictures in one or two steps. Song et al. 2023, arXiv:2303.01469; Song & Dhariwal 2023 (iCT),
arXiv:2310.14189.

f(x, sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x, 250 ln sigma), the identity at sigma_min. It is distilled
from a diffusion model (CD; EDM in the paper) or learned from the data alone (CT, iCT).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nexus.errors import ModelError, UsageError
from nexus.losses.lpips import NEEDED
from nexus.models.diffusion.dit import DiTNetConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.process import consistency as cm
from nexus.process import edm
from nexus.process.codec import SHARED_CODEC
from nexus.process.guidance import combine
from nexus.process.jump import Consistency, JumpConfig, Pair, null_like
from nexus.process.paths import AnyPath, DiscretePath, VEPath
from nexus.process.predictions import denoiser, over
from nexus.text.conditioner import Cond, LabelCondConfig, NoCondConfig, TextCondConfig

_CD = {"scales": "fixed", "s0": 40, "levels": "uniform", "target": "fixed", "weighting": "uniform", "distance": "l2",
       "steps": 2}
_CT = {"scales": "progressive", "s0": 2, "levels": "uniform", "target": "adaptive", "weighting": "uniform",
       "distance": "l2", "steps": 2}
_EMOJI = {"net": UNetConfig.presets["emoji-labels"], "codec": SHARED_CODEC, "clip": False, "steps": 2,
          "conditioner": LabelCondConfig.presets["emoji"], "path": {"sigma_data": 1.0}}
# The embedded `dit` is the teacher, led by three times the guidance; its words for noise and answer stay the student's.
# Few levels, as what the end looks like then passes to the start in few hops.
_OF_DIT = {"net": DiTNetConfig.presets["emoji"], "teacher": "dit", "teacher_guidance": 3.0, "prediction": "v", "s0": 8,
           "mu": 0.9, "path": {"native": DiscretePath(spacing="linspace").to_json(), "sigma_data": 1.0,
                               "sigma_min": 0.02, "points": 40, "visits": (0, 28)}}
_BEDROOM = {"net": UNetConfig.presets["lsun-256"], "size": 256, "conditioner": {"kind": "none"}}
_DISTIL = {"steps": 10_000, "batch_size": 64, "lr": 2e-4, "warmup": 200, "schedule": "linear", "final_lr": 0.05,
           "ema": 0.998, "save_every": 500, "cache_latents": True, "betas": (0.9, 0.99)}


class ConsistencyPath(VEPath):
    """The VE path with the noise levels that a run of few steps visits.

    points: levels of the grid, 0 the noisiest. visits: those of a run of len(visits) steps; other runs go evenly.
    native: the path that the network was trained on, if another: at equal signal to noise all paths show one picture,
    scaled otherwise (Kingma et al. 2021), so the network is given x and its clock as they would be there.
    """

    log_clock: float = Field(250.0, ge=0)
    points: int = Field(40, ge=2)
    visits: tuple[int, ...] = ()
    native: AnyPath | None = None

    @model_validator(mode="after")
    def _visits_its_levels(self) -> Self:
        if any(not 0 <= i < self.points for i in self.visits) or list(self.visits) != sorted(set(self.visits)):
            raise ValueError(f"visits {list(self.visits)}: rising numbers of levels, from 0 to {self.points - 1}")
        return self

    def network_time(self, t: Tensor) -> Tensor:
        return super().network_time(t) if self.native is None else self.native.network_time(self.native_time(t))

    def native_time(self, sigma: Tensor) -> Tensor:
        """Where the native path has the signal to noise of sigma."""
        return self.native.t_of_log_snr(-sigma.double().log())

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

    prediction: what the network says on `path.native`; without one it is EDM's F. teacher_guidance: the scale of
    classifier-free guidance under which the teacher walks.

    scales: noise levels N(k): `s0` throughout ("fixed"), growing from s0 to s1 over `total` training steps with the
    square root of time ("progressive", CT) or by doubling ("doubling", iCT). levels: which of them are drawn.
    target: how the slow copy follows: a fixed decay mu, the one that goes with the levels ("adaptive", CT), or none
    (iCT: the network itself). distance: how far apart jumps end; "lpips" as the paper's best, with the weights in the
    file `lpips`. weighting: "uniform", or 1 over the gap of the two levels ("gap", iCT).
    """

    net: UNetConfig | DiTNetConfig = UNetConfig()
    path: ConsistencyPath = ConsistencyPath()
    prediction: Literal["edm", "eps", "x0", "v", "flow"] = "edm"
    teacher_guidance: float = Field(1.0, ge=0)
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

    @model_validator(mode="after")
    def _predicts_on_a_path(self) -> Self:
        if self.path.native is None and self.prediction != "edm":
            raise ValueError(f"prediction {self.prediction} needs path.native, the path that it speaks about")
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

    def denoiser(self, net, cond: Cond | None, prepared: dict | None = None) -> Callable:
        """A network as denoise(x, sigma) -> x0 estimate for x = x0 + sigma eps."""
        p = self.path
        if p.native is None:
            return denoiser(net, p, "edm", cond, prepared)
        known = denoiser(net, p.native, self.prediction, cond, prepared)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            t = p.native_time(sigma)
            alpha, _ = p.native.at(t)
            return known(over(alpha, x).to(x) * x, t)
        return denoise

    def jump(self, net, x: Tensor, t: Tensor, cond: Cond | None = None, prepared: dict | None = None) -> Tensor:
        """f(x, sigma = t): sigma - sigma_min stands in c_skip and c_out, so that f is the identity at sigma_min.

        Said of the denoiser D = c_skip x + c_out F, whatever its network predicts.
        """
        p, sigma = self.path, t.double()
        share = 1 - p.sigma_min / sigma                                             # of c_out that is left
        keep = edm.c_skip(sigma, p.sigma_data, p.sigma_min) - share * edm.c_skip(sigma, p.sigma_data)
        share, keep = (over(v, x).to(x) for v in (share, keep))
        return share * self.denoiser(net, cond, prepared)(x, t) + keep * x

    def neighbours(self, system: Consistency, x0: Tensor, cond: Cond | None, rng: torch.Generator, step: int) -> Pair:
        """Two adjacent levels and one noise; the teacher's Heun step leads from one to the other, or the data do."""
        p = self.path
        sigmas = edm.karras_sigmas(self.count(step), p.sigma_min, p.sigma_max, p.rho)
        i = (cm.uniform_levels(sigmas, len(x0), rng) if self.levels == "uniform" else
             cm.lognormal_levels(sigmas, len(x0), rng, self.level_mean, self.level_std))
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        t, s = sigmas[i].to(x0.device), sigmas[i + 1].to(x0.device)
        teacher = system.teacher and self.guided(system.teacher, cond, null_like(system, cond, len(x0), x0.device))
        return self.pair(teacher, x0, eps, t, s, cond)

    def guided(self, teacher, cond: Cond | None, null: Cond | None) -> Callable:
        """The teacher's denoise(x, sigma), guided away from what it says without a condition."""
        alone = self.denoiser(teacher, cond)
        if self.teacher_guidance == 1:
            return alone
        other = self.denoiser(teacher, null)
        return lambda x, t: combine(alone(x, t), other(x, t), self.teacher_guidance)

    def pair(self, teacher: Callable | None, x0: Tensor, eps: Tensor, t: Tensor, s: Tensor, cond: Cond | None) -> Pair:
        """The pair at levels t, s [B] for a given noise; teacher: its denoise(x, sigma)."""
        x = x0 + over(t, x0).to(x0) * eps
        near = x0 + over(s, x0).to(x0) * eps if teacher is None else cm.heun_step(teacher, x, t, s)
        return Pair(x, t, near, s, cond, 1.0 if self.weighting == "uniform" else (1 / (t - s)).to(x))

    def check_teacher(self, other: Any) -> None:
        """ModelError for a teacher that predicts something else than this model's network, or on another path."""
        path, own = getattr(other, "path", None), self.path
        if own.native is not None:
            said = getattr(other, "prediction", None), getattr(other, "learned_variance", None)
            if (path, *said) != (own.native, self.prediction, False):
                raise ModelError(f"teacher {self.teacher} does not predict {self.prediction} on path.native",
                                 hint="give path.native and prediction as the teacher has them")
            return
        same = isinstance(path, VEPath) and (path.log_clock, path.sigma_data) == (own.log_clock, own.sigma_data)
        if not same or other.prediction != "edm":
            raise ModelError(f"teacher {self.teacher} is no EDM denoiser with log_clock {own.log_clock:g} and "
                             f"sigma_data {own.sigma_data:g}",
                             hint="--set path.log_clock and path.sigma_data, or take --preset emoji-distil")

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny"], "size": 16, "s0": 4, "s1": 16, "total": 20, "steps": 2},
        "emoji": _EMOJI | {"s1": 160, "total": 20_000, "level_mean": -0.4},
        "emoji-distil": _CD | _EMOJI | _OF_DIT,
        "emoji-edm": _CD | _EMOJI | {"path": {"sigma_data": 1.0, "visits": (0, 20)}},    # --set teacher=RUN
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
        "emoji-distil": _DISTIL | {"steps": 2500, "batch_size": 32, "optimizer": "muon", "muon_lr": 3e-3, "lr": 3e-4,
                                   "warmup": 20, "ema": 0.98, "save_every": 100},
        "emoji-edm": _DISTIL,
        "imagenet-64": {"steps": 600_000, "batch_size": 2048, "lr": 8e-6, "ema": 0.9999, "save_every": 10_000},
        "imagenet-64-ct": {"steps": 800_000, "batch_size": 2048, "lr": 1e-4, "ema": 0.9999, "save_every": 10_000},
    }
