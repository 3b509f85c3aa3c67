"""Denoisers in closed form, for tests: what a perfect network would answer."""

import torch

from nexus.process.predictions import over


def gaussian(path, mean: float, std: float):
    """E[x0 | x_t] for data N(mean, std^2) in every dimension."""
    def denoise(x, t):
        a, s = (over(v, x) for v in path.at(t))
        return mean + a * std**2 / (a * a * std**2 + s * s) * (x - a * mean)
    return denoise


def gaussian_flow(x, mean: float, std: float, start, end):
    """The probability-flow map of `gaussian` from (alpha, sigma) to (alpha, sigma)."""
    (a, s), (a1, s1) = start, end
    return a1 * mean + (x - a * mean) * ((a1 * a1 * std**2 + s1 * s1) / (a * a * std**2 + s * s)) ** 0.5


def mixture(path, points, std: float = 0.0):
    """E[x0 | x_t] for equally likely Gaussians at points [K, D]; std 0 is a finite data set. x [B, D]."""
    def denoise(x, t):
        a, s = (over(v, x) for v in path.at(t))
        variance = a * a * std**2 + s * s
        gap = x[:, None] - (a[..., None] if a.ndim else a) * points
        weight = torch.softmax(-gap.square().sum(-1) / (2 * variance), dim=-1)
        near = weight @ points.to(x)
        return near + a * std**2 / variance * (x - a * near)
    return denoise


def mixture_flow(x, points, std: float, start, end):
    """The probability-flow map of a one-dimensional `mixture` (x [B, 1]): in one dimension it keeps the CDF."""
    def cdf(x, a, s):
        return torch.special.ndtr((x - a * points.T) / (a * a * std**2 + s * s) ** 0.5).mean(1, keepdim=True)

    want = cdf(x, *start)
    low, high = x * 0 - 100, x * 0 + 100
    for _ in range(80):
        middle = (low + high) / 2
        below = cdf(middle, *end) < want
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
