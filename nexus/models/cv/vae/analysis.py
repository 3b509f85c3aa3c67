"""What a trained autoencoder knows: its bound, its likelihood, its latent directions, what it rebuilds."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nexus.errors import InputError
from nexus.losses.kl import kl_standard, log_likelihood, log_normal, sample_gaussian
from nexus.models.cv.vae.vae import VAE
from nexus.models.cv.vae.vq import VQ


@torch.no_grad()
def elbo(system: VAE, x: Tensor, rng: torch.Generator) -> Tensor:
    """The evidence lower bound of pictures x [B, C, H, W], one posterior draw each, beta = 1: [B] in nats."""
    output, mean, logvar = system.rebuild(x, rng)
    likelihood = log_likelihood(system.config.likelihood, output, x, system.config.spread)
    return likelihood - kl_standard(mean, logvar).flatten(1).sum(1)


@torch.no_grad()
def iwae_nll(system: VAE, x: Tensor, rng: torch.Generator, k: int | None = None) -> Tensor:
    """-log p(x) estimated with k importance samples (default: config.iwae_k): [B] in nats. Burda et al. 2016.

    Its expectation falls towards -log p(x) as k grows; k = 1 is minus the bound.
    """
    k = k or system.config.iwae_k
    mean, logvar = (m.float() for m in system.net.encode(x))
    weights = []
    for _ in range(k):
        z = sample_gaussian(mean, logvar, torch.randn(mean.shape, generator=rng).to(mean))
        output = system.net.decode_raw(z.to(x.dtype)).float()
        likelihood = log_likelihood(system.config.likelihood, output, x, system.config.spread)
        weights.append(likelihood + log_normal(z) - log_normal(z, mean, logvar))
    return math.log(k) - torch.stack(weights).logsumexp(0)


@torch.inference_mode()
def traverse(system: VAE, image: Tensor, dim: int, values: Iterable[float]) -> Tensor:
    """Pictures [N, C, S, S] in [-1, 1]: image [C, S, S] rebuilt with latent `dim` set to each of `values`.

    For a latent map, `dim` counts its flattened positions. InputError when there is no such latent.
    """
    mean, _ = system.net.encode(image[None])
    count = mean[0].numel()
    if not 0 <= dim < count:
        raise InputError(f"there is no latent {dim}", hint=f"latents are 0 to {count - 1}")
    values = torch.tensor(list(values), dtype=mean.dtype, device=mean.device)
    z = mean.flatten(1).repeat(len(values), 1)
    z[:, dim] = values
    return system.picture(system.net.decode_raw(z.unflatten(1, mean.shape[1:])).float()).clamp(-1, 1)


@torch.inference_mode()
def rebuild(system: VAE | VQ, x: Tensor) -> Tensor:
    """x [B, C, S, S] -> the pictures of the posterior's means, or of the nearest rows of a codebook, in [-1, 1]."""
    return system.rebuilt(x).clamp(-1, 1)


def is_flat(system: VAE | VQ) -> bool:
    """Whether latents are codes [L] and no maps."""
    return len(system.config.net.latent_shape) == 1


@torch.inference_mode()
def codes(system: VAE, x: Tensor) -> Tensor:
    """x [B, C, S, S] -> the posterior's means [B, L] of a VAE with flat latents."""
    return system.net.encode(x)[0].float()


def bounds(system: VAE | VQ) -> dict[str, Callable[[Tensor, torch.Generator], Tensor]]:
    """Name -> f(x, rng), an upper bound on -log p(x) of each picture in nats; a VQ codec has none.

    iwae is for flat latents only: a map of thousands needs too many importance samples.
    """
    if isinstance(system, VQ):
        return {}
    found = {"elbo": lambda x, rng: -elbo(system, x, rng)}
    if is_flat(system):
        found["iwae"] = lambda x, rng: iwae_nll(system, x, rng)
    return found
