"""Rectified flow's clock, inversion and straightness, on flows known in closed form."""

import pytest
import torch

from nexus.process.paths import RectifiedPath
from nexus.process.rectified import StraightPath, euler_sde, invert, straightness
from nexus.process.samplers import sample
from nexus.process.schedules import grid
from tests.exact import gaussian, gaussian_flow

PATH = StraightPath()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turning(x, t):
    """A quarter turn of the plane: the paths are arcs of length pi/2 times the radius."""
    return torch.stack([-x[:, 1], x[:, 0]], 1) * (torch.pi / 2)


def velocity_of(denoise):
    """The velocity that an x0 estimate implies on a straight line."""
    return lambda x, t: (denoise(x, t) - x) / t


def test_the_network_is_told_999_at_the_data_and_about_1_at_the_noise():
    t = torch.tensor([1.0, 0.5, 0.0])
    assert PATH.network_time(t).tolist() == pytest.approx([0.999, 0.5005 * 999, 999.0])
    assert PATH.times(4).tolist() == [1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal", "mode", "cosmap"])
def test_training_states_never_reach_pure_noise(sampling):
    t = StraightPath(time_sampling=sampling).sample_t(10_000, torch.Generator().manual_seed(0))
    s = 1 - PATH.trained_at(t)
    assert 0 <= t.min() and t.max() <= 1 and s.min() >= 1e-3 - 1e-7 and s.max() <= 1
    if sampling == "uniform":
        assert s.mean().item() == pytest.approx(0.5005, abs=0.01)
    if sampling == "logit-normal":
        assert t.logit().mean().item() == pytest.approx(0, abs=0.05)
        assert t.logit().std().item() == pytest.approx(1, abs=0.05)


def test_velocity_of_the_path_points_to_the_data_and_minrfs_to_the_noise():
    t = torch.tensor([0.3])
    assert [r.item() for r in PATH.rates(t)] == [1, -1] and [r.item() for r in RectifiedPath().rates(t)] == [-1, 1]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_flow_of_straight_paths_has_straightness_zero(steps):
    x = noise(5, 2)
    aim = noise(5, 2, seed=1)
    assert straightness(lambda x, t: aim, x, steps=steps).abs().max() < 1e-28
    dot = velocity_of(lambda x, t: torch.full_like(x, 0.7))       # all data at one point: every path is a line to it
    assert straightness(dot, x, steps=steps).abs().max() < 1e-20


def test_a_curved_flow_has_the_straightness_of_its_arcs():
    """A quarter turn of radius r: the chord is r root 2, the speed r pi/2, so S = r^2 (pi^2/4 - 2) / 2."""
    x = noise(6, 2)
    radius = x.square().sum(1)
    found = straightness(turning, x, steps=4000)
    torch.testing.assert_close(found, radius * (torch.pi**2 / 4 - 2) / 2, rtol=2e-3, atol=0)
    assert (found > 0).all()


def test_gaussian_data_curves_the_flow_and_reflowed_pairs_do_not():
    curved = velocity_of(gaussian(RectifiedPath(), 1.5, 0.2))
    x = noise(4, 3)
    assert straightness(curved, x, steps=64).min() > 1e-4
    mapped = gaussian_flow(x, 1.5, 0.2, (0, 1), (1, 0))            # reflow: every noise has its own target
    assert straightness(lambda z, t: mapped - x, x).max() < 1e-28


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_inversion_finds_the_noise_with_the_order_of_its_method(method, order):
    turned = torch.stack([-noise(3, 2)[:, 1], noise(3, 2)[:, 0]], 1)
    errors = [(invert(turning, turned, steps=n, method=method) - noise(3, 2)).abs().max() for n in (8, 16)]
    assert (errors[0] / errors[1]).log2().item() == pytest.approx(order, abs=0.25)


def test_inversion_and_sampling_undo_each_other():
    path, x = RectifiedPath(), noise(4, 3)
    denoise = gaussian(path, 0.3, 0.8)

    def velocity(x, t):
        return velocity_of(denoise)(x, t.clamp(min=1e-6))
    data = gaussian_flow(x, 0.3, 0.8, (0, 1), (1, 0))
    assert (invert(velocity, data, steps=40, method="rk4") - x).abs().max() < 1e-5
    half = invert(velocity, data, until=0.5, steps=40, method="rk4")
    assert (half - gaussian_flow(x, 0.3, 0.8, (0, 1), (0.5, 0.5))).abs().max() < 1e-5
    assert (sample("rk4", denoise, x, grid(path, path.times(40))) - data).abs().max() < 1e-4


def test_noise_free_stochastic_euler_is_euler_and_noise_changes_it():
    points, x = grid(PATH, PATH.times(9)), noise(4, 3)
    denoise = gaussian(PATH, 0.3, 0.5)
    plain = sample("euler", denoise, x, points)
    assert (euler_sde(denoise, x, points, spread=0.0) - plain).abs().max() < 1e-14
    steps = []
    drawn = euler_sde(denoise, x, points, spread=0.3, watch=lambda i, x, x0: steps.append(i))
    assert steps == list(range(9)) and (drawn - plain).abs().max() > 1e-3
