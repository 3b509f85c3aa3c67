import math
from functools import partial

import pytest
import torch

from nexus import requests
from nexus.errors import InputError, NexusError, UsageError
from nexus.process.paths import AffinePath, DiscretePath, RectifiedPath, VEPath
from nexus.process.predictions import Estimate, clipped, masked, over, paste
from nexus.process.samplers import SAMPLERS, TAKES_NOISE, ddim, ddpm, posterior_std, sample
from nexus.process.schedules import Grid, grid, intervals, tail
from nexus.rng import ItemNoise
from tests.exact import gaussian, gaussian_flow, mixture, mixture_flow

PATHS = {
    "discrete": DiscretePath(),
    "zero-snr": DiscretePath(zero_terminal_snr=True),
    "rectified": RectifiedPath(),
    "ve": VEPath(),
    **{f"affine-{s}": AffinePath(scheduler=s) for s in ("condot", "vp", "linear-vp", "cosine", "polynomial")},
}
POINTS = torch.tensor([[1.0, 0.2, -0.5], [-0.8, 0.9, 0.1], [0.3, -1.0, 0.6]], dtype=torch.float64)
each_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
each_sampler = pytest.mark.parametrize("name", SAMPLERS)


def start(n, dims=3, seed=0):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXTRAPOLATE = ("lms", "pndm")       # the last step goes along past slopes too, and does not end at the last x0


def noises(seed):
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)


def test_names_are_the_requests():
    assert tuple(SAMPLERS) == requests.SAMPLERS


@each_sampler
@each_path
def test_every_sampler_reaches_finite_data_on_every_path(name, path):
    g = grid(path, path.times(100))
    x = g.sigma[0] * start(8)
    x0 = sample(name, mixture(path, POINTS), x, g, noise=ItemNoise(list(range(8))))
    assert x0.isfinite().all()
    near = 5e-3 if name in EXTRAPOLATE else 1e-5
    assert torch.cdist(x0, POINTS).min(1).values.max() < near
    if name not in TAKES_NOISE:                             # one ODE: all solvers reach the same points
        want = sample("ddim", mixture(path, POINTS), x, grid(path, path.times(400)))
        torch.testing.assert_close(x0, want, rtol=0, atol=near)


@each_sampler
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_are_finite(name, steps):
    for path in PATHS.values():
        for schedule in ("native", "karras", "log-snr"):
            g = grid(path, path.times(steps, schedule=schedule))
            assert sample(name, mixture(path, POINTS, 0.1), g.sigma[0] * start(2), g).isfinite().all()


ORDERS = [("euler", 1), ("ddim", 1), ("heun", 2), ("midpoint", 2), ("dpmpp-2m", 2), ("unipc", 3), ("rk4", 4)]
# unipc: a second-order predictor, which the corrector lifts by one
LINE = torch.tensor([[-0.6], [0.3], [1.0]], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["discrete", "rectified", "ve", "affine-vp"])
@pytest.mark.parametrize(("name", "order"), ORDERS)
def test_convergence_order_on_an_exact_flow_map(name, order, kind):
    path = AffinePath(scheduler="cosine") if kind == "discrete" else PATHS[kind]    # a chain's clock has kinks
    errors = [flow_error(name, path, n) for n in (32, 64, 128)]
    measured = math.log2(errors[1] / errors[2])
    assert measured == pytest.approx(order, abs=0.35), errors


def flow_error(name, path, steps, **options):
    """The largest error from log-SNR -2 to 2, without the data point, where the exact map is known."""
    lam = torch.linspace(-2, 2, steps + 1, dtype=torch.float64)
    t = path.t_of_log_snr(lam)
    g = Grid(t, *path.at(t), path)
    x = start(6, 1) * (g.sigma[0] ** 2 + g.alpha[0] ** 2 / 2) ** 0.5
    want = mixture_flow(x, LINE, 0.3, (g.alpha[0], g.sigma[0]), (g.alpha[-1], g.sigma[-1]))
    return ((sample(name, mixture(path, LINE, 0.3), x, g, **options) - want).abs().max() / g.alpha[-1]).item()


def test_lms_is_of_an_order_between_its_first_step_and_its_last():
    """The first is Euler's, whose error of h^2 stays; the others are of fourth order."""
    errors = [flow_error("lms", RectifiedPath(), n) for n in (32, 64, 128)]
    assert 2 < math.log2(errors[1] / errors[2]) < math.log2(errors[0] / errors[1]) < 4
    assert errors[0] < flow_error("dpmpp-2m", RectifiedPath(), 32)


def test_pndm_has_order_three_at_least_on_equal_steps():
    """Its weights hold for equal steps in sigma/alpha; the step of Heun at the beginning leaves an error of h^3."""
    errors = []
    for steps in (32, 64, 128):
        sigma = torch.linspace(3, 0.2, steps + 1, dtype=torch.float64)
        g = Grid(sigma, torch.ones_like(sigma), sigma, VEPath())
        x = start(6, 1) * 3
        want = mixture_flow(x, LINE, 0.3, (1.0, 3.0), (1.0, 0.2))
        errors.append((sample("pndm", mixture(VEPath(), LINE, 0.3), x, g) - want).abs().max().item())
    assert 2.65 < math.log2(errors[1] / errors[2]) < 4.35, errors


def test_sa_solver_without_noise_has_order_two():
    errors = [flow_error("sa-solver", PATHS["rectified"], n, eta=0.0) for n in (32, 64, 128)]
    assert math.log2(errors[1] / errors[2]) == pytest.approx(2, abs=0.35), errors


def test_dpmpp_3m_without_noise_beats_2m():
    # the published coefficients take half the curvature, so its order stays 2, with a smaller error
    two, three = ([flow_error(name, RectifiedPath(), n, **eta) for n in (32, 64)]
                  for name, eta in (("dpmpp-2m", {}), ("dpmpp-3m-sde", {"eta": 0.0})))
    assert math.log2(three[0] / three[1]) > 1.65
    assert three[1] < two[1]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("rk4", 4)])
def test_orders_hold_from_pure_noise_to_the_data(name, order):
    path = RectifiedPath()
    x, errors = start(6, 1), []
    for steps in (64, 128):
        g = grid(path, path.times(steps))
        want = mixture_flow(x, LINE, 0.5, (0.0, 1.0), (1.0, 0.0))
        errors.append((sample(name, mixture(path, LINE, 0.5), x, g) - want).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4), errors


@each_path
def test_dopri5_meets_its_tolerance(path):
    g = grid(path, path.times(10))
    x = g.sigma[0] * start(4)
    want = gaussian_flow(x, 0.7, 0.6, (g.alpha[0], g.sigma[0]), (1.0, 0.0))
    errors = [(sample("dopri5", gaussian(path, 0.7, 0.6), x, g, rtol=tol, atol=tol) - want).abs().max().item()
              for tol in (1e-4, 1e-6)]
    last = 3 * path.at(torch.tensor(path.ends()[1], dtype=torch.float64))[1].item() ** 2    # Euler from there to data
    assert errors[0] < 5e-3 + last
    assert errors[1] < 1e-5 + last


def test_dopri5_items_do_not_see_each_other():
    path = RectifiedPath()
    g = grid(path, path.times(10))
    x = start(5) * torch.tensor([0.1, 1.0, 5.0, 0.01, 2.0], dtype=torch.float64)[:, None]
    together = sample("dopri5", mixture(path, POINTS, 0.05), x, g)
    alone = torch.cat([sample("dopri5", mixture(path, POINTS, 0.05), item[None], g) for item in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_dopri5_stops_on_numbers_that_are_not_finite():
    path = RectifiedPath()
    with pytest.raises(NexusError, match="not finite"):
        sample("dopri5", lambda x, t: x * torch.nan, start(2), grid(path, path.times(4)))


@each_path
def test_stochastic_samplers_keep_the_data_distribution(path):
    for name in sorted(TAKES_NOISE):
        g = grid(path, path.times(250, schedule="log-snr"))
        x = g.alpha[0] * 0.7 + start(20_000, 1) * (g.sigma[0] ** 2 + (g.alpha[0] * 0.4) ** 2) ** 0.5
        x0 = sample(name, gaussian(path, 0.7, 0.4), x, g, noise=noises(1))
        assert x0.mean().item() == pytest.approx(0.7, abs=0.015), name
        assert x0.std().item() == pytest.approx(0.4, rel=0.04), name


def test_ddim_eta_1_is_hos_posterior_over_1000_steps():
    path = DiscretePath()
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    denoise, x = mixture(path, POINTS, 0.2), start(4)
    rng = torch.Generator().manual_seed(3)
    y = x
    for t in range(999, -1, -1):                            # Ho et al. 2020, eq. 7
        x0 = denoise(y, torch.tensor(float(t), dtype=torch.float64))
        mean = (before[t].sqrt() * beta[t] / (1 - bar[t]) * x0
                + (1 - beta[t]).sqrt() * (1 - before[t]) / (1 - bar[t]) * y)
        std = ((1 - before[t]) / (1 - bar[t]) * beta[t]).sqrt()
        y = mean + std * torch.randn(y.shape, generator=rng, dtype=y.dtype) if t else mean
    for run in (partial(ddim, eta=1.0), partial(ddpm, variance="small")):
        ours = run(denoise, x, grid(path, path.times(1000)), noise=noises(3))
        torch.testing.assert_close(ours, y, rtol=0, atol=1e-10)


def test_learned_variance_spans_small_to_large():
    path = DiscretePath()
    g = grid(path, path.times(50))
    denoise, x, fixed = mixture(path, POINTS, 0.2), start(3), ItemNoise

    def learned(value):
        return lambda x, t: Estimate(denoise(x, t), torch.full_like(x, value))

    for value, variance in ((0.0, "small"), (1.0, "large")):
        torch.testing.assert_close(ddpm(learned(value), x, g, noise=fixed([0, 1, 2])),
                                   ddpm(denoise, x, g, variance=variance, noise=fixed([0, 1, 2])))
    torch.testing.assert_close(ddim(learned(0.5), x, g), ddim(denoise, x, g))      # others take x0 alone


def test_posterior_std_is_bayes():
    a, s, a1, s1 = 0.3, 0.9, 0.7, 0.5
    step = s * s - (a / a1 * s1) ** 2                       # variance of x given x1
    assert posterior_std(a, s, a1, s1) ** 2 == pytest.approx(1 / (1 / s1**2 + (a / a1) ** 2 / step))
    assert posterior_std(0.0, 1.0, a1, s1) == s1


def test_euler_on_the_rectified_path_is_fluxs_loop():
    path = RectifiedPath(shift=3.0)
    denoise, x = mixture(path, POINTS, 0.2), start(4)
    g = grid(path, path.times(28))
    y = x
    for t, t1 in zip(g.t[:-1], g.t[1:], strict=True):
        y = y + (t1 - t) * (y - denoise(y, t)) / t
    torch.testing.assert_close(sample("euler", denoise, x, g), y, rtol=0, atol=1e-13)


def test_euler_on_the_ve_path_is_edms():
    path = VEPath()
    denoise, g = mixture(path, POINTS, 0.2), grid(VEPath(), VEPath().times(18))
    x = 80 * start(4)
    y, z = x, x
    for i in range(18):
        t, t1 = g.t[i], g.t[i + 1]
        z = z + (t1 - t) * (z - denoise(z, t)) / t
        d = (y - denoise(y, t)) / t
        new = y + (t1 - t) * d
        y = new if t1 == 0 else y + (t1 - t) * (d + (new - denoise(new, t1)) / t1) / 2
    torch.testing.assert_close(sample("euler", denoise, x, g), z, rtol=0, atol=1e-12)
    torch.testing.assert_close(sample("heun", denoise, x, g), y, rtol=0, atol=1e-12)      # Karras et al., alg. 1


@each_sampler
def test_samples_depend_on_their_own_seed_alone(name):
    path = DiscretePath()
    g = grid(path, path.times(8))
    denoise, x = mixture(path, POINTS, 0.3), start(4)
    together = sample(name, denoise, x, g, noise=ItemNoise([5, 6, 7, 8]))
    alone = sample(name, denoise, x[2:3], g, noise=ItemNoise([7]))
    torch.testing.assert_close(together[2:3], alone, rtol=0, atol=1e-12)


@each_sampler
def test_arithmetic_is_float32_whatever_the_network_computes_in(name):
    path = RectifiedPath()
    g = grid(path, path.times(6))
    denoise = gaussian(path, 0.0, 0.5)
    x0 = sample(name, lambda x, t: denoise(x, t).bfloat16(), start(2).bfloat16(), g)
    assert x0.dtype == torch.float32
    exact = sample(name, denoise, start(2), g, noise=ItemNoise([0, 1]))
    single = sample(name, denoise, start(2).float(), g, noise=ItemNoise([0, 1]))
    torch.testing.assert_close(single, exact.float(), rtol=0, atol=2e-4)


@each_sampler
@each_path
def test_inpainting_keeps_the_known_pixels(name, path):
    g = grid(path, path.times(12))
    known = torch.tensor([0.123456789, -0.7, 0.5], dtype=torch.float64)
    mask = torch.tensor([True, False, True])
    denoise = masked(mixture(path, POINTS, 0.1), mask, known)
    x0 = sample(name, denoise, g.sigma[0] * start(3), g, noise=ItemNoise([0, 1, 2]))
    if name in ("midpoint", "rk4", *EXTRAPOLATE):
        torch.testing.assert_close(x0[:, 1], known[1].expand(3), rtol=0, atol=1e-6 if name == "pndm" else 1e-9)
    else:
        assert torch.equal(x0[:, 1], known[1].expand(3))
    assert torch.equal(paste(x0, mask, known)[:, 1], known[1].expand(3))
    assert (x0[:, 0] != known[0]).all()


@each_sampler
def test_watch_sees_every_step(name):
    path = DiscretePath()
    g = grid(path, path.times(7))
    seen = []
    sample(name, mixture(path, POINTS, 0.3), start(2), g, watch=lambda i, x, x0: seen.append((i, x0.shape)))
    indices = [i for i, _ in seen]
    assert indices == sorted(indices)
    assert set(indices) <= set(range(7))
    if name != "dopri5":
        assert indices == list(range(7))


@each_sampler
def test_tail_of_strength_zero_gives_the_picture_back(name):
    path = DiscretePath()
    g = tail(grid(path, path.times(10)), 0.0)
    x = start(2)
    assert torch.equal(sample(name, mixture(path, POINTS), x, g), x)


def test_tail_and_intervals():
    path = RectifiedPath()
    g = grid(path, path.times(10))
    assert tail(g, 1.0).steps == 10
    assert tail(g, 0.3).steps == 3
    assert tail(g, 0.3).t.tolist() == g.t[7:].tolist()
    assert tail(g, 0.39).steps == 3 and tail(g, 0.09).steps == 0           # a part of a step is none, as in diffusers
    steps = list(intervals(g))
    assert [s.index for s in steps] == list(range(10))
    assert (steps[-1].a1, steps[-1].s1) == (1.0, 0.0)
    assert (steps[0].a, steps[0].s) == (0.0, 1.0)


def test_clipped_data_stays_in_range():
    path = DiscretePath()
    g = grid(path, path.times(20))
    x0 = sample("ddim", clipped(gaussian(path, 3.0, 0.1)), start(4), g)
    assert x0.abs().max() <= 1


def test_refusals():
    path = RectifiedPath()
    g = grid(path, path.times(3))
    x, denoise = start(1), gaussian(path, 0.0, 1.0)
    with pytest.raises(UsageError, match="plms"):
        sample("plms", denoise, x, g)
    with pytest.raises(UsageError, match="no eta"):
        sample("heun", denoise, x, g, eta=0.5)
    with pytest.raises(InputError, match="no path"):
        sample("rk4", denoise, x, g._replace(path=None))
    assert over(g.t, x).shape == (4, 1)
