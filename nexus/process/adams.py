"""Linear multistep samplers: one call a step, the slope extrapolated from up to four; contracts as in samplers.py.

Both integrate dy/dr = eps over y = x / alpha, r = sigma / alpha. From pure noise, where r is infinite, the first step
is DDIM's, and nothing is remembered of it.
"""

import numpy as np
from torch import Tensor

from nexus.process.schedules import Grid, Interval, intervals
from nexus.process.solvers import estimate, wide

ORDER = 4
# Adams and Bashforth's weights on equal steps, the newest slope first.
EQUAL = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


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
