"""Which samples a training step sees, as a pure function of (n, seed, step)."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a batch straddles two epochs
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of one epoch, a permutation of range(n) -> int64 [n], read-only."""
    # numpy promises that PCG64's raw stream never changes; it does not promise so of Generator.permutation,
    # and a resumed run must see the same order under a newer numpy.
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order


def indices(n: int, *, seed: int, step: int, batch: int, rank: int = 0, world: int = 1) -> list[int]:
    """The `batch` samples (ids < n) that `rank` of `world` takes at `step`, out of the concatenated epochs.

    Step s takes positions [s * batch * world, (s + 1) * batch * world) of the stream, rank r every world-th
    of them from the r-th on. No sample comes twice in an epoch; a batch may straddle epochs.
    Raises ValueError for numbers that make no sense.
    """
    if n < 1 or batch < 1 or seed < 0 or step < 0 or not 0 <= rank < world:
        raise ValueError(f"out of range: {n=} {batch=} {seed=} {step=} {rank=} {world=}")
    start = step * batch * world + rank
    return [int(permutation(n, seed, p // n)[p % n]) for p in range(start, start + batch * world, world)]
