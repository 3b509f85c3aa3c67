"""Adversarial losses against their definitions in probabilities, and the gradient balance of VQGAN."""

import math

import pytest
import torch

from nexus.losses.adversarial import LOSSES, WEIGHT_LIMIT, balance, feature_distance


def scores(seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(5, 1, 3, 3, generator=rng, dtype=torch.float64) for _ in range(2))


def test_the_logistic_losses_are_the_log_likelihoods_of_a_sigmoid_critic():
    real, fake = scores()
    p, q = real.sigmoid(), fake.sigmoid()
    critic = -(p.log().mean() + (1 - q).log().mean())
    for name in ("minimax", "non-saturating"):
        torch.testing.assert_close(LOSSES[name].critic(real, fake), critic)
    torch.testing.assert_close(LOSSES["minimax"].generator(real, fake), (1 - q).log().mean())
    torch.testing.assert_close(LOSSES["non-saturating"].generator(real, fake), -q.log().mean())


def test_the_best_blind_critic_pays_two_log_two():
    zero, half = torch.zeros(4), torch.full((4,), 0.5)
    assert LOSSES["minimax"].critic(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert LOSSES["relativistic"].critic(zero, zero).item() == pytest.approx(math.log(2))
    assert LOSSES["lsgan"].critic(half, half).item() == pytest.approx(0.25)


@pytest.mark.parametrize("name", LOSSES)
def test_critic_and_generator_pull_the_fake_scores_apart(name):
    real, fake = (s.clamp(-0.9, 0.9).requires_grad_() for s in scores(1))
    down, = torch.autograd.grad(LOSSES[name].critic(real, fake), fake)
    up, = torch.autograd.grad(LOSSES[name].generator(real, fake), fake)
    if name == "lsgan":         # its pull ends at the targets 0 and 1
        assert torch.equal(down.sign(), fake.detach().sign()) and (up < 0).all()
    else:
        assert (down > 0).all() and (up < 0).all()


def test_only_comparing_losses_ignore_a_shift_of_all_scores():
    real, fake = scores(2)
    unmoved = {name for name, loss in LOSSES.items()
               if torch.allclose(loss.critic(real, fake), loss.critic(real + 3, fake + 3))}
    assert unmoved == {"relativistic", "wasserstein"}


def test_hinge_leaves_scores_beyond_the_margin_alone():
    real, fake = torch.tensor([1.5, 0.0], requires_grad=True), torch.tensor([-2.0, 0.0], requires_grad=True)
    LOSSES["hinge"].critic(real, fake).backward()
    assert real.grad.tolist() == [0.0, -0.5] and fake.grad.tolist() == [0.0, 0.5]


def test_balance_equalises_the_gradients():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    main, other = (weight * torch.tensor([3.0, 1.0, 2.0])).sum() * 10, weight.square().sum()
    factor = balance(main, other, weight)
    ours, theirs = (torch.autograd.grad(loss, weight, retain_graph=True)[0].norm() for loss in (main, factor * other))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert not factor.requires_grad
    assert balance(main, 1e-30 * other, weight) == WEIGHT_LIMIT


def test_feature_distance_is_relative_to_the_real_features():
    real = [torch.ones(2, 3), 100 * torch.ones(2, 5)]
    assert feature_distance(real, real) == 0
    assert feature_distance(real, [1.1 * r for r in real]).item() == pytest.approx(0.1, rel=1e-5)
    fixed, fake = [r.clone().requires_grad_() for r in real], [(2 * r).requires_grad_() for r in real]
    feature_distance(fixed, fake).backward()
    assert all(r.grad is None for r in fixed) and all((f.grad > 0).all() for f in fake)
