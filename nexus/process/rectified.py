"""Rectified flow's own clock, its stochastic sampler, its inverse and how straight it runs. Liu et al. 2022,
arXiv:2209.03003.

A velocity is velocity(x [B, ...], t []) -> [B, ...], pointing to the data; t is 0 at the data, 1 at the noise.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from nexus.process import clocks, ode
from nexus.process.paths import RectifiedPath
from nexus.process.schedules import Grid, intervals
from nexus.process.solvers import estimate, wide

Velocity = Callable[[Tensor, Tensor], Tensor]


class StraightPath(RectifiedPath):
    """The paper's clock: the network is told s x 999, s from eps (noise) to 1 (data); its velocity points to the data.

    The published code tells its sampler's network the same s although the sampler's states go from 0 to 1, and trains
    it at states that are at s: `trained_at`. The 0.1 % between the two is kept, as its weights were made and judged so.
    """

    kind: Literal["straight"] = "straight"
    time_scale: float = 999.0

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """d alpha/ds, d sigma/ds of the paper's s = 1 - t."""
        return torch.ones_like(t), -torch.ones_like(t)

    def sample_t(self, n: int, rng: torch.Generator) -> Tensor:
        return clocks.warp(clocks.draw(self, n, rng), self.shift)

    def network_time(self, t: Tensor) -> Tensor:
        return ((1 - t) * (1 - self.eps) + self.eps) * self.time_scale

    def trained_at(self, t: Tensor) -> Tensor:
        """Where the state of training time t lies on the line from data (0) to noise (1)."""
        return t * (1 - self.eps)


class InstaFlowPath(RectifiedPath):
    """InstaFlow's clock, Stable Diffusion's: 1000 at the noise; but its velocity points to the data. Liu et al. 2023,
    arXiv:2309.06380."""

    kind: Literal["instaflow"] = "instaflow"
    rates = StraightPath.rates


def euler_sde(denoise, x: Tensor, grid: Grid, *, spread: float, noise=torch.randn_like, watch=None) -> Tensor:
    """Euler with fresh noise of (1 - s) x spread a unit of time, on a StraightPath; spread 0 is Euler.

    The drift is the published code's, which is to keep the marginals.
    """
    x = wide(x)
    for step in intervals(grid):
        x0 = estimate(denoise, x, step.t)
        velocity, s, dt = (x0 - x) / step.s, float(1 - grid.path.trained_at(step.t)), step.a1 - step.a
        drift = velocity + spread**2 / 4 * (s * (1 - s) * velocity - (2 - s) * x)
        x = x + dt * drift + (1 - s) * spread * math.sqrt(dt) * noise(x)
        if watch:
            watch(step.index, x, x0)
    return x


def invert(velocity: Velocity, x: Tensor, *, until: float = 1.0, steps: int = 50, method: str = "heun") -> Tensor:
    """The noise (or, at until < 1, the state on the way to it) that the flow carries to data x: the ODE backwards."""
    times = torch.linspace(0, until, steps + 1, dtype=torch.float64)
    return ode.integrate(lambda y, t: -velocity(y, t), x, times, method)


def straightness(velocity: Velocity, z0: Tensor, *, steps: int = 32) -> Tensor:
    """S(Z) an item [B]: mean over time and dimensions of |(Z_1 - Z_0) - dZ/dt|^2. Liu et al. 2022, section 2.2.

    0 exactly for straight paths, of which one Euler step is the whole flow; the paths are Euler's in `steps` steps.
    """
    x, speeds = z0, []
    for i in range(steps):
        speeds.append(velocity(x, torch.tensor(1 - i / steps, dtype=torch.float64)))
        x = x + speeds[-1] / steps
    return torch.stack([(x - z0 - v).square().flatten(1).mean(1) for v in speeds]).mean(0)
