"""Kinds of guidance beyond the linear one: rules for guidance.guided_batch, each in the space of its paper."""

from collections.abc import Callable

import torch
from torch import Tensor

from nexus.process.guidance import linear
from nexus.process.predictions import output_of, over, with_x0, x0_of, x0_part


def cfg_zero(path, prediction: str) -> Callable:
    """CFG-Zero*: s v_u + weight (v_c - s v_u), s = <v_c, v_u> / |v_u|^2 an item. Fan et al. 2025.

    Its weights do not sum to 1, so that it depends on the space: v is what the network outputs, a velocity in the
    paper. Other predictions follow diffusers, which applies it to them as it is.
    """
    def rule(cond: Tensor, uncond: Tensor, weight, x: Tensor, t: Tensor) -> Tensor:
        v_c, v_u = (output_of(path, prediction, x0, x, t) for x0 in (cond, uncond))
        v_u = over(optimal_scale(v_c, v_u), x) * v_u
        return x0_of(path, prediction, linear(v_c, v_u, weight), x, t)
    return rule


def optimal_scale(v_c: Tensor, v_u: Tensor) -> Tensor:
    """s [B] that brings s v_u nearest to v_c."""
    a, b = v_c.flatten(1), v_u.flatten(1)
    return (a * b).sum(1) / (b.square().sum(1) + 1e-8)


def zero_init(denoise, path, prediction: str, first: Callable):
    """No velocity where first(t): the first steps of a flow leave the noise as it is. Fan et al. 2025."""
    def still(x, t):
        on = first(t)
        if not on.any():
            return denoise(x, t)
        x0 = x0_of(path, prediction, torch.zeros_like(x), x, t)
        if on.all():
            return x0
        result = denoise(x, t)
        return with_x0(result, torch.where(over(on, x).to(x.device), x0, x0_part(result)))
    return still


def apg(eta: float = 0.0, norm: float = 15.0, momentum: float = -0.5) -> Callable:
    """Adaptive projected guidance of x0, as in the paper. Sadat et al. 2024.

    cond + (weight - 1) (the part of cond - uncond across cond + eta times the part along it). norm: the difference's
    largest Euclidean length an item, 0 = any. momentum: how much of the last call's difference is added, negative
    repels. The rule remembers that difference: make one a run.
    """
    last: Tensor | float = 0.0

    def rule(cond: Tensor, uncond: Tensor, weight, x: Tensor, t: Tensor) -> Tensor:
        nonlocal last
        change = cond - uncond
        if momentum:
            change = last = change + momentum * last
        if norm:
            length = change.flatten(1).norm(dim=1).clamp(min=1e-12)
            change = change * over((norm / length).clamp(max=1), change)
        along = _along(change, cond)
        return cond + (weight - 1) * (change - along + eta * along)
    return rule


def _along(change: Tensor, direction: Tensor) -> Tensor:
    """The projection of change on direction, an item; in float64, as small differences of large parts matter."""
    a, b = change.flatten(1).double(), torch.nn.functional.normalize(direction.flatten(1).double())
    return ((a * b).sum(1, keepdim=True) * b).to(change.dtype).view_as(change)


def away_from(weak, scale: float, active: Callable | None = None) -> Callable:
    """The linear rule, and scale (cond - weak) on top: PAG (Ahn et al. 2024), SLG (Stable Diffusion 3.5).

    weak(x, t): the denoiser of the perturbed network under the same condition. active(t): where it is called; elsewhere
    the linear rule alone.
    """
    def rule(cond: Tensor, uncond: Tensor, weight, x: Tensor, t: Tensor) -> Tensor:
        plain, on = linear(cond, uncond, weight), None if active is None else active(t)
        if on is not None and not on.any():
            return plain
        led = plain + scale * (cond - x0_part(weak(x, t)))
        return led if on is None else torch.where(over(on, x).to(x.device), led, plain)
    return rule
