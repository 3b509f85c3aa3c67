import numpy as np
import pytest

from nexus.data.order import indices, permutation


def stream(n, steps, batch, seed=3, world=1):
    """What all ranks together see, in stream order."""
    seen = []
    for step in range(steps):
        shares = [indices(n, seed=seed, step=step, batch=batch, rank=r, world=world) for r in range(world)]
        seen += np.array(shares).T.ravel().tolist()
    return seen


@pytest.mark.parametrize("n, batch, world",
                         [(1, 1, 1), (7, 3, 1), (12, 4, 1), (10, 16, 1), (23, 2, 3), (5, 4, 4)])
def test_every_epoch_is_a_permutation(n, batch, world):
    seen = stream(n, 3 * n, batch, world=world)
    epochs = [seen[i:i + n] for i in range(0, len(seen) - n + 1, n)]
    assert len(epochs) >= 3
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)


def test_ranks_split_what_one_process_sees():
    for step in range(8):
        whole = indices(17, seed=1, step=step, batch=12)
        for world in (2, 3, 4):
            for r in range(world):
                share = indices(17, seed=1, step=step, batch=12 // world, rank=r, world=world)
                assert share == whole[r::world]


def test_batch_straddles_two_epochs():
    first, second = permutation(10, 5, 0).tolist(), permutation(10, 5, 1).tolist()
    assert indices(10, seed=5, step=1, batch=6) == first[6:] + second[:2]


def test_step_needs_no_history():
    late = indices(1000, seed=0, step=10**9, batch=4)
    indices(1000, seed=0, step=0, batch=4)
    permutation.cache_clear()
    assert indices(1000, seed=0, step=10**9, batch=4) == late


def test_seeds_and_epochs_differ():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_positions_are_uniform():
    # Where sample 0 lands over 2,000 epochs: chi-square of 20 cells, 19 degrees of freedom, mean 19, sd 6.2.
    places = [int(np.flatnonzero(permutation(20, 0, epoch) == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=20)
    assert ((counts - 100) ** 2 / 100).sum() < 19 + 4 * 6.2


def test_order_is_pinned():
    """A resumed run relies on these across versions of numpy."""
    assert indices(10, seed=0, step=0, batch=10) == [3, 2, 1, 8, 6, 0, 7, 4, 5, 9]
    assert indices(6538, seed=7, step=1000, batch=4, rank=1, world=2) == [5796, 4771, 5968, 5496]


def test_cached_order_cannot_be_changed():
    with pytest.raises(ValueError):
        permutation(4, 0, 0)[0] = 1


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch": 0}, {"seed": -1}, {"step": -1}, {"rank": 1},
                                   {"rank": -1}])
def test_out_of_range(wrong):
    values = {"n": 3, "seed": 0, "step": 0, "batch": 1} | wrong
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        indices(values.pop("n"), **values)
