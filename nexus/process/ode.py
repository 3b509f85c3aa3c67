"""Runge-Kutta for dy/dw = f: explicit steps from a tableau, and Dormand-Prince with step control an item."""

from typing import NamedTuple

import torch
from torch import Tensor

from nexus.errors import NexusError


class Tableau(NamedTuple):
    """An explicit method: stage k is at nodes[k], from rows[k] . stages; the step is weights . stages."""

    nodes: tuple[float, ...]
    rows: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]


EULER = Tableau((0.0,), ((),), (1.0,))
MIDPOINT = Tableau((0.0, 1 / 2), ((), (1 / 2,)), (0.0, 1.0))
HEUN2 = Tableau((0.0, 1.0), ((), (1.0,)), (1 / 2, 1 / 2))
# Order 3 with no stage at the far end, so that a last step onto the data keeps a fourth-order run fourth order.
HEUN3 = Tableau((0.0, 1 / 3, 2 / 3), ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4))
# Kutta 1901, the 3/8 rule.
RK4 = Tableau((0.0, 1 / 3, 2 / 3, 1.0), ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8))
# Dormand & Prince 1980: order 5, the last stage is the next step's first.
DOPRI5 = Tableau(
    (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    ((), (1 / 5,), (3 / 40, 9 / 40), (44 / 45, -56 / 15, 32 / 9),
     (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
     (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
     (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0))
_FOURTH = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
METHODS = {"euler": EULER, "heun": HEUN2, "midpoint": MIDPOINT, "heun3": HEUN3, "rk4": RK4}


def step(f, y: Tensor, h, tableau: Tableau) -> Tensor:
    """One step of length h; f(y, k) is the slope at stage k."""
    stages = []
    for k, row in enumerate(tableau.rows):
        stages.append(f(_advance(y, h, row, stages), k))
    return _advance(y, h, tableau.weights, stages)


def integrate(f, y: Tensor, w: Tensor, method: str = "rk4") -> Tensor:
    """y at w[-1] from y at w[0], one step an interval of w [N+1]; f(y, w []) is the slope."""
    tableau = METHODS[method]
    for start, h in zip(w[:-1], w.diff(), strict=True):
        nodes = [start + node * h for node in tableau.nodes]
        y = step(lambda z, k, nodes=nodes: f(z, nodes[k]), y, h.item(), tableau)
    return y


def dopri5(f, y: Tensor, start: float, end: float, *, rtol: float, atol: float, progress=None,
           limit: int = 5000) -> Tensor:
    """y [B, ...] at `end` from y at `start`; f(y, w [B]) is the slope, w float64 on the CPU.

    The RMS over an item of error / (atol + rtol |y|) stays below 1 in every step, each item with steps of its own, so
    an item does not depend on its batch. progress(share done) is called after every round.
    NexusError after `limit` rounds, or for a slope that is not finite.
    """
    w = torch.full((len(y),), start, dtype=torch.float64)
    h = torch.full_like(w, (end - start) / 20)
    k1 = f(y, w)
    for _ in range(limit):
        left = end - w
        live = left.abs() > 1e-12 * abs(end - start)
        if not live.any():
            return y
        h = torch.where(h.abs() < left.abs(), h, left)
        wide = h.reshape(-1, *[1] * (y.ndim - 1)).to(y)
        stages = [k1]
        for node, row in zip(DOPRI5.nodes[1:], DOPRI5.rows[1:], strict=True):
            new = _advance(y, wide, row, stages)
            stages.append(f(new, w + node * h))
        # the last stage's state is the step's own result
        off = _advance(torch.zeros_like(y), wide, [b - c for b, c in zip(DOPRI5.weights, _FOURTH, strict=True)], stages)
        scale = atol + rtol * torch.maximum(y.abs(), new.abs())
        error = (off / scale).double().flatten(1).square().mean(1).sqrt().cpu()
        if not error[live].isfinite().all():
            raise NexusError("dopri5 met numbers that are not finite", hint="check the model, or run it in float32")
        taken = live & (error <= 1)
        y, k1 = _choose(taken, new, y), _choose(taken, stages[-1], k1)
        w = torch.where(taken, torch.where(h == left, end, w + h), w)
        h = h * torch.where(live, (0.9 * error.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0), 1.0)
        if progress:
            progress(((w - start) / (end - start)).min().item())
    raise NexusError(f"dopri5 did not arrive in {limit} steps at rtol {rtol:g}, atol {atol:g}",
                     hint="raise rtol and atol, or use a fixed-step sampler such as heun")


def _advance(y: Tensor, h, weights, stages: list[Tensor]) -> Tensor:
    total = None
    for weight, stage in zip(weights, stages, strict=True):
        if weight:
            total = weight * stage if total is None else total + weight * stage
    return y if total is None else y + h * total


def _choose(which: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(which.to(new.device).reshape(-1, *[1] * (new.ndim - 1)), new, old)
