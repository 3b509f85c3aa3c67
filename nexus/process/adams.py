"""Linear multistep samplers: one call a step, what is past goes into it; contracts as in samplers.py.

LMS and PNDM integrate dy/dr = eps over y = x / alpha, r = sigma / alpha, the slope extrapolated from up to four;
SA-Solver integrates x0 over log(alpha / sigma). From pure noise, where either end is infinite, the first step is
DDIM's, and nothing is remembered of it.
"""

import math

import numpy as np
import torch
from torch import Tensor

from nexus.process.schedules import Grid, Interval, intervals
from nexus.process.solvers import estimate, log_length, path_of, wide

ORDER = 4
# Adams and Bashforth's weights on equal steps, the newest slope first.
EQUAL = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

# Where SA-Solver adds noise: shares of the path's noisiest time, as PixArt and diffusers have it (200 to 800 of 1000).
NOISY = (0.2, 0.801)


def lms(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """Adams and Bashforth's method on the run's own steps in sigma/alpha, order 4. k-diffusion's name."""
    x, slopes, places = wide(x), [], []
    for step in intervals(grid):
        x0 = estimate(denoise, x, step.t)
        if step.a == 0:
            x = step.a1 * x0 + step.s1 / step.s * x
        else:
            slopes, places = [_eps(step, x, x0), *slopes][:ORDER], [step.s / step.a, *places][:ORDER]
            weights = _weights(places, step.s1 / step.a1)
            x = step.a1 * (x / step.a + sum(w * e for w, e in zip(weights, slopes, strict=True)))
        if watch:
            watch(step.index, x, x0)
    return x


def pndm(denoise, x: Tensor, grid: Grid, *, watch=None) -> Tensor:
    """PLMS, as Stable Diffusion 1 was published with: weights as if all steps were equal, after one step of Heun.

    Liu et al. 2022, arXiv:2202.09778, without the Runge-Kutta steps that it begins with; N + 1 calls.
    """
    x, slopes = wide(x), []
    for step in intervals(grid):
        x0 = estimate(denoise, x, step.t)
        if step.a == 0:
            x = step.a1 * x0 + step.s1 / step.s * x
        else:
            slopes = [_eps(step, x, x0), *slopes][:ORDER]
            weights = EQUAL[len(slopes) - 1]
            slope = sum(w * e for w, e in zip(weights, slopes, strict=True))
            if len(slopes) == 1 and step.s1 > 0 and grid.steps > 1:
                guess = _along(step, x, slope)
                slope = (slope + (guess - step.a1 * estimate(denoise, guess, step.t1)) / step.s1) / 2
            x = _along(step, x, slope)
        if watch:
            watch(step.index, x, x0)
    return x


def sa_solver(denoise, x: Tensor, grid: Grid, *, eta: float = 1.0, noise=torch.randn_like, watch=None) -> Tensor:
    """SA-Solver, predictor and corrector of two steps each, in their forms for few steps. Xue et al. 2023.

    arXiv:2309.05019. eta is the paper's tau, in the middle of the noise (`NOISY`); elsewhere no noise is added. The
    noise of a step stands in its prediction and in its correction, which the next call of denoise brings.
    """
    noisiest, _ = path_of(grid).ends()
    x, before, old, lift, width = wide(x), None, None, 0.0, math.inf
    for step in intervals(grid):
        x0, h = estimate(denoise, x, step.t), log_length(step)
        if math.isfinite(width):
            x = before + lift * (x0 - old)
        tau = eta if NOISY[0] <= step.t.item() / noisiest <= NOISY[1] and step.s1 > 0 else 0.0
        grow = 1 + tau * tau
        before = step.s1 / step.s * math.exp(-tau * tau * h if tau else 0.0) * x - step.a1 * math.expm1(-grow * h) * x0
        if tau:
            before = before + step.s1 * math.sqrt(-math.expm1(-2 * tau * tau * h)) * noise(x)
        lift = step.a1 * grow * h / 2
        x = before
        if old is not None and math.isfinite(width) and step.index < grid.steps - 1:
            x = x + lift * h / width * (x0 - old)
        old, width = x0, h
        if watch:
            watch(step.index, x, x0)
    return x


def _eps(step: Interval, x: Tensor, x0: Tensor) -> Tensor:
    return (x - step.a * x0) / step.s


def _along(step: Interval, x: Tensor, slope: Tensor) -> Tensor:
    """x at the interval's end, under one slope dy/dr."""
    return step.a1 / step.a * x + (step.s1 - step.a1 * step.s / step.a) * slope


def _weights(places: list[float], end: float) -> list[float]:
    """Of each slope: the integral, from the newest place to `end`, of the polynomial that is 1 there, 0 elsewhere."""
    scale = places[0]           # so that the powers stay near 1
    nodes, found = np.array(places) / scale, []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        primitive = np.polynomial.Polynomial(np.polynomial.polynomial.polyfromroots(others)).integ()
        found.append(float((primitive(end / scale) - primitive(1.0)) / np.prod(node - others) * scale))
    return found
