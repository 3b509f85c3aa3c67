"""The kernel distance (KID) between two sets of features: unbiased at any number of pictures."""

import math

import torch
from torch import Tensor

from nexus.errors import InputError

FEWEST = 3      # pictures in a set, so that the jackknife can leave one out


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(x.y / D + 1)^3: [N, D], [M, D] -> [N, M] in float64."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kid(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The unbiased squared maximum mean discrepancy and its standard error. Binkowski et al. 2018, section 4.

    x [N, D], y [M, D]. All pairs are used, no subsets; the error is a jackknife over single pictures of both sets
    (Efron & Stein 1981), which row sums give at no further cost. InputError for fewer than 3 pictures in a set.
    """
    n, m = len(x), len(y)
    if min(n, m) < FEWEST:
        raise InputError(f"the kernel distance needs {FEWEST} pictures in each set, there are {n} and {m}")
    xx, yy, xy = polynomial(x, x), polynomial(y, y), polynomial(x, y)
    rows_x, rows_y = (k.sum(1) - k.diagonal() for k in (xx, yy))
    within_x, within_y, between = rows_x.sum(), rows_y.sum(), xy.sum()
    value = within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * between / (n * m)
    less_x = ((within_x - 2 * rows_x) / ((n - 1) * (n - 2)) + within_y / (m * (m - 1))
              - 2 * (between - xy.sum(1)) / ((n - 1) * m))
    less_y = (within_x / (n * (n - 1)) + (within_y - 2 * rows_y) / ((m - 1) * (m - 2))
              - 2 * (between - xy.sum(0)) / (n * (m - 1)))
    variance = sum((k - 1) / k * (less - less.mean()).square().sum() for k, less in ((n, less_x), (m, less_y)))
    return float(value), math.sqrt(float(variance))


def kid_subsets(x: Tensor, y: Tensor, size: int, count: int, rng: torch.Generator) -> tuple[float, float]:
    """Mean and standard deviation over `count` random subsets of `size` of each set, the published protocol."""
    if not FEWEST <= size <= min(len(x), len(y)):
        raise InputError(f"subsets of {size} cannot be drawn from {len(x)} and {len(y)} pictures")
    values = torch.tensor([kid(*(z[torch.randperm(len(z), generator=rng)[:size]] for z in (x, y)))[0]
                           for _ in range(count)], dtype=torch.float64)
    return float(values.mean()), float(values.std(correction=0))
