"""How likely data is: bits per dimension of a discrete chain, exact densities of a flow."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.process import ode
from nexus.process.predictions import Estimate, over, x0_part
from nexus.process.schedules import Grid


class Bound(NamedTuple):
    """Bits per dimension, an item. total [B] = prior [B] + the sum of terms [N, B], noisiest first."""

    total: Tensor
    prior: Tensor
    terms: Tensor


class _Link(NamedTuple):
    """One link of a chain from (a, s) to (a1, s1), with the log of its posterior variance (clipped) and of beta."""

    a: Tensor
    s: Tensor
    a1: Tensor
    s1: Tensor
    log_small: Tensor
    log_large: Tensor


def bits_per_dim(denoise, x0: Tensor, grid: Grid, noise=torch.randn_like, *, bins: int = 256,
                 variance: str = "small") -> Bound:
    """The variational bound of a chain on data x0 [B, ...] of `bins` levels in [-1, 1]. Ho et al. 2020, eq. 5.

    denoise may return Estimates; otherwise variance is "small" or "large". One call a step; noise may be fixed.
    """
    terms, alpha, sigma = [], grid.alpha.to(x0.device), grid.sigma.to(x0.device)
    log_small = _log_small(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    log_large = _log_large(alpha[:-1], sigma[:-1], alpha[1:], sigma[1:])
    log_small[-1] = log_small[-2] if grid.steps > 1 else log_large[-1]      # as Ho et al.: never log 0
    for i in range(grid.steps):
        link = _Link(alpha[i], sigma[i], alpha[i + 1], sigma[i + 1], log_small[i], log_large[i])
        result = denoise(link.a * x0 + link.s * noise(x0), grid.t[i])
        fraction = result.fraction if isinstance(result, Estimate) else float(variance == "large")
        terms.append(_bits(x0, x0_part(result), fraction, link, bins))
    terms = torch.stack(terms)
    prior = prior_bits(x0, alpha[0], sigma[0])
    return Bound(prior + terms.sum(0), prior, terms)


def prior_bits(x0: Tensor, alpha, sigma) -> Tensor:
    """KL(N(alpha x0, sigma^2) || N(0, 1)) [B] in bits per dimension: what the noisiest x still tells."""
    kl = 0.5 * ((alpha * x0).square() + sigma ** 2 - 1 - 2 * torch.as_tensor(sigma).log())
    return kl.flatten(1).mean(1) / math.log(2)


def vb_terms(path, x0: Tensor, t: Tensor, x0_hat: Tensor, fraction, *, bins: int = 256) -> Tensor:
    """The bound's term at whole indices t [B] of a DiscretePath, [B] bits per dimension.

    x0_hat is the network's estimate at x_t; fraction (of Estimate; 0 = small, 1 = large) places its log-variance.
    """
    t = t.to(x0.device)
    later = t.clamp(min=1)
    pieces = [over(v, x0) for v in (*path.at(t), *path.at(t - 1))]
    first = over(t == 0, x0)
    a, s = pieces[:2]
    a1, s1 = torch.where(first, 1.0, pieces[2]), torch.where(first, 0.0, pieces[3])
    log_small = over(_log_small(*path.at(later.double()), *path.at(later.double() - 1)), x0).to(x0)
    log_large = _log_large(a.double(), s.double(), a1.double(), s1.double()).to(x0)
    return _bits(x0, x0_hat, fraction, _Link(a, s, a1, s1, log_small, log_large), bins)


def hybrid_vlb(path, x0: Tensor, t: Tensor, x0_hat: Tensor, fraction: Tensor, *, weight: float = 1e-3) -> Tensor:
    """The variance's share of L_hybrid, [B]: weight x T x the bound's term. Nichol & Dhariwal 2021, section 3.1.

    The mean is held fixed: the term trains `fraction` alone. Add it to L_simple.
    """
    return weight * path.steps * vb_terms(path, x0, t, x0_hat.detach(), fraction)


def decoder_log_prob(x0: Tensor, mean: Tensor, log_std: Tensor, bins: int = 256) -> Tensor:
    """log P of x0's bin under N(mean, std) with the outermost bins open. Ho et al. 2020, eq. 13. Shape of x0."""
    half = 1 / (bins - 1)
    upper = torch.where(x0 > 1 - half, torch.inf, (x0 - mean + half) / log_std.exp())
    lower = torch.where(x0 < -1 + half, -torch.inf, (x0 - mean - half) / log_std.exp())
    # mirrored to the left tail, where the difference of two CDFs keeps its digits
    flip = (upper + lower) > 0
    upper, lower = torch.where(flip, -lower, upper), torch.where(flip, -upper, lower)
    return (torch.special.ndtr(upper) - torch.special.ndtr(lower)).clamp(min=1e-12).log()


def log_likelihood(denoise, x0: Tensor, grid: Grid, probes: Tensor | None, *, method: str = "rk4") -> Tensor:
    """log p(x0) [B] in nats under the probability-flow ODE. Song et al. 2021 (score SDE), eq. 39.

    From the grid's cleanest time, where x0 is taken to lie, to its noisiest, taken to be N(0, sigma^2). probes
    [P, B, ...] of +-1 estimate the divergence (Hutchinson); None computes it exactly, D backward passes a stage.
    """
    size = (grid.alpha + grid.sigma)[:-1].flip(0)
    w = grid.sigma[:-1].flip(0) / size
    times = grid.t[:-1].flip(0)

    def velocity(y, now):
        i = int((w < now - 1e-12).sum())
        if abs(w[i] - now) < 1e-12:
            t, scale = times[i], size[i]
        else:
            lam = torch.log1p(-now) - now.log()
            t = grid.path.t_of_log_snr(lam)
            scale = sum(grid.path.at(t))
        return (y - x0_part(denoise(y * scale, t)).to(y)) / now

    def log_prior(y):
        z = (y * (size[-1] / grid.sigma[0])).flatten(1)
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(1) + z.shape[1] * (size[-1] / grid.sigma[0]).log()

    dims = x0[0].numel()
    return flow_log_likelihood(velocity, x0 / size[0], w, log_prior, probes, method=method) - dims * size[0].log()


def flow_log_likelihood(velocity: Callable, y: Tensor, w: Tensor, log_prior: Callable, probes: Tensor | None, *,
                        method: str = "rk4") -> Tensor:
    """log density [B] of y [B, ...] at w[0], whose law at w[-1] is log_prior(y) -> [B]. Chen et al. 2018.

    velocity(y, w []) -> dy/dw. probes as in `log_likelihood`.
    """
    shape = y.shape

    def augmented(state, now):
        with torch.enable_grad():
            here = state[:, :-1].detach().reshape(shape).requires_grad_()
            v = velocity(here, now)
            trace = divergence(v, here, probes)
        return torch.cat([v.detach().flatten(1), trace.detach()[:, None]], dim=1)

    state = torch.cat([y.flatten(1), y.new_zeros(len(y), 1)], dim=1)
    state = ode.integrate(augmented, state, w, method)
    return log_prior(state[:, :-1].reshape(shape)) + state[:, -1]


def divergence(v: Tensor, y: Tensor, probes: Tensor | None) -> Tensor:
    """The trace of dv/dy an item, [B]: by probes [P, B, ...] of +-1 (Hutchinson 1989), or exactly for None."""
    if probes is not None:
        return torch.stack([_quadratic(v, y, probe) for probe in probes]).mean(0)
    basis = torch.eye(y[0].numel(), dtype=y.dtype, device=y.device).reshape(-1, *y.shape[1:])
    return torch.stack([_quadratic(v, y, e.expand_as(y)) for e in basis]).sum(0)


def rademacher(probes: int, x: Tensor, rng: torch.Generator) -> Tensor:
    """Probes [P, *x.shape] of +-1 on x's device."""
    return (torch.randint(2, (probes, *x.shape), generator=rng) * 2 - 1).to(x)


def _quadratic(v: Tensor, y: Tensor, probe: Tensor) -> Tensor:
    row, = torch.autograd.grad((v * probe).sum(), y, retain_graph=True)
    return (row * probe).flatten(1).sum(1)


def _bits(x0: Tensor, x0_hat: Tensor, fraction, link: _Link, bins: int) -> Tensor:
    log_var = fraction * link.log_large + (1 - fraction) * link.log_small
    # both posteriors are keep x + (a1 - a keep) x0: x itself cancels
    keep = link.a / link.a1 * (link.s1 / link.s) ** 2
    off = (link.a1 - link.a * keep) * (x0 - x0_hat)
    kl = 0.5 * (log_var - link.log_small - 1 + (link.log_small - log_var).exp() + off.square() * (-log_var).exp())
    log_std = torch.as_tensor(0.5 * log_var).expand_as(x0) if not isinstance(log_var, float) else log_var
    nll = -decoder_log_prob(x0, x0_hat, log_std, bins)
    last = torch.as_tensor(link.s1 == 0)
    return torch.where(last, nll, kl).flatten(1).mean(1) / math.log(2)


def _log_large(a: Tensor, s: Tensor, a1: Tensor, s1: Tensor) -> Tensor:
    return (s * s - (a * s1 / a1).square()).log()


def _log_small(a: Tensor, s: Tensor, a1: Tensor, s1: Tensor) -> Tensor:
    return 2 * s1.log() + (1 - (a * s1 / (a1 * s)).square()).log()
