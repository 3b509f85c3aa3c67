"""The times of one sampling run as a grid from noise to data."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """N+1 times from noise to data, closed by the data point (alpha 1, sigma 0), float64 on the CPU.

    t [N+1]: the path's clock; alpha, sigma [N+1]. path serves the solvers that look between the points.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    path: Any = None

    @property
    def steps(self) -> int:
        return len(self.t) - 1


class Interval(NamedTuple):
    """One step of a run, from (t, a, s) to (t1, a1, s1), as plain numbers; t, t1 are 0-dim float64 tensors."""

    index: int
    t: Tensor
    a: float
    s: float
    t1: Tensor
    a1: float
    s1: float


def grid(path, times: Tensor, *, to_data: bool = True) -> Grid:
    """Times [N], noisy first, closed by the data point; without `to_data` by the path's own time 0."""
    times = times.double().cpu()
    alpha, sigma = path.at(times)
    end = times.new_zeros(1)
    last_alpha, last_sigma = (end + 1, end) if to_data else path.at(end)
    return Grid(torch.cat([times, end]), torch.cat([alpha, last_alpha]), torch.cat([sigma, last_sigma]), path)


def tail(grid: Grid, strength: float) -> Grid:
    """The last `strength` (0 to 1) of a run's steps, for a run that starts from a noised picture (SDEdit).

    A part of a step is none, as in diffusers. Strength 0 leaves the data point alone: a run of no steps.
    """
    start = grid.steps - int(grid.steps * min(max(strength, 0.0), 1.0))
    return Grid(grid.t[start:], grid.alpha[start:], grid.sigma[start:], grid.path)


def intervals(grid: Grid) -> Iterator[Interval]:
    """The run's steps in order."""
    alpha, sigma = grid.alpha.tolist(), grid.sigma.tolist()
    for i in range(grid.steps):
        yield Interval(i, grid.t[i], alpha[i], sigma[i], grid.t[i + 1], alpha[i + 1], sigma[i + 1])


def log_snr(a: float, s: float) -> float:
    """log(alpha/sigma): +inf at data, -inf at pure noise."""
    a, s = torch.tensor(a, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)
    return (a.log() - s.log()).item()
