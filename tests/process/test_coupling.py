import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.errors import UsageError
from nexus.process.coupling import assignment, pairing, sinkhorn


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([1, 3, 1000]))
def test_assignment_is_optimal(n, seed, levels):
    cost = np.random.default_rng(seed).integers(-levels, levels + 1, (n, n)).astype(float)      # ties and signs too
    columns = assignment(cost)
    assert sorted(columns) == list(range(n))
    best = min(sum(cost[i, p[i]] for i in range(n)) for p in itertools.permutations(range(n)))
    assert cost[np.arange(n), columns].sum() == pytest.approx(best)


def test_pairing_in_one_dimension_sorts():
    x0, eps = torch.randn(2, 64, 1, generator=torch.Generator().manual_seed(0))
    index = pairing(x0, eps)
    assert torch.equal(eps[index][:, 0].argsort(), x0[:, 0].argsort())


def test_a_shuffled_batch_is_found_again():
    x0 = torch.randn(32, 3, 4, 4)
    shuffle = torch.randperm(32)
    index = pairing(x0, x0[shuffle] + 1e-3)
    assert torch.equal(shuffle[index], torch.arange(32))


def test_sinkhorn_has_its_marginals_and_tends_to_the_exact_plan():
    rng = torch.Generator().manual_seed(0)
    cost = torch.rand(8, 8, generator=rng, dtype=torch.float64)
    plan = sinkhorn(cost, 0.05, iterations=2000)
    torch.testing.assert_close(plan.sum(0), torch.full((8,), 1 / 8, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.full((8,), 1 / 8, dtype=torch.float64), rtol=1e-4, atol=0)
    sharp = sinkhorn(cost, 1e-3, iterations=5000)
    best = cost[torch.arange(8), torch.from_numpy(assignment(cost.numpy()))].mean()
    assert (sharp * cost).sum().item() == pytest.approx(best.item(), abs=2e-3)


def test_sinkhorn_pairing_is_repeatable_and_cheaper_than_chance():
    x0, eps = torch.randn(2, 64, 2, generator=torch.Generator().manual_seed(0))
    one, two = (pairing(x0, eps, method="sinkhorn", rng=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert (x0 - eps[one]).square().mean() < 0.5 * (x0 - eps).square().mean()


def test_no_coupling_and_an_unknown_one():
    x = torch.randn(4, 2)
    assert pairing(x, x.flip(0), method="none").tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="greedy"):
        pairing(x, x, method="greedy")
