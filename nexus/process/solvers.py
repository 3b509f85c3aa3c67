"""Higher-order samplers: Heun, Runge-Kutta, DPM-Solver++, UniPC; contracts as in samplers.py.

Runge-Kutta integrates y = x / (alpha + sigma) in w = sigma / (alpha + sigma): every path becomes the rectified one,
dy/dw = (y - x0) / w, which is well conditioned from pure noise (w = 1) to the data (w = 0).
"""

import math

import torch
from torch import Tensor

from nexus.errors import InputError
from nexus.process import ode
from nexus.process.predictions import over, x0_part
from nexus.process.schedules import Grid, Interval, intervals, log_snr


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: what samplers compute in."""
    return x if x.dtype == torch.float64 else x.float()


def estimate(denoise, x: Tensor, t: Tensor) -> Tensor:
    """denoise's x0 in x's dtype."""
    return x0_part(denoise(x, t)).to(x)


def heun(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """Two calls a step, one on the last. Karras et al. 2022, alg. 1.

    It is the trapezoid rule in sigma/alpha; where a run starts at pure noise (sigma/alpha infinite), in
    sigma/(alpha + sigma) instead, which on a rectified path is t.
    """
    x = wide(x)
    lean = 1.0 if grid.alpha[0] == 0 else 0.0       # y = x / (alpha + lean sigma), w = sigma / (alpha + lean sigma)
    for i, t, a, s, t1, a1, s1 in intervals(grid):
        x0 = estimate(denoise, x, t)
        y = s1 / s * x + (a1 - a * s1 / s) * x0
        if s1 > 0:
            size, size1 = a + lean * s, a1 + lean * s1
            w, w1 = s / size, s1 / size1
            slope = (x / size - x0) / w + (y / size1 - estimate(denoise, y, t1)) / w1
            y = size1 * (x / size + (w1 - w) / 2 * slope)
        x = y
        if watch:
            watch(i, x, x0)
    return x


def midpoint(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """The explicit midpoint rule: order 2, two calls a step."""
    return _runge_kutta(denoise, x, grid, ode.MIDPOINT, watch)


def rk4(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """Kutta's 3/8 rule: order 4, four calls a step; three on the last (see ode.HEUN3)."""
    return _runge_kutta(denoise, x, grid, ode.RK4, watch)


def dopri5(denoise, x: Tensor, grid: Grid, *, rtol: float = 1e-4, atol: float = 1e-4, watch=None) -> Tensor:
    """Dormand & Prince 1980, order 5 with step control an item; of the grid it uses the ends alone.

    Items step apart from one another, so denoise is called with t [B]. The last hair's breadth, from the path's
    cleanest time to the data, is one Euler step.
    """
    x = wide(x)
    if grid.steps == 0:
        return x
    path = path_of(grid)
    first = next(intervals(grid))
    start, end = first.s / (first.a + first.s), _w(path, torch.tensor(path.ends()[1], dtype=torch.float64)).item()
    last = x

    def velocity(y, w):
        nonlocal last
        t, size, w = _locate(path, w)
        last = estimate(denoise, y * over(size, y).to(y), t)
        return (y - last) / over(w, y).to(y)

    def progress(done):
        if watch:
            watch(min(int(done * grid.steps), grid.steps - 1), last, last)

    y = x / (first.a + first.s)
    if start > end:
        y = ode.dopri5(velocity, y, start, end, rtol=rtol, atol=atol, progress=progress)
    w = torch.full((len(y),), min(start, end), dtype=torch.float64)
    t, size, _ = _locate(path, w)
    return estimate(denoise, y * over(size, y).to(y), t)


def dpmpp_2m(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """DPM-Solver++(2M): order 2, one call a step, remembers the last x0. Lu et al. 2022, alg. 2."""
    return dpmpp_2m_sde(denoise, x, grid, eta=0.0, watch=watch)


def dpmpp_2m_sde(denoise, x: Tensor, grid: Grid, *, eta: float = 1.0, noise=torch.randn_like, watch=None) -> Tensor:
    """SDE-DPM-Solver++(2M), midpoint form; eta scales the noise. Lu et al. 2022, appendix."""
    return _dpmpp(denoise, x, grid, 2, eta, noise, watch)


def dpmpp_3m_sde(denoise, x: Tensor, grid: Grid, *, eta: float = 1.0, noise=torch.randn_like, watch=None) -> Tensor:
    """DPM-Solver++(3M) with noise, with the coefficients of Lu et al.'s code and k-diffusion.

    They take half of the curvature that Taylor asks for, so the order stays 2; kept, as that is what others compute.
    """
    return _dpmpp(denoise, x, grid, 3, eta, noise, watch)


def unipc(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """UniPC of order 2 with B2(h): one call a step, which also corrects the step before. Zhao et al. 2023, alg. 5-8."""
    x, before, anchor, old, older = wide(x), None, None, None, None
    for step in intervals(grid):
        x0 = estimate(denoise, x, step.t)
        if before is not None and math.isfinite(log_length(before)):
            x = _unipc_step(before, anchor, old, older, x0)
        known = before is not None and step.s1 > 0 and math.isfinite(log_length(before))
        older = (old, log_length(before) / log_length(step)) if known else None
        before, anchor, old = step, x, x0
        x = _unipc_step(step, x, x0, older)
        if watch:
            watch(step.index, x, x0)
    return x


def _unipc_step(step: Interval, x: Tensor, x0: Tensor, older, new: Tensor | None = None) -> Tensor:
    """From x along one interval. older: (x0 before this one, ratio of its step to this); new: x0 at the far end."""
    h = log_length(step)
    b = math.expm1(-h)                              # B2(h), and phi_1
    change = x0 * 1.0
    slope = None if older is None else (x0 - older[0]) / older[1]
    if new is None:
        if slope is not None:
            change = change + slope / 2
    elif slope is None:
        change = change + (new - x0) / 2
    else:
        phi2 = b / -h - 1
        right = (phi2 / b, (phi2 / -h - 0.5) * 2 / b)
        r = -older[1]                               # R rho = b for nodes r and 1
        past = (right[0] - right[1]) / (1 - r)
        change = change + past * slope + (right[0] - past) * (new - x0)
    return step.s1 / step.s * x - step.a1 * b * change


def _dpmpp(denoise, x: Tensor, grid: Grid, order: int, eta: float, noise, watch) -> Tensor:
    x = wide(x)
    past: list[tuple[Tensor, float]] = []           # (x0, length of the step it began), newest first
    for step in intervals(grid):
        i, t, _, s, _, a1, s1 = step
        x0, h = estimate(denoise, x, t), log_length(step)
        grow = h * (1 + eta)
        x = s1 / s * math.exp(-eta * h if eta else 0.0) * x - a1 * math.expm1(-grow) * x0
        if past and s1 > 0:
            x = x + a1 * _dpmpp_correction(x0, past, h, grow, order)
        if eta and s1 > 0:
            x = x + s1 * math.sqrt(-math.expm1(-2 * eta * h)) * noise(x)
        past = [(x0, h), *past][:order - 1] if math.isfinite(h) else []
        if watch:
            watch(i, x, x0)
    return x


def _dpmpp_correction(x0: Tensor, past, h: float, grow: float, order: int) -> Tensor:
    old, h1 = past[0]
    slope = (x0 - old) * (h / h1)
    if order == 2:
        return -math.expm1(-grow) / 2 * slope
    phi2 = math.expm1(-grow) / grow + 1
    if len(past) == 1:
        return phi2 * slope
    older, h2 = past[1]
    bend = (slope - (old - older) * (h / h2)) * (h / (h1 + h2))
    return phi2 * (slope + bend * (h1 / h)) - (phi2 / grow - 0.5) * bend


def log_length(step: Interval) -> float:
    """The step's length in log(alpha/sigma); infinite from pure noise or to the data."""
    return log_snr(step.a1, step.s1) - log_snr(step.a, step.s)


def _runge_kutta(denoise, x: Tensor, grid: Grid, tableau: ode.Tableau, watch) -> Tensor:
    x = wide(x)
    for step in intervals(grid):
        x, x0 = _runge_kutta_step(denoise, x, step, path_of(grid), tableau)
        if watch:
            watch(step.index, x, x0)
    return x


def _runge_kutta_step(denoise, x: Tensor, step: Interval, path, tableau: ode.Tableau) -> tuple[Tensor, Tensor]:
    size, size1 = step.a + step.s, step.a1 + step.s1
    w, w1 = step.s / size, step.s1 / size1
    if w1 == 0 and tableau.nodes[-1] == 1:          # x0 at the data tells no velocity
        tableau = ode.HEUN3
    inner = torch.tensor([w + c * (w1 - w) for c in tableau.nodes[1:] if c < 1], dtype=torch.float64)
    t, inner_size, reached = _locate(path, inner)
    if not torch.allclose(reached, inner, rtol=1e-6, atol=0):       # beyond the cleanest time there is: Euler
        x0 = estimate(denoise, x, step.t)
        return step.s1 / step.s * x + (step.a1 - step.a * step.s1 / step.s) * x0, x0
    points = [(step.t, size, w), *zip(t, inner_size.tolist(), inner.tolist(), strict=True), (step.t1, size1, w1)]
    first = None

    def velocity(y, stage):
        nonlocal first
        t, size, w = points[stage]
        x0 = estimate(denoise, y * size, t)
        first = x0 if first is None else first
        return (y - x0) / w

    return size1 * ode.step(velocity, x / size, w1 - w, tableau), first


def _locate(path, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The path's t, alpha + sigma and w itself (float64) nearest to w; w is 1 at pure noise."""
    w = w.double()
    noisy = torch.tensor(path.ends()[0], dtype=torch.float64)
    t = torch.where(w >= 1, noisy, path.t_of_log_snr(torch.log1p(-w.clamp(max=1 - 1e-15)) - w.log()))
    alpha, sigma = path.at(t)
    return t, alpha + sigma, sigma / (alpha + sigma)


def _w(path, t: Tensor) -> Tensor:
    alpha, sigma = path.at(t)
    return sigma / (alpha + sigma)


def path_of(grid: Grid):
    """The path behind a grid; InputError for one that was put together by hand."""
    if grid.path is None:
        raise InputError("this sampler asks the path behind the grid, and the grid has no path",
                         hint="build the grid with nexus.process.schedules.grid")
    return grid.path
