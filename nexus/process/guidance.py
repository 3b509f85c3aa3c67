"""Guidance as wrappers of denoisers. It acts on x0; being linear, it equals guidance of eps, v or velocity.

A rule(cond, uncond, weight, x, t) -> x0 combines two x0 estimates [B, C, ...]: `linear` is classifier-free guidance,
the others are in guidance_kinds.py. The rest (interval, rescaling, channels, variance) is the same for all rules.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nexus.process.predictions import output_of, over, with_x0, x0_of, x0_part
from nexus.process.schedules import Grid


def linear(cond: Tensor, uncond: Tensor, weight, x: Tensor | None = None, t: Tensor | None = None) -> Tensor:
    """uncond + weight (cond - uncond); weight a number or [B, 1, ...]. Ho & Salimans 2022."""
    return cond if isinstance(weight, float) and weight == 1 else uncond + weight * (cond - uncond)


def guided_batch(denoise_pair, scale, *, rule: Callable = linear, rescale: float = 0.0,
                 active: Callable | None = None, channels: int | None = None, cond: Callable | None = None,
                 said: tuple | None = None):
    """Guidance by a rule; classifier-free guidance by default. Ho & Salimans 2022.

    denoise_pair(x, t) -> (cond, uncond): x0 estimates (or Estimates, whose cond fraction is kept), usually from one
    call with a batch of 2B. scale: 1 = cond alone, 0 = uncond; a number or a function of t. rescale in [0, 1]: how far
    the result's standard deviation an item returns to cond's (Lin et al. 2023, eq. 15-16); said: (path, prediction),
    what the network outputs, of which that is meant; without it of x0. active(t): where guidance is on (see `during`);
    elsewhere cond alone, through the cheaper `cond` denoiser if given. channels: guide only the first so many (DiT: 3),
    the rest is cond's.
    """
    def denoise(x, t):
        on = None if active is None else active(t)
        if on is not None and cond is not None and not on.any():
            return cond(x, t)
        result, other = denoise_pair(x, t)
        plain = x0_part(result)
        x0 = _some_channels(rule(plain, x0_part(other), _weight(scale, t, x), x, t), plain, channels)
        if rescale:
            x0 = _rescaled(x0, plain, rescale) if said is None else x0_of(
                *said, _rescaled(*(output_of(*said, each, x, t) for each in (x0, plain)), rescale), x, t)
        return with_x0(result, x0 if on is None else torch.where(over(on, x).to(x.device), x0, plain))
    return denoise


def guided(cond, uncond, scale, **more):
    """`guided_batch` over two denoisers, called one after the other."""
    return guided_batch(lambda x, t: (cond(x, t), uncond(x, t)), scale, cond=cond, **more)


def combine(cond: Tensor, uncond: Tensor, weight, rescale: float = 0.0, channels: int | None = None) -> Tensor:
    """uncond + weight (cond - uncond) on the first channels, rescaled; weight a number or [B, 1, ...]."""
    x0 = _some_channels(linear(cond, uncond, weight), cond, channels)
    return _rescaled(x0, cond, rescale) if rescale else x0


def during(grid: Grid, start: float, end: float) -> Callable:
    """active(t) for a share of the run: 0 is its first step (noise), 1 past its last. Kynkaanniemi et al. 2024.

    Step i of N is active when start <= i / N < end; between the grid's times, t decides.
    """
    n = grid.steps
    first = next((i for i in range(n) if i / n >= start - 1e-9), n)
    last = max((i for i in range(n) if i / n < end - 1e-9), default=-1)
    if first > last:
        return lambda t: torch.zeros_like(t, dtype=torch.bool)
    high, low = grid.t[first].item(), grid.t[last + 1].item() if last < n - 1 else -torch.inf
    return lambda t: (t <= high) & (t > low)


def classifier_rule(log_prob: Callable, path) -> Callable:
    """cond steered by a classifier of noisy pictures. Dhariwal & Nichol 2021, alg. 2: eps - weight sigma grad log p.

    log_prob(x [B, ...], t) -> [B], differentiable in x. At pure noise (alpha = 0) nothing is steered.
    """
    def rule(cond, uncond, weight, x, t):
        alpha, sigma = (over(v, x).to(x.device) if t.ndim else v for v in path.at(t))
        if not bool((alpha > 0).all()):
            return cond
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            gradient, = torch.autograd.grad(log_prob(leaf, t).sum(), leaf)
        return cond + weight * (sigma * sigma / alpha) * gradient
    return rule


def classifier_guided(denoise, log_prob, path, scale: float):
    """`denoise` steered by `classifier_rule`; scale 1 with an exact classifier is Bayes' rule."""
    return alone(denoise, scale, classifier_rule(log_prob, path))


def alone(denoise, scale, rule: Callable, **more):
    """`guided_batch` of one denoiser, which is cond and uncond at once: for rules that bring their own other side."""
    def pair(x, t):
        result = denoise(x, t)
        return result, result
    return guided_batch(pair, scale, rule=rule, cond=denoise, **more)


def _some_channels(x0: Tensor, cond: Tensor, channels: int | None) -> Tensor:
    if channels is None or channels >= cond.shape[1]:
        return x0
    return torch.cat([x0[:, :channels], cond[:, channels:]], dim=1)


def _rescaled(out: Tensor, cond: Tensor, share: float) -> Tensor:
    ratio = cond.flatten(1).std(1) / out.flatten(1).std(1).clamp(min=1e-12)
    return out * (1 + share * (over(ratio, out) - 1))


def _weight(scale, t: Tensor, x: Tensor):
    value = scale(t) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return float(value)
    return over(value, x).to(x) if value.ndim else value.item()
