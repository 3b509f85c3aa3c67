"""The loss balancer: each loss has its share of the gradient, whatever its scale."""

import pytest
import torch

from nexus.losses.balancer import Balancer


def made(seed=0):
    return torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def direction(seed):
    return torch.randn(3, 2, 50, generator=torch.Generator().manual_seed(seed))


def length(gradient):
    """The mean over the items of each one's gradient's length."""
    return gradient.flatten(1).norm(dim=1).mean()


def pull(balancer, losses, x):
    return torch.autograd.grad(balancer(losses, x), x)[0]


def test_shares_of_the_gradient_are_the_weights():
    x, parts = made(), {}
    for name in ("a", "b"):                                 # what the balancer makes of each loss beside the other
        losses = {"a": (1e3 * direction(1) * x).sum(), "b": (1e-4 * direction(2) * x).sum()}
        mine = Balancer({"a": 3.0, "b": 1.0})
        losses |= {other: 0.0 * x.sum() for other in losses if other != name}
        parts[name] = pull(mine, losses, x)
    assert length(parts["a"]) == pytest.approx(0.75, abs=1e-4) and length(parts["b"]) == pytest.approx(0.25, abs=1e-4)
    both = pull(Balancer({"a": 3.0, "b": 1.0}), {"a": (1e3 * direction(1) * x).sum(),
                                                 "b": (1e-4 * direction(2) * x).sum()}, x)
    torch.testing.assert_close(both, parts["a"] + parts["b"])
    cosine = torch.cosine_similarity(parts["a"].flatten(), direction(1).flatten(), dim=0)
    assert cosine == pytest.approx(1.0, abs=1e-5)


def test_the_scale_of_a_loss_does_not_matter():
    x = made()
    pulls = [pull(Balancer({"a": 1.0, "b": 2.0}), {"a": scale * (direction(1) * x).sum(), "b": x.square().mean()}, x)
             for scale in (1.0, 1e4)]
    torch.testing.assert_close(pulls[0], pulls[1])


def test_one_loss_alone_has_the_whole_length():
    x = made()
    for total in (1.0, 2.5):
        mine = Balancer({"a": 0.3, "b": 9.0}, total=total)
        assert length(pull(mine, {"a": (direction(1) * x).sum()}, x)) == pytest.approx(total, abs=1e-4)


def test_the_average_length_is_the_decayed_mean():
    mine, x, decay, seen = Balancer({"a": 1.0}, decay=0.8), made(), 0.8, []
    for step in range(6):
        scale = 2.0 ** step
        found = pull(mine, {"a": scale * (direction(1) * x).sum()}, x)
        seen.append(scale * length(direction(1)))
        weights = [decay ** (step - i) for i in range(step + 1)]
        mean = sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)
        torch.testing.assert_close(found, scale * direction(1) / mean)


def test_its_value_is_the_weighted_sum():
    mine, x = Balancer({"a": 3.0, "b": 0.5}), made()
    losses = {"a": x.square().mean(), "b": x.abs().sum()}
    torch.testing.assert_close(mine(losses, x), 3 * losses["a"] + 0.5 * losses["b"])


def test_a_loss_that_comes_later_is_not_diluted_by_the_steps_before_it():
    mine, x = Balancer({"a": 1.0, "b": 1.0}), made()
    for _ in range(5):
        pull(mine, {"a": (direction(1) * x).sum()}, x)
    late = pull(mine, {"a": 0.0 * x.sum(), "b": 7.0 * (direction(2) * x).sum()}, x)
    assert length(late) == pytest.approx(0.5, abs=1e-4)


def test_a_gradient_that_is_not_finite_is_not_remembered():
    mine, x = Balancer({"a": 1.0}), made()
    pull(mine, {"a": (direction(1) * x).sum()}, x)
    before = {key: tensor.clone() for key, tensor in mine.state_dict().items()}
    assert not mine({"a": (x * float("inf")).sum()}, x).isfinite()
    assert all(torch.equal(tensor, before[key]) for key, tensor in mine.state_dict().items())


def test_what_it_remembers_is_saved_and_decides_what_follows():
    one, two, x = Balancer({"a": 1.0}), Balancer({"a": 1.0}), made()
    pull(one, {"a": 9.0 * x.sum()}, x)
    two.load_state_dict(one.state_dict())
    losses = {"a": x.square().sum()}
    assert torch.equal(pull(one, losses, x), pull(two, losses, x))
