"""Gradient penalties against critics whose gradients are known; diversity against sets of known spread."""

import pytest
import torch
from torch import nn

from nexus.losses.adversarial import LOSSES
from nexus.losses.diversity import diversity
from nexus.losses.regularisers import clip_weights, drift, gradient_penalty, gradient_square


def pictures(seed, n=4):
    return torch.randn(n, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", [0.0, 0.25, 1.0, 3.0])
def test_the_penalty_of_a_linear_critic_is_its_length_from_one(length):
    w = pictures(0, 1).flatten()
    w = (length * w / w.norm()).float()
    penalty = gradient_penalty(lambda x: x.flatten(1).float() @ w[:, None], pictures(1), pictures(2),
                               torch.Generator())
    assert penalty.item() == pytest.approx((length - 1) ** 2, abs=1e-5)


def test_the_penalty_is_taken_between_the_pictures_and_can_be_learnt_from():
    seen = []

    def critic(x):
        seen.append(x)
        return scale * x.flatten(1).square().sum(1)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    real, fake = pictures(1), pictures(2)
    rng = torch.Generator().manual_seed(3)
    penalty = gradient_penalty(critic, real, fake, rng)
    share = ((seen[0] - fake) / (real - fake)).detach().flatten(1)
    assert torch.allclose(share, share[:, :1].expand_as(share)) and (share > 0).all() and (share < 1).all()
    lengths = seen[0].flatten(1).norm(dim=1)                    # the gradient of |x|^2 / 2 is x
    assert penalty.item() == pytest.approx((lengths - 1).square().mean().item(), rel=1e-5)
    slope, = torch.autograd.grad(penalty, scale)
    assert slope.item() == pytest.approx((2 * (lengths - 1) * 2 * lengths).mean().item(), rel=1e-4)


def test_r1_of_a_square_and_of_a_linear_critic():
    x = pictures(4).requires_grad_()
    square = gradient_square(x.square().flatten(1).sum(1), x)
    assert square.item() == pytest.approx(2 * x.detach().square().flatten(1).sum(1).mean().item(), rel=1e-5)
    w = pictures(5, 1)
    linear = gradient_square((x * w).flatten(1).sum(1, keepdim=True), x)
    assert linear.item() == pytest.approx(0.5 * w.square().sum().item(), rel=1e-5)


def test_drift_and_clipping():
    assert drift(torch.tensor([1.0, -2.0, 3.0])).item() == pytest.approx(14 / 3)
    net = nn.Linear(5, 5)
    clip_weights(net, 0.01)
    assert all(p.abs().max() <= 0.01 for p in net.parameters())


def test_the_best_critic_of_each_loss_on_two_laws():
    """Over two places with known chances, the minimising scores are the published optima."""
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.4, 0.6])
    real = torch.tensor([0] * 75 + [1] * 25)
    fake = torch.tensor([0] * 40 + [1] * 60)
    best = {"non-saturating": (p / q).log(), "lsgan": p / (p + q), "hinge": torch.tensor([1.0, -1.0])}
    for name, expected in best.items():
        scores = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.SGD([scores], lr=0.2)
        for _ in range(600):
            optimizer.zero_grad()
            LOSSES[name].critic(scores[real], scores[fake]).backward()
            optimizer.step()
        assert torch.allclose(scores.detach(), expected, atol=0.15 if name == "hinge" else 1e-2), name


def test_the_best_critic_of_the_logistic_loss_measures_jensen_shannon():
    p, q = torch.tensor([0.75, 0.25]), torch.tensor([0.4, 0.6])
    real, fake = (p / q).log()[[0] * 75 + [1] * 25], (p / q).log()[[0] * 40 + [1] * 60]
    m = (p + q) / 2
    divergence = 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
    expected = 2 * torch.log(torch.tensor(2.0)) - 2 * divergence
    assert LOSSES["minimax"].critic(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_wasserstein_critic_of_a_shift_measures_the_shift():
    real = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
    fake = real - 1.7                                           # the best 1-Lipschitz critic is the identity
    assert -LOSSES["wasserstein"].critic(real, fake).item() == pytest.approx(1.7, rel=1e-5)


def test_diversity_is_one_for_the_data_and_zero_when_collapsed():
    x = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    assert diversity(x, x).item() == pytest.approx(1.0)
    assert diversity(x[:1].expand(16, -1, -1, -1), x).item() == pytest.approx(0.0, abs=1e-3)
    assert diversity(0.5 * x, x).item() == pytest.approx(0.5)
    assert diversity(x[:1], x[:1]).item() == 0.0                # of one picture there is nothing to say
    fine = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    noisy = x[:1] + fine - torch.nn.functional.interpolate(torch.nn.functional.adaptive_avg_pool2d(fine, 8), 32)
    assert diversity(noisy, x).item() < 0.01                    # noise within a patch is no diversity
