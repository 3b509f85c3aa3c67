"""How much of two sets of features overlaps: precision, recall, density, coverage.

Each is the mean over one set's pictures, given the other, so the pictures' own values are returned.
"""

import torch
from torch import Tensor

from nexus.errors import InputError


def distances(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances [N, M] in float64, by differences: products would lose the small ones."""
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def radii(x: Tensor, k: int) -> Tensor:
    """The distance from each x [N, D] to its k-th nearest other: [N]. InputError for N <= k."""
    if len(x) <= k:
        raise InputError(f"the {k}-th nearest neighbour needs more than {k} pictures, there are {len(x)}")
    return distances(x, x).fill_diagonal_(torch.inf).kthvalue(k, 1).values


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[Tensor, Tensor]:
    """Is each made picture within some real one's radius [M], and the reverse [N]. Kynkaanniemi et al. 2019."""
    between = distances(real, made)
    precise = (between <= radii(real, k)[:, None]).any(0)
    recalled = (between <= radii(made, k)[None]).any(1)
    return precise.double(), recalled.double()


def density_coverage(real: Tensor, made: Tensor, k: int = 5) -> tuple[Tensor, Tensor]:
    """In how many real radii a made picture lies, over k [M]; is a made one in each real's [N]. Naeem et al. 2020."""
    inside = distances(real, made) <= radii(real, k)[:, None]
    return inside.double().sum(0) / k, inside.any(1).double()
