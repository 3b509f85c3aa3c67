import pytest
import torch

from nexus.process.guidance import classifier_guided, combine, during, guided, guided_batch
from nexus.process.paths import DiscretePath, RectifiedPath
from nexus.process.predictions import Estimate
from nexus.process.samplers import sample
from nexus.process.schedules import grid
from tests.exact import gaussian, mixture

PATH = DiscretePath()
T = torch.tensor(300.0, dtype=torch.float64)


def pair():
    return gaussian(PATH, 1.0, 0.5), gaussian(PATH, -1.0, 0.5)


def test_scales_zero_and_one_are_the_denoisers_themselves():
    cond, uncond = pair()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert torch.equal(guided(cond, uncond, 1.0)(x, T), cond(x, T))
    assert torch.equal(guided(cond, uncond, 0.0)(x, T), uncond(x, T))


def test_guidance_of_x0_is_guidance_of_eps():
    cond, uncond = pair()
    x = torch.randn(3, 4, dtype=torch.float64)
    a, s = PATH.at(T)
    eps_c, eps_u = ((x - a * d(x, T)) / s for d in (cond, uncond))
    eps = eps_u + 4.0 * (eps_c - eps_u)
    torch.testing.assert_close((x - a * guided(cond, uncond, 4.0)(x, T)) / s, eps)


def test_rescale_restores_the_standard_deviation():
    cond, uncond = torch.randn(2, 3, 4, 8, 8)
    full, half, none = (combine(cond, uncond, 7.0, r) for r in (1.0, 0.5, 0.0))
    torch.testing.assert_close(full.flatten(1).std(1), cond.flatten(1).std(1))
    torch.testing.assert_close(half, (full + none) / 2)


def test_channels_beyond_the_guided_ones_are_conds():
    cond, uncond = torch.randn(2, 3, 4, 2, 2)
    x0 = combine(cond, uncond, 3.0, channels=3)
    assert torch.equal(x0[:, 3:], cond[:, 3:])
    torch.testing.assert_close(x0[:, :3], (3 * cond - 2 * uncond)[:, :3])


def test_scale_may_depend_on_time_and_items_may_have_their_own():
    cond, uncond = pair()
    x = torch.randn(2, 4, dtype=torch.float64)
    t = torch.tensor([100.0, 300.0], dtype=torch.float64)
    denoise = guided(cond, uncond, lambda t: 1 + t / 100)
    for i, scale in enumerate((2.0, 4.0)):
        want = combine(cond(x[i:i + 1], t[i]), uncond(x[i:i + 1], t[i]), scale)
        torch.testing.assert_close(denoise(x, t)[i:i + 1], want)
        torch.testing.assert_close(denoise(x[i:i + 1], t[i]), want)


def test_interval_counts_steps():
    g = grid(RectifiedPath(), RectifiedPath().times(10))
    for lo, hi, want in ((0.0, 1.0, range(10)), (0.2, 0.8, range(2, 8)), (0.5, 0.5, ()), (0.0, 0.1, (0,)),
                         (0.85, 1.0, (9,))):
        assert [i for i in range(10) if during(g, lo, hi)(g.t[i])] == list(want)
    active = during(g, 0.2, 0.8)
    assert active((g.t[7] + g.t[8]) / 2)                    # within the last guided step
    assert not active((g.t[8] + g.t[9]) / 2)


def test_outside_the_interval_only_cond_is_called():
    g = grid(PATH, PATH.times(10))
    cond, uncond = pair()
    calls = []
    denoise = guided(cond, lambda x, t: calls.append(t.item()) or uncond(x, t), 3.0, active=during(g, 0.3, 0.6))
    sample("euler", denoise, torch.randn(2, 4), g)
    assert calls == g.t[3:6].tolist()


def test_cond_variance_is_kept():
    x = torch.randn(2, 4)
    denoise = guided_batch(lambda x, t: (Estimate(x, x + 1), Estimate(-x, x + 2)), 2.0)
    result = denoise(x, T)
    torch.testing.assert_close(result.x0, 3 * x)
    assert torch.equal(result.fraction, x + 1)


def test_batched_pair_equals_two_calls():
    cond, uncond = pair()

    def batch(x, t):
        means = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])[:, None]
        return gaussian(PATH, means, 0.5)(torch.cat([x, x]), t).chunk(2)

    x = torch.randn(3, 4)
    torch.testing.assert_close(guided_batch(batch, 5.0)(x, T), guided(cond, uncond, 5.0)(x, T))


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_classifier_guidance_turns_the_mixture_into_its_class(scale):
    # with the exact classifier, scale 1 is Bayes' rule: E[x0 | x, class] from E[x0 | x] and grad log p(class | x)
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=torch.float64)
    everything, one = mixture(PATH, points, 0.3), mixture(PATH, points[:1], 0.3)

    def log_prob(x, t):
        a, s = PATH.at(t)
        gap = (x[:, None] - a * points).square().sum(-1) / (2 * (a * a * 0.09 + s * s))
        return torch.log_softmax(-gap, dim=1)[:, 0]

    x = torch.randn(5, 2, dtype=torch.float64)
    steered = classifier_guided(everything, log_prob, PATH, scale)(x, T)
    torch.testing.assert_close(steered, (one if scale else everything)(x, T))


def test_classifier_guidance_at_pure_noise_does_nothing():
    path = RectifiedPath()
    x = torch.randn(2, 2)
    denoise = classifier_guided(gaussian(path, 1.0, 0.5), None, path, 2.0)
    assert torch.equal(denoise(x, torch.tensor(1.0)), gaussian(path, 1.0, 0.5)(x, torch.tensor(1.0)))
