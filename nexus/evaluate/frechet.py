"""The Frechet distance between Gaussians fitted to features."""

import torch
from torch import Tensor

from nexus.errors import InputError


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, D] -> mean [D] and unbiased covariance [D, D] in float64; InputError for N < 2."""
    if len(x) < 2:
        raise InputError(f"a covariance needs 2 pictures, there are {len(x)}")
    return x.double().mean(0), torch.cov(x.double().T).reshape(x.shape[1], x.shape[1])


def gaussian_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)). Dowson & Landau 1982; FID: Heusel et al. 2017.

    S1 S2 has the eigenvalues of the symmetric R S2 R with R = S1^(1/2), so the trace of the root is a sum of roots;
    negative eigenvalues are rounding and count as 0.
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp_min(0).sqrt().sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross)


def frechet(real: Tensor, made: Tensor) -> float:
    """The distance between two sets of features [N, D] and [M, D]; biased upwards when N or M is below some D."""
    return gaussian_distance(*moments(real), *moments(made))
