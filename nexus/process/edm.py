"""EDM's preconditioning: what a network sees of x = x0 + sigma eps, and what its answer F implies. Karras et al. 2022.

D(x) = c_skip x + c_out F(c_in x, c_noise) with unit-variance input and target at every sigma, for data of standard
deviation sigma_data. Every function takes sigma [...] > 0 and keeps its shape and dtype; pure arithmetic, no path.
"""

import torch
from torch import Tensor

SIGMA_DATA = 0.5


def c_skip(sigma: Tensor, sigma_data: float = SIGMA_DATA, sigma_min: float = 0.0) -> Tensor:
    """The share of x in D. Table 1; sigma_min > 0: 1 exactly there, as consistency models ask (Song et al. 2023)."""
    return sigma_data ** 2 / ((sigma - sigma_min).square() + sigma_data ** 2)


def c_out(sigma: Tensor, sigma_data: float = SIGMA_DATA, sigma_min: float = 0.0) -> Tensor:
    """The size of F in D. Table 1; sigma_min > 0: 0 exactly there (song et al. 2023)."""
    return (sigma - sigma_min) * sigma_data / (sigma.square() + sigma_data ** 2).sqrt()


def c_in(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """What x is multiplied by before the network sees it: c_in x has unit variance."""
    return (sigma.square() + sigma_data ** 2).rsqrt()


def c_noise(sigma: Tensor) -> Tensor:
    """The network's clock: ln(sigma) / 4."""
    return sigma.log() / 4


def weight(sigma: Tensor, sigma_data: float = SIGMA_DATA) -> Tensor:
    """lambda(sigma) = 1 / c_out^2: the weight of |D - x0|^2; in F it is 1 everywhere."""
    return (sigma.square() + sigma_data ** 2) / (sigma * sigma_data).square()


def karras_sigmas(steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """Sigmas [steps] float64 from sigma_max down to sigma_min, evenly in sigma^(1/rho). Eq. 5, without the final 0."""
    u = torch.linspace(0, 1, steps, dtype=torch.float64)
    most, least = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (most + u * (least - most)) ** rho


def draw_sigmas(n: int, rng: torch.Generator, p_mean: float = -1.2, p_std: float = 1.2) -> Tensor:
    """Training sigmas [n]: log-normal. Table 1."""
    return (torch.randn(n, generator=rng) * p_std + p_mean).exp()
