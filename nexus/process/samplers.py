"""Samplers by name, and the one-step ones: pure functions (denoise, x at grid[0], grid) -> x0.

None knows a network, a prompt or a codec. denoise(x, t) -> x0; noise(x) -> fresh Gaussian noise of x's shape;
watch(i, x, x0) is called after step i. All work on any path through alpha and sigma, at alpha = 0 too; arithmetic is
in x's dtype, float32 at least, whatever the denoiser computes in.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nexus.errors import UsageError
from nexus.process.adams import lms, pndm, sa_solver
from nexus.process.predictions import Estimate, x0_part
from nexus.process.schedules import Grid, intervals
from nexus.process.solvers import (
    dopri5,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_3m_sde,
    estimate,
    heun,
    midpoint,
    rk4,
    unipc,
    wide,
)


def ddim(denoise, x: Tensor, grid: Grid, *, eta: float = 0.0, noise=torch.randn_like, watch=None) -> Tensor:
    """eta = 0: DDIM. eta = 1: DDPM's posterior with the small variance. Song et al. 2020, eq. 12."""
    x = wide(x)
    for i, t, a, s, _, a1, s1 in intervals(grid):
        x0 = estimate(denoise, x, t)
        up = eta * posterior_std(a, s, a1, s1)
        keep = math.sqrt(max(s1 * s1 - up * up, 0.0)) / s
        x = keep * x + (a1 - a * keep) * x0
        if up > 0:
            x = x + up * noise(x)
        if watch:
            watch(i, x, x0)
    return x


def euler(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """Euler in sigma/alpha, which is DDIM; on a rectified path also Euler in t. Karras et al. 2022."""
    return ddim(denoise, x, grid, watch=watch)


def euler_ancestral(denoise, x: Tensor, grid: Grid, *, eta: float = 1.0, noise=torch.randn_like, watch=None):
    """Euler with fresh noise, as DDIM's eta does it. Song et al. 2020; k-diffusion's name."""
    return ddim(denoise, x, grid, eta=eta, noise=noise, watch=watch)


def ddpm(denoise, x: Tensor, grid: Grid, *, variance: str = "small", noise=torch.randn_like, watch=None) -> Tensor:
    """Ancestral sampling with the posterior of the chain that the grid visits. Ho et al. 2020, alg. 2.

    variance: "small" (the posterior's) or "large" (beta); where denoise is an `estimator` that returns an Estimate,
    the network's own, between the two. Nichol & Dhariwal 2021, eq. 15.
    """
    x = wide(x)
    for i, t, a, s, _, a1, s1 in intervals(grid):
        result = denoise(x, t)
        x0 = x0_part(result).to(x)
        small = posterior_std(a, s, a1, s1)
        keep = math.sqrt(max(s1 * s1 - small * small, 0.0)) / s
        x = keep * x + (a1 - a * keep) * x0
        if small > 0:
            large = math.sqrt(s * s - (a * s1 / a1) ** 2)
            if isinstance(result, Estimate):
                std = (math.log(small) + result.fraction.to(x) * math.log(large / small)).exp()
            else:
                std = large if variance == "large" else small
            x = x + std * noise(x)
        if watch:
            watch(i, x, x0)
    return x


def posterior_std(a: float, s: float, a1: float, s1: float) -> float:
    """Standard deviation of x at (a1, s1) given x at (a, s) and x0; s1 at pure noise, 0 at the data."""
    return s1 * math.sqrt(max(1 - (a * s1 / (a1 * s)) ** 2, 0.0))


SAMPLERS: dict[str, Callable] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler-a": euler_ancestral,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "dopri5": dopri5,
    "dpmpp-2m": dpmpp_2m,
    "dpmpp-2m-sde": dpmpp_2m_sde,
    "dpmpp-3m-sde": dpmpp_3m_sde,
    "unipc": unipc,
    "lms": lms,
    "pndm": pndm,
    "sa-solver": sa_solver,
}
ENDS_AT_FIRST = frozenset({"ddim", "pndm", "sa-solver"})        # where a path says so (DiscretePath.ends_at_first)
TAKES_ETA = frozenset({"ddim", "euler-a", "dpmpp-2m-sde", "dpmpp-3m-sde", "sa-solver"})
TAKES_NOISE = TAKES_ETA | {"ddpm"}


def check_sampler(name: str, eta: float | None) -> None:
    """UsageError for an unknown sampler, or an eta where there is none to set."""
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler '{name}'", hint="samplers: " + ", ".join(SAMPLERS))
    if eta is not None and name not in TAKES_ETA:
        raise UsageError(f"sampler '{name}' has no eta", hint="eta works with " + ", ".join(sorted(TAKES_ETA)))


def sample(name: str, denoise, x: Tensor, grid: Grid, *, eta: float | None = None, noise=torch.randn_like,
           watch=None, **options) -> Tensor:
    """Run a sampler by name; raises as `check_sampler` does.

    options: ddpm's variance, dopri5's rtol and atol.
    """
    check_sampler(name, eta)
    if name in TAKES_NOISE:
        options["noise"] = noise
    if eta is not None:
        options["eta"] = eta
    return SAMPLERS[name](denoise, x, grid, watch=watch, **options)
