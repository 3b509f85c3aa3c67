"""Noise processes x_t = alpha(t) x0 + sigma(t) eps: their clocks, training times and sampling times.

Every path has the same methods. t is the clock the network was trained with, and large t is noisy:
an index in [0, T) (discrete), 0 = data to 1 = noise (rectified, affine), sigma itself (VE).
at(t [...]) -> alpha, sigma [...], computed in float64 and returned in t's dtype;
rates(t) -> their derivatives along the network's clock, which define a velocity ("flow") target;
log_snr is log(alpha/sigma), t_of_log_snr its inverse; ends() -> the noisiest and the cleanest usable t;
sample_t(n, rng) -> training times [n] float32; times(steps) -> [steps] float64, descending, without the data point;
network_time(t) -> what the network is told.
"""

import math
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus.config import Config, not_above
from nexus.errors import UsageError
from nexus.process import clocks, edm

_SCALED = {"kind": "discrete", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
           "ends_at_first": True}


class DiscretePath(Config):
    """A chain of `steps` small noisings, variance preserving; fractional t interpolates log-SNR. Ho et al. 2020.

    snr_shift > 1 lowers the SNR everywhere (CogVideoX); zero_terminal_snr makes the last index pure noise
    (Lin et al. 2023); spacing, offset and open_end say which indices a shorter run visits.
    in_sigma: as diffusers' Euler, Heun and LMS have it, who think in sigma/alpha: "linspace" keeps its fractions,
    other schedules lie between the ends of the native one, and a run that is not "leading" begins at sigma times noise.
    """

    presets: ClassVar[dict[str, dict]] = {
        # Stable Diffusion visits every (1000 // steps)-th index, counted from 1.
        "stable-diffusion": _SCALED | {"spacing": "leading", "offset": 1},
        "stable-diffusion-even": _SCALED | {"spacing": "linspace", "offset": 0},
    }
    kind: Literal["discrete"] = "discrete"
    steps: int = Field(1000, ge=2)
    beta_schedule: Literal["linear", "scaled_linear", "cosine", "sqrt"] = "linear"
    beta_start: float = Field(1e-4, gt=0, lt=1)
    beta_end: float = Field(0.02, gt=0, lt=1)
    snr_shift: float = Field(1.0, gt=0)
    zero_terminal_snr: bool = False
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    offset: int = Field(0, ge=0)                    # added to "leading" indices; 1 for Stable Diffusion
    open_end: bool = False                          # spaced for one step more, without the cleanest index (diffusers'
                                                    # multistep solvers); "trailing" ends above 0 anyway
    in_sigma: bool = False
    ends_at_first: bool = False                     # ddim, pndm and sa-solver stop at index 0, not at the data

    def alpha_bar(self) -> Tensor:
        """alpha(t)^2 of every index: [T] float64, falling."""
        return _discrete(self)[0].square()

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, sigma at indices t, exactly the table's at whole ones."""
        alpha, sigma, _ = _discrete(self)
        lo, part = self._locate(t)
        lam, angle = self._between(lo, part)
        a = torch.where(lam.isfinite(), torch.sigmoid(2 * lam).sqrt(), angle.cos())
        s = torch.where(lam.isfinite(), torch.sigmoid(-2 * lam).sqrt(), angle.sin())
        for edge in (0, 1):
            table_a, table_s = (v.to(t.device)[lo + edge] for v in (alpha, sigma))
            a, s = torch.where(part == edge, table_a, a), torch.where(part == edge, table_s, s)
        return clocks.like(a, t), clocks.like(s, t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha/dt, d sigma/dt an index, of the interpolation."""
        alpha, sigma = self.at(t.double())
        lo, _ = self._locate(t)
        lam, angle = (v.to(t.device) for v in self._tables())
        turn = torch.where(lam[lo + 1].isfinite(), alpha * sigma * (lam[lo] - lam[lo + 1]), angle[lo + 1] - angle[lo])
        return clocks.like(-sigma * turn, t), clocks.like(alpha * turn, t)

    def t_of_log_snr(self, lam: Tensor) -> Tensor:
        """The fractional index with this log(alpha/sigma), clamped to the chain."""
        lam = lam.double()
        table, angle = (v.to(lam.device) for v in self._tables())
        lo = (torch.searchsorted(-table, -lam, right=True) - 1).clamp(0, self.steps - 2)
        want = torch.atan((-lam).exp())
        straight = (table[lo] - lam) / (table[lo] - table[lo + 1])
        turned = (want - angle[lo]) / (angle[lo + 1] - angle[lo])
        return lo + torch.where(table[lo + 1].isfinite(), straight, turned).clamp(0, 1)

    def ends(self) -> tuple[float, float]:
        return float(self.steps - 1), 0.0

    def uniform(self, steps: int) -> Tensor:
        return torch.linspace(self.steps - 1, 0, steps, dtype=torch.float64)

    def times(self, steps: int, *, schedule: str = "native", shape=None) -> Tensor:
        """The indices of a run; UsageError when native spacing is asked for more of them than there are."""
        if schedule != "native":
            ends = self.times(steps)[[0, -1]].tolist() if self.in_sigma and steps > 1 else None
            return clocks.spaced(self, steps, schedule, ends=ends)
        points = steps + (self.open_end and self.spacing != "trailing")
        if points > self.steps:
            raise UsageError(f"{steps} steps, but this model's noise chain has {self.steps - points + steps}",
                             hint=f"use --steps {self.steps - points + steps} or fewer, or another --schedule")
        i = torch.arange(points, dtype=torch.float64)
        if self.spacing == "trailing":
            back = (self.steps - self.steps / steps) - self.steps       # rounded as numpy's arange is: it decides ties
            return (self.steps + i * back).round() - 1
        if self.spacing == "linspace":              # closed: = space_timesteps of Nichol & Dhariwal 2021
            even = i.flip(0) * ((self.steps - 1) / steps) if points > steps else self.uniform(steps)
            return even[:steps] if self.in_sigma else even.round()[:steps]
        leading = i * (self.steps // points)
        return (leading + min(self.offset, self.steps - 1 - int(leading[-1]))).flip(0)[:steps]

    def start(self, sigma: float) -> float:
        """What noise is multiplied by where a run begins: chains are published with samplers that begin at it plain."""
        return sigma if self.in_sigma and self.spacing != "leading" else 1.0

    def sample_t(self, n: int, rng: torch.Generator) -> Tensor:
        return torch.randint(self.steps, (n,), generator=rng).float()

    def network_time(self, t: Tensor) -> Tensor:
        return t

    def _tables(self) -> tuple[Tensor, Tensor]:
        alpha, sigma, lam = _discrete(self)
        return lam, torch.atan2(sigma, alpha)

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.double().clamp(0, self.steps - 1)
        lo = t.floor().long().clamp(max=self.steps - 2)
        return lo, t - lo

    def _between(self, lo: Tensor, part: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(torch.lerp(v[lo], v[lo + 1], part) for v in (table.to(lo.device) for table in self._tables()))


class RectifiedPath(Config):
    """A straight line from data (t=0) to noise (t=1). Liu et al. 2022; Lipman et al. 2022; Esser et al. 2024.

    shift > 1 moves both training and sampling times towards noise (SD3, eq. 23). dynamic_shift (low, high) makes it
    exp of a line through 256 and 4096 tokens of 2x2 latent pixels instead, for sampling (FLUX: 0.5, 1.15).
    """

    kind: Literal["rectified"] = "rectified"
    shift: float = Field(1.0, gt=0)
    dynamic_shift: tuple[float, float] | None = None
    time_sampling: Literal["uniform", "logit-normal", "mode", "cosmap"] = "uniform"
    time_mean: float = 0.0                          # of logit-normal
    time_std: float = Field(1.0, gt=0)
    mode_scale: float = Field(1.29, ge=0)           # of mode, SD3 eq. 20
    time_scale: float = Field(1000.0, gt=0)
    eps: float = Field(1e-3, gt=0, lt=1)            # the cleanest time trained at

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def t_of_log_snr(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam.double())

    def ends(self) -> tuple[float, float]:
        return 1.0, self.eps

    def uniform(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]

    def times(self, steps: int, *, schedule: str = "native", shape=None) -> Tensor:
        """Native: uniform, then shifted; shape (C, H, W) of the latent decides a dynamic shift."""
        if schedule != "native":
            return clocks.spaced(self, steps, schedule)
        return clocks.warp(self.uniform(steps), self._shift(shape))

    def sample_t(self, n: int, rng: torch.Generator) -> Tensor:
        t = clocks.draw(self, n, rng)
        return clocks.warp(t, self.shift).clamp(min=self.eps)

    def network_time(self, t: Tensor) -> Tensor:
        return t * self.time_scale

    def _shift(self, shape) -> float:
        if self.dynamic_shift is None or shape is None:
            return self.shift
        low, high = self.dynamic_shift
        tokens = shape[-2] * shape[-1] / 4
        return math.exp(low + (high - low) * (tokens - 256) / (4096 - 256))


class VEPath(Config):
    """x_t = x0 + t eps; t is the noise's standard deviation, sigma. Karras et al. 2022 (EDM).

    log_clock 0: the network is told sigma itself; otherwise log_clock ln(sigma): 0.25 in EDM, 250 in the teachers of
    consistency models. sigma_data: the data's standard deviation, which the "edm" prediction scales by.
    """

    kind: Literal["ve"] = "ve"
    sigma_min: float = Field(0.002, gt=0)
    sigma_max: float = Field(80.0, gt=0)
    rho: float = Field(7.0, gt=0)
    p_mean: float = -1.2
    p_std: float = Field(1.2, gt=0)
    sigma_data: float = Field(edm.SIGMA_DATA, gt=0)
    _ordered = not_above("sigma_min", "sigma_max")
    log_clock: float = Field(0.0, ge=0)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.ones_like(t)

    def t_of_log_snr(self, lam: Tensor) -> Tensor:
        return (-lam.double()).exp()

    def ends(self) -> tuple[float, float]:
        return self.sigma_max, self.sigma_min

    def uniform(self, steps: int) -> Tensor:
        return torch.linspace(self.sigma_max, self.sigma_min, steps, dtype=torch.float64)

    def times(self, steps: int, *, schedule: str = "native", shape=None) -> Tensor:
        """Native: Karras et al. 2022, eq. 5."""
        return clocks.spaced(self, steps, "karras" if schedule == "native" else schedule, rho=self.rho)

    def sample_t(self, n: int, rng: torch.Generator) -> Tensor:
        return edm.draw_sigmas(n, rng, self.p_mean, self.p_std)

    def network_time(self, t: Tensor) -> Tensor:
        return 4 * self.log_clock * edm.c_noise(t) if self.log_clock else t


class AffinePath(Config):
    """Flow matching's affine paths, by scheduler. Lipman et al. 2022 and 2024.

    The papers' clock s runs from noise (0) to data (1); here t = 1 - s, so that noise is at large t as everywhere.
    The network still sees the paper's s (times time_scale), and `rates` are d/ds: a velocity points to the data.
    sigma_min is condot's noise left at the data; degree is polynomial's power.
    """

    kind: Literal["affine"] = "affine"
    scheduler: Literal["condot", "vp", "linear-vp", "cosine", "polynomial"] = "condot"
    sigma_min: float = Field(0.0, ge=0, lt=1)
    beta_min: float = Field(0.1, gt=0)
    beta_max: float = Field(20.0, gt=0)
    degree: float = Field(2.0, ge=1)
    time_sampling: Literal["uniform", "logit-normal", "mode", "cosmap"] = "uniform"
    time_mean: float = 0.0                          # of logit-normal; -1.2, 1.2 are EDM's
    time_std: float = Field(1.0, gt=0)
    mode_scale: float = Field(1.29, ge=0)
    time_scale: float = Field(1.0, gt=0)
    eps: float = Field(1e-3, gt=0, lt=1)

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma, _, _ = self._curves(t.double())
        return clocks.like(alpha, t), clocks.like(sigma, t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha/ds, d sigma/ds of the paper's clock s = 1 - t."""
        _, _, d_alpha, d_sigma = self._curves(t.double())
        return clocks.like(d_alpha, t), clocks.like(d_sigma, t)

    def t_of_log_snr(self, lam: Tensor) -> Tensor:
        lam = lam.double()
        if self.scheduler == "condot":
            return 1 - 1 / ((-lam).exp() + 1 - self.sigma_min)
        if self.scheduler == "cosine":
            return 1 - torch.atan(lam.exp()) * (2 / math.pi)
        if self.scheduler == "polynomial":
            return 1 - torch.sigmoid(lam) ** (1 / self.degree)
        if self.scheduler == "linear-vp":
            return 1 - torch.sigmoid(2 * lam).sqrt()
        half, slope = self.beta_min / 2, (self.beta_max - self.beta_min) / 4
        log_alpha = 0.5 * torch.nn.functional.logsigmoid(2 * lam)
        return (half * half - 4 * slope * log_alpha).sqrt().sub(half) / (2 * slope)     # slope t^2 + half t = -log a

    def ends(self) -> tuple[float, float]:
        # at s = 0 a polynomial of degree > 1 stands still: its velocity there says nothing about x0
        still = self.scheduler == "polynomial" and self.degree > 1
        return 1 - self.eps if still else 1.0, self.eps

    def uniform(self, steps: int) -> Tensor:
        return torch.linspace(self.ends()[0], 0, steps + 1, dtype=torch.float64)[:-1]

    def times(self, steps: int, *, schedule: str = "native", shape=None) -> Tensor:
        return self.uniform(steps) if schedule == "native" else clocks.spaced(self, steps, schedule)

    def sample_t(self, n: int, rng: torch.Generator) -> Tensor:
        return clocks.draw(self, n, rng).clamp(min=self.eps)

    def network_time(self, t: Tensor) -> Tensor:
        return (1 - t) * self.time_scale

    def _curves(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s = 1 - t
        if self.scheduler == "condot":
            keep = 1 - self.sigma_min
            return s, t + self.sigma_min * s, torch.ones_like(t), torch.full_like(t, -keep)
        if self.scheduler == "polynomial":
            alpha, d_alpha = s ** self.degree, self.degree * s ** (self.degree - 1)
            return alpha, 1 - alpha, d_alpha, -d_alpha
        if self.scheduler == "cosine":
            angle, turn = s * (math.pi / 2), math.pi / 2
            return angle.sin(), (t * turn).sin(), turn * angle.cos(), -turn * angle.sin()
        if self.scheduler == "linear-vp":
            sigma = (t * (1 + s)).sqrt()
            return s, sigma, torch.ones_like(t), -s / sigma
        slope = self.beta_max - self.beta_min
        log_alpha = -0.25 * t * t * slope - 0.5 * t * self.beta_min
        alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        d_alpha = alpha * (0.5 * t * slope + 0.5 * self.beta_min)
        return alpha, sigma, d_alpha, -alpha * d_alpha / sigma


AnyPath = Annotated[DiscretePath | RectifiedPath | VEPath | AffinePath, Field(discriminator="kind")]


@lru_cache(maxsize=32)
def _discrete(path: DiscretePath) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma, log-SNR [T] of a chain, float64."""
    alpha_bar = torch.cumprod(1 - _betas(path), 0)
    alpha_bar = alpha_bar / (path.snr_shift + (1 - path.snr_shift) * alpha_bar)
    if path.zero_terminal_snr:                                          # Lin et al. 2023, alg. 1
        root = alpha_bar.sqrt()
        alpha_bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), 0.5 * (alpha_bar.log() - torch.log1p(-alpha_bar))


def _betas(path: DiscretePath) -> Tensor:
    start, end = path.beta_start, path.beta_end
    u = torch.linspace(0, 1, path.steps, dtype=torch.float64)
    if path.beta_schedule == "linear":
        return start + (end - start) * u
    if path.beta_schedule == "scaled_linear":                           # Stable Diffusion
        return (start ** 0.5 + (end ** 0.5 - start ** 0.5) * u).square()
    edges = torch.arange(path.steps + 1, dtype=torch.float64) / path.steps
    if path.beta_schedule == "cosine":                                  # Nichol & Dhariwal 2021, eq. 17
        curve = torch.cos((edges + 0.008) / 1.008 * (math.pi / 2)).square()
    else:                                                               # Li et al. 2022 (Diffusion-LM), appendix A
        curve = 1 - (edges + 1e-4).sqrt()
    return (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
