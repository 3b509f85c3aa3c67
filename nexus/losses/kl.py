"""Gaussian posteriors, likelihoods and the laws that weigh them: the pieces of an evidence lower bound, in nats."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import InputError


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """moments [B, 2L, ...] -> mean and log variance [B, L, ...], the latter held within [-30, 20]."""
    mean, logvar = moments.chunk(2, 1)
    return mean, logvar.clamp(-30.0, 20.0)


def sample_gaussian(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """mean + std * noise: the reparameterised draw. Kingma & Welling 2013."""
    return mean + (0.5 * logvar).exp() * noise


def kl_standard(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) of every latent, in nats; the shape of `mean`."""
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)


def log_normal(z: Tensor, mean: Tensor | float = 0.0, logvar: Tensor | float = 0.0) -> Tensor:
    """log N(z; mean, exp(logvar)), summed over everything but the batch: [B]."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    each = -0.5 * ((z - mean).square() * (-logvar).exp() + logvar + math.log(2 * math.pi))
    return each.flatten(1).sum(1)


def log_likelihood(kind: str, output: Tensor, x: Tensor, spread: float = 1.0) -> Tensor:
    """log p(x | output) summed over pixels: [B], in nats.

    x in [-1, 1]. gaussian: standard deviation `spread` around the output; laplace: the scale `spread` around it;
    bernoulli: the output is logits and x, taken to [0, 1], is the probability of white. InputError: another kind.
    """
    if kind == "gaussian":
        each = -0.5 * ((x - output) / spread).square() - math.log(spread) - 0.5 * math.log(2 * math.pi)
    elif kind == "laplace":
        each = -(x - output).abs() / spread - math.log(2 * spread)
    elif kind == "bernoulli":
        each = -F.binary_cross_entropy_with_logits(output, (x + 1) / 2, reduction="none")
    else:
        raise InputError(f"unknown likelihood '{kind}'", hint="gaussian, laplace or bernoulli")
    return each.flatten(1).sum(1)


def free_bits(kl: Tensor, floor: float = 0.0) -> Tensor:
    """kl [B, ...] of every latent -> batch mean summed over latents, where each costs at least `floor` nats.

    Kingma et al. 2016. Below the floor the gradient is zero, so no latent is pushed into saying nothing.
    """
    mean = kl.flatten(1).mean(0)
    return (mean.clamp_min(floor) if floor > 0 else mean).sum()


def ramp(step: int, steps: int, top: float = 1.0) -> float:
    """Straight from 0 at step 0 to `top` at `steps`, then flat; `steps` 0 = `top` from the start."""
    return top if steps <= 0 else top * min(1.0, step / steps)
