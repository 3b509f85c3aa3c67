"""Bits a dimension against laws that are known in closed form, and the refusals of `nexus eval --likelihood`."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nexus.errors import UsageError
from nexus.evaluate.density import bits
from nexus.process.paths import DiscretePath, RectifiedPath
from tests.exact import gaussian

STD = 0.5
LEVELS = torch.linspace(-1, 1, 256)


class Exact(nn.Module):
    """A network that says x0 as well as it can be said for data N(0, STD^2)."""

    def __init__(self, path):
        super().__init__()
        self.path, self.weight = path, nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond=None, prepared=None):
        return gaussian(self.path, 0.0, STD)(x, t.double() / getattr(self.path, "time_scale", 1.0)) + 0 * self.weight


def system(path, **changes):
    config = SimpleNamespace(**{"path": path, "prediction": "x0", "latent_shape": (1, 8, 8), "codec": None,
                                "learned_variance": False, "clip": False, "variance": "small", **changes})
    built = nn.Module()
    built.config, built.net, built.conditioner = config, Exact(path), None
    return built


def pictures(n):
    """Levels drawn from N(0, STD^2), and their mean -log2 probability a dimension (all levels: 95 % of the mass)."""
    nats = torch.distributions.Normal(0.0, STD).log_prob(LEVELS) + math.log(2 / 255)
    index = torch.multinomial(nats.exp(), n * 64, replacement=True, generator=torch.Generator().manual_seed(0))
    return LEVELS[index].reshape(n, 1, 8, 8), -nats[index].reshape(n, 64).mean(1) / math.log(2)


def batches(x, size):
    return (({"image": part}, [None] * len(part)) for part in x.split(size))


def test_the_ode_of_an_exact_network_gives_the_probability_itself():
    x, want = pictures(24)
    found, facts = bits(system(RectifiedPath()), batches(x, 8), seed=0)
    assert found.mean() == pytest.approx(want.mean().item(), abs=0.01) and facts["likelihood_steps"] == 64


def test_the_bound_of_a_chain_is_one_and_tighter_with_more_steps():
    x, want = pictures(24)
    few, (many, facts) = (bits(system(DiscretePath()), batches(x, 8), seed=0, steps=n) for n in (100, None))
    assert want.mean() < many.mean() < few[0].mean() < want.mean() + 2.5
    assert facts["likelihood_steps"] == 1000


@pytest.mark.parametrize("path", [DiscretePath(), RectifiedPath()], ids=["chain", "flow"])
def test_a_pictures_draws_do_not_depend_on_its_batch(path):
    x, _ = pictures(3)
    together, alone = (bits(system(path), batches(x, size), seed=1, steps=20)[0] for size in (3, 1))
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert not torch.equal(together, bits(system(path), batches(x, 3), seed=2, steps=20)[0])


def test_a_latent_model_has_none():
    with pytest.raises(UsageError, match="latents"):
        bits(system(DiscretePath(), codec=object()), iter(()), seed=0)
