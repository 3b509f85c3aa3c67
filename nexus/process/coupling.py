"""Which noise goes with which data: optimal transport within a batch. Pooladian et al. 2023; Tong et al. 2023."""

import numpy as np
import torch
from torch import Tensor

from nexus.errors import UsageError


def pairing(x0: Tensor, eps: Tensor, *, method: str = "exact", reg: float = 0.05,
            rng: torch.Generator | None = None) -> Tensor:
    """index [B] int64 on the CPU: eps[index] is coupled with x0 (both [B, ...]) under the squared distance.

    exact: the cheapest permutation. sinkhorn: drawn row by row from the entropic plan, reg in units of the mean cost,
    with rng. none: as they come.
    """
    if method == "none":
        return torch.arange(len(x0))
    cost = torch.cdist(x0.flatten(1).double().cpu(), eps.flatten(1).double().cpu()).square()
    if method == "exact":
        return torch.from_numpy(assignment(cost.numpy()))
    if method == "sinkhorn":
        plan = sinkhorn(cost, reg * cost.mean().clamp(min=1e-12).item())
        return torch.multinomial(plan / plan.sum(1, keepdim=True), 1, generator=rng)[:, 0]
    raise UsageError(f"unknown coupling '{method}'", hint="couplings: none, exact, sinkhorn")


def assignment(cost: np.ndarray) -> np.ndarray:
    """The column of each row [n] in the cheapest perfect matching of cost [n, n]. Kuhn 1955; Jonker & Volgenant 1987.

    Shortest augmenting paths with dual potentials: O(n^3), one row at a time; column n is the virtual start.
    """
    n = len(cost)
    u, v = np.zeros(n), np.zeros(n + 1)             # potentials; cost - u - v >= 0, 0 on the matching
    row_of = np.full(n + 1, -1)                     # the row matched to each column
    for row in range(n):
        row_of[n], column = row, n
        slack, came = np.full(n, np.inf), np.full(n, n)
        seen = np.zeros(n + 1, dtype=bool)
        while row_of[column] >= 0:                  # grow the tree by its nearest column until one is free
            seen[column] = True
            here = row_of[column]
            reduced = cost[here] - u[here] - v[:n]
            better = ~seen[:n] & (reduced < slack)
            slack[better], came[better] = reduced[better], column
            open_slack = np.where(seen[:n], np.inf, slack)
            column = int(open_slack.argmin())
            step = open_slack[column]
            u[row_of[seen]] += step
            v[seen] -= step
            slack -= step
        while column != n:                          # flip the path back to the start
            row_of[column] = row_of[came[column]]
            column = came[column]
    columns = np.empty(n, dtype=np.int64)
    columns[row_of[:n]] = np.arange(n)
    return columns


def sinkhorn(cost: Tensor, reg: float, *, iterations: int = 200) -> Tensor:
    """The entropic plan [n, m] with uniform marginals, columns exact, in the log domain. Cuturi 2013."""
    n, m = cost.shape
    logits = -cost / reg
    f, g = cost.new_zeros(n, 1), cost.new_zeros(1, m)
    for _ in range(iterations):
        f = -(logits + g).logsumexp(1, keepdim=True) - np.log(n)
        g = -(logits + f).logsumexp(0, keepdim=True) - np.log(m)
    return (logits + f + g).exp()
