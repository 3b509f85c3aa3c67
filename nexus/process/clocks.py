"""Arithmetic on times that every path shares: spreading them over a run, warping, drawing training times."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nexus.errors import UsageError
from nexus.process import edm

PURE_NOISE = 1e3        # the sigma/alpha that stands for infinity when a schedule needs a finite one


def like(v: Tensor, t: Tensor) -> Tensor:
    """v in t's floating dtype; float32 for integer t."""
    return v.to(t.dtype if t.is_floating_point() else torch.float32)


def warp(t: Tensor, shift: float) -> Tensor:
    """t in [0, 1] moved towards 1 for shift > 1. Esser et al. 2024 (SD3), eq. 23."""
    return shift * t / (shift * t + (1 - t))        # written so that 1 stays 1 exactly


def spaced(path, steps: int, schedule: str, *, rho: float = 7.0, ends: Sequence[float] | None = None) -> Tensor:
    """Times [steps] float64, noisy first, from path's noisiest time; UsageError for an unknown schedule.

    linear: evenly in t. shifted: linear, warped by the path's shift, or 3 (SD3's) where it has none.
    karras: evenly in (sigma/alpha)^(1/rho) (Karras et al. 2022, eq. 5). log-snr and exponential are one thing under
    two names: evenly in log(alpha/sigma) (Lu et al. 2022), a geometric series of sigma/alpha (k-diffusion).
    ends: its noisiest and cleanest time, None = the path's.
    """
    noise, data = ends or path.ends()
    if schedule == "linear":
        return path.uniform(steps)
    if schedule == "shifted":
        shift = getattr(path, "shift", 1.0)
        return noise * warp(path.uniform(steps) / noise, shift if shift != 1 else 3.0)
    alpha, sigma = path.at(torch.tensor([noise, data], dtype=torch.float64))
    most, least = (sigma / alpha).clamp(max=PURE_NOISE).tolist()
    if schedule == "karras":
        log_ratio = edm.karras_sigmas(steps, least, most, rho).log()
    elif schedule in ("log-snr", "exponential"):
        log_ratio = torch.linspace(math.log(most), math.log(least), steps, dtype=torch.float64)
    else:
        raise UsageError(f"unknown schedule '{schedule}'",
                         hint="schedules: native, linear, karras, exponential, log-snr, shifted")
    t = path.t_of_log_snr(-log_ratio)
    t[0] = noise                                    # a run starts at the noise exactly
    return t


def draw(path, n: int, rng: torch.Generator) -> Tensor:
    """Training times [n] in [0, 1], 1 = noise, by path.time_sampling. Esser et al. 2024, section 3.1."""
    if path.time_sampling == "logit-normal":
        return torch.sigmoid(torch.randn(n, generator=rng) * path.time_std + path.time_mean)
    u = torch.rand(n, generator=rng)
    if path.time_sampling == "mode":                                    # eq. 20
        return 1 - u - path.mode_scale * ((math.pi / 2 * u).cos().square() - 1 + u)
    if path.time_sampling == "cosmap":                                  # eq. 21
        return 1 - 1 / ((math.pi / 2 * u).tan() + 1)
    return u
