"""Frechet and kernel distances against closed forms and loops; precision, recall, density, coverage by hand."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from nexus.errors import InputError
from nexus.evaluate.frechet import frechet, gaussian_distance, moments
from nexus.evaluate.kernel import kid, kid_subsets
from nexus.evaluate.manifold import density_coverage, precision_recall, radii


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed), dtype=torch.float64)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def sample(n: int, mean: Tensor, cov: Tensor, seed: int = 0) -> Tensor:
    """n points whose mean and unbiased covariance are exactly these."""
    x = random(n, len(mean), seed=seed)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), (x - x.mean(0)).T, upper=False)
    return (torch.linalg.cholesky(cov) @ white).T + mean


# The Frechet distance

def test_gaussians_on_the_same_axes_differ_by_means_and_deviations():
    mean1, mean2 = random(5), random(5, seed=1)
    std1, std2 = random(5, seed=2).abs(), random(5, seed=3).abs()
    turn = torch.linalg.qr(random(5, 5, seed=4)).Q
    want = float((mean1 - mean2).square().sum() + (std1 - std2).square().sum())
    found = gaussian_distance(turn @ mean1, turn @ std1.square().diag() @ turn.T,
                              turn @ mean2, turn @ std2.square().diag() @ turn.T)
    assert found == pytest.approx(want, rel=1e-10)


def test_two_dimensions_that_do_not_commute_have_a_closed_form():
    cov1, cov2 = torch.tensor([[2, 0.5], [0.5, 1]]).double(), torch.tensor([[1, -0.7], [-0.7, 3]]).double()
    mixed = cov1 @ cov2         # its root has the trace (tr + 2 det^(1/2))^(1/2)
    root = math.sqrt(float(mixed.trace()) + 2 * math.sqrt(float(mixed.det())))
    found = frechet(sample(40, torch.zeros(2).double(), cov1), sample(50, torch.ones(2).double(), cov2, seed=1))
    assert found == pytest.approx(2 + 3 + 4 - 2 * root, rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_even_with_fewer_pictures_than_features():
    assert frechet(random(4, 10), random(4, 10)) == pytest.approx(0, abs=1e-6)


def test_moments_are_unbiased_and_need_two_pictures():
    mean, cov = moments(column(1, 3))
    assert mean.tolist() == [2] and cov.tolist() == [[2]]
    with pytest.raises(InputError):
        moments(random(1, 4))


# The kernel distance

def looped(x: Tensor, y: Tensor) -> float:
    def k(a, b):
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3
    def mean(values):
        values = list(values)
        return sum(values) / len(values)
    within = [mean(k(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j) for z in (x, y)]
    return sum(within) - 2 * mean(k(a, b) for a in x for b in y)


def test_kid_and_its_jackknife_error_equal_loops():
    x, y = random(6, 3), random(5, 3, seed=1) + 0.5
    variance = 0.0
    for n, values in ((6, [looped(torch.cat([x[:i], x[i + 1:]]), y) for i in range(6)]),
                      (5, [looped(x, torch.cat([y[:i], y[i + 1:]])) for i in range(5)])):
        variance += (n - 1) / n * sum((v - sum(values) / n) ** 2 for v in values)
    assert kid(x, y) == pytest.approx((looped(x, y), math.sqrt(variance)), rel=1e-9)


def test_kid_is_unbiased_over_every_sample_of_a_finite_population():
    x, y = column(-1.0, 0.5), column(0.0, 1.0, 2.0)
    def k(a, b):
        return float(((a @ b.T + 1) ** 3).mean())
    exact = k(x, x) + k(y, y) - 2 * k(x, y)
    found = [kid(x[list(i)], y[list(j)])[0] for i in product(range(2), repeat=3) for j in product(range(3), repeat=3)]
    assert sum(found) / len(found) == pytest.approx(exact, rel=1e-9)


def test_kid_is_about_zero_within_its_error_for_one_distribution_and_not_for_two():
    value, error = kid(random(300, 4), random(200, 4, seed=1))
    assert abs(value) < 3 * error
    value, error = kid(random(300, 4), random(200, 4, seed=1) + 0.5)
    assert value > 3 * error


def test_kid_of_the_whole_sets_is_the_only_subset_of_that_size():
    x, y = random(6, 3), random(6, 3, seed=1)
    value, spread = kid_subsets(x, y, 6, 4, rng())
    assert value == pytest.approx(kid(x, y)[0]) and spread == pytest.approx(0, abs=1e-9)


def test_kid_refuses_too_few_pictures():
    with pytest.raises(InputError):
        kid(random(2, 3), random(9, 3))
    with pytest.raises(InputError):
        kid_subsets(random(4, 3), random(9, 3), 5, 2, rng())


# The manifolds

REAL = column(0, 1, 2, 10)          # nearest neighbours at 1, 1, 1, 8


def test_precision_and_recall_by_hand():
    precise, recalled = precision_recall(REAL, column(0.5, 3, 4, 25, 26), k=1)      # at 2.5, 1, 1, 1, 1
    assert precise.tolist() == [1, 1, 1, 0, 0]
    assert recalled.tolist() == [1, 1, 1, 0]


def test_density_and_coverage_by_hand():
    density, covered = density_coverage(REAL, column(0.5, 4, 25), k=1)
    assert density.tolist() == [2, 1, 0]
    assert covered.tolist() == [1, 1, 0, 1]
    assert density_coverage(REAL, column(0.5, 3, 4, 25), k=2)[0].tolist() == [1.5, 1, 1, 0]


def test_equal_sets_overlap_wholly_and_distant_ones_not_at_all():
    x = random(20, 3)
    assert all(v.mean() == 1 for v in (*precision_recall(x, x), density_coverage(x, x)[1]))
    assert all(v.mean() == 0 for v in (*precision_recall(x, x + 100), *density_coverage(x, x + 100)))


def test_the_kth_neighbour_needs_more_than_k_pictures():
    assert radii(REAL, 3).tolist() == [10, 9, 8, 10]
    with pytest.raises(InputError):
        radii(REAL, 4)
