import itertools
import math

import pytest
import torch

from nexus.process.likelihood import (
    bits_per_dim,
    decoder_log_prob,
    divergence,
    flow_log_likelihood,
    hybrid_vlb,
    log_likelihood,
    prior_bits,
    rademacher,
    vb_terms,
)
from nexus.process.paths import AffinePath, DiscretePath, RectifiedPath, VEPath
from nexus.process.predictions import Estimate, noised
from nexus.process.schedules import grid
from tests.exact import gaussian


def normal(mean, std):
    return torch.distributions.Normal(mean, std)


def test_decoder_is_a_distribution_over_the_levels():
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, std in itertools.product((-1.2, 0.1, 0.9), (0.005, 0.1, 2.0)):
        log_p = decoder_log_prob(levels, torch.full_like(levels, mean), torch.full_like(levels, math.log(std)))
        assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-8)
    middle = decoder_log_prob(levels, torch.zeros(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64))
    want = normal(0.0, 1.0).cdf(levels + 1 / 255) - normal(0.0, 1.0).cdf(levels - 1 / 255)
    torch.testing.assert_close(middle[1:-1].exp(), want[1:-1], rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_bits_per_dim_is_the_bound_by_brute_force(variance):
    path = DiscretePath(steps=3, beta_start=0.1, beta_end=0.5)
    beta = torch.linspace(0.1, 0.5, 3, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    x0 = torch.linspace(-1, 1, 256, dtype=torch.float64)[[30, 128, 255]].reshape(3, 1)
    noise = torch.randn(3, 3, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws = iter(noise)
    got = bits_per_dim(lambda x, t: 0.6 * x, x0, grid(path, path.times(3)), lambda x: next(draws), variance=variance)
    want = [torch.distributions.kl_divergence(normal(bar[2].sqrt() * x0, (1 - bar[2]).sqrt()),
                                              normal(torch.zeros_like(x0), torch.ones_like(x0)))]
    for t, eps in zip((2, 1, 0), noise, strict=True):
        x = bar[t].sqrt() * x0 + (1 - bar[t]).sqrt() * eps
        before = bar[t - 1] if t else torch.ones((), dtype=torch.float64)
        posterior = beta[t] * (1 - before) / (1 - bar[t])
        first = beta[1] * (1 - bar[0]) / (1 - bar[1])       # the clipped variance of t = 0
        std = (beta[t] if variance == "large" else posterior if t else first).sqrt()

        def mean(x0, before=before, t=t, x=x):
            return (before.sqrt() * beta[t] * x0 + (1 - beta[t]).sqrt() * (1 - before) * x) / (1 - bar[t])
        if t:
            true, model = normal(mean(x0), posterior.sqrt()), normal(mean(0.6 * x), std)
            want.append(torch.distributions.kl_divergence(true, model))
        else:
            p = normal(mean(0.6 * x), std)
            upper = torch.where(x0 > 0.999, 1.0, p.cdf(x0 + 1 / 255))
            want.append(-(upper - p.cdf(x0 - 1 / 255)).clamp(min=1e-12).log())
    want = torch.stack(want)[..., 0] / math.log(2)
    torch.testing.assert_close(got.prior, want[0])
    torch.testing.assert_close(got.terms, want[1:])
    torch.testing.assert_close(got.total, want.sum(0))


def test_training_terms_are_the_bounds():
    path = DiscretePath(steps=10)
    x0 = torch.rand(4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def model(x, t):
        return Estimate(0.5 * x, torch.full_like(x, 0.3))

    bound = bits_per_dim(model, x0, grid(path, path.times(10)), lambda x: eps)
    for t in range(10):
        when = torch.full((4,), float(t))
        x = noised(path, x0, eps, when.double())
        terms = vb_terms(path, x0, when, *model(x, when))
        torch.testing.assert_close(terms.double(), bound.terms[9 - t], rtol=1e-4, atol=1e-6)


def test_the_exact_chain_nearly_reaches_the_data_entropy():
    # data N(0, 0.2^2) in levels finer than itself; reverse steps are nearly Gaussian of the large variance
    path = DiscretePath(steps=1000)
    rng = torch.Generator().manual_seed(0)
    levels = (torch.randn(2000, 1, generator=rng, dtype=torch.float64) * 0.2).clamp(-1, 1)
    x0 = (levels * 127.5 + 127.5).round() / 127.5 - 1
    got = bits_per_dim(gaussian(path, 0.0, 0.2), x0, grid(path, path.times(1000)),
                       lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype), variance="large").total.mean()
    best = -(normal(0.0, 0.2).log_prob(x0) / math.log(2)).mean() + math.log2(127.5)
    assert best - 0.03 < got < best + 0.1                   # both are averages over 2000 draws


def test_hybrid_term_trains_the_variance_alone():
    path = DiscretePath()
    x0, x0_hat, fraction = torch.rand(3, 4, 2, 3, 3)
    x0_hat.requires_grad_(), fraction.requires_grad_()
    t = torch.tensor([0.0, 1.0, 500.0, 999.0])
    loss = hybrid_vlb(path, x0, t, x0_hat, fraction)
    assert loss.shape == (4,)
    assert loss.isfinite().all()
    loss.sum().backward()
    assert x0_hat.grad is None
    assert (fraction.grad != 0).any()
    torch.testing.assert_close(loss, vb_terms(path, x0, t, x0_hat, fraction))     # weight 1e-3 x 1000 steps


def test_no_term_is_negative_and_the_true_posterior_costs_nothing():
    path = DiscretePath()
    x0 = torch.rand(6, 3) * 2 - 1
    t = torch.tensor([1.0, 2.0, 10.0, 100.0, 500.0, 999.0])
    torch.testing.assert_close(vb_terms(path, x0, t, x0, 0.0), torch.zeros(6))
    assert (vb_terms(path, x0, t, x0 * 0, 0.4) > 0).all()


def test_prior_of_pure_noise_is_free():
    assert prior_bits(torch.randn(2, 3), 0.0, 1.0).tolist() == [0, 0]


def test_hutchinson_is_exact_for_diagonal_and_right_on_average():
    y = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(4, 4, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(divergence(y @ matrix.T, y, None), matrix.trace().expand(3))
    diagonal = matrix.diag()
    torch.testing.assert_close(divergence(y * diagonal, y, rademacher(1, y, rng)), diagonal.sum().expand(3))
    estimate = divergence(y @ matrix.T, y, rademacher(3000, y, rng)).mean()
    assert estimate.item() == pytest.approx(matrix.trace().item(), abs=0.15)


def test_linear_flow_has_a_gaussian_density():
    matrix = torch.tensor([[0.3, -0.5], [0.8, -0.2]], dtype=torch.float64)
    y = torch.randn(5, 2, dtype=torch.float64)
    w = torch.linspace(0, 1, 41, dtype=torch.float64)

    def log_prior(y):
        return normal(0.0, 1.0).log_prob(y).sum(1)
    got = flow_log_likelihood(lambda y, _: y @ matrix.T, y, w, log_prior, None)
    back = torch.linalg.matrix_exp(-matrix)                 # y(0) = back y(1), y(1) standard normal
    want = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=torch.float64), back @ back.T).log_prob(y)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", [RectifiedPath(), VEPath(), DiscretePath(), AffinePath(scheduler="cosine")],
                         ids=lambda p: p.kind)
@pytest.mark.parametrize("exact", [True, False])
def test_gaussian_data_has_its_exact_likelihood(path, exact):
    x0 = 0.2 + 0.5 * torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = grid(path, path.times(80, schedule="log-snr"))
    probes = None if exact else rademacher(1, x0, torch.Generator().manual_seed(0))
    got = log_likelihood(gaussian(path, 0.2, 0.5), x0, g, probes)
    want = normal(0.2, 0.5).log_prob(x0).sum(1)
    torch.testing.assert_close(got, want, rtol=0, atol=0.03)        # x0 is taken to lie at the cleanest time
