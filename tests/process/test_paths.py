import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nexus.errors import InputError, UsageError
from nexus.process.paths import AffinePath, AnyPath, DiscretePath, RectifiedPath, VEPath
from nexus.rng import generator

AFFINE = [AffinePath(scheduler=name) for name in ("condot", "vp", "linear-vp", "cosine", "polynomial")]
PATHS = [
    DiscretePath(),
    DiscretePath(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
    DiscretePath(beta_schedule="cosine"),
    DiscretePath(beta_schedule="sqrt"),
    DiscretePath(zero_terminal_snr=True, snr_shift=3.0),
    DiscretePath(steps=10),
    RectifiedPath(),
    RectifiedPath(shift=3.0),
    VEPath(),
    *AFFINE,
    AffinePath(sigma_min=1e-2),
]
SCHEDULES = ("native", "linear", "karras", "exponential", "log-snr", "shifted")
each_path = pytest.mark.parametrize("path", PATHS, ids=lambda p: f"{p.kind}-{PATHS.index(p)}")


@each_path
def test_json_round_trip(path):
    assert TypeAdapter(AnyPath).validate_python(path.to_json()) == path


@each_path
def test_log_snr_falls_and_inverts(path):
    noise, data = path.ends()
    t = torch.linspace(data, noise, 333, dtype=torch.float64)[1:-1]
    alpha, sigma = path.at(t)
    lam = (alpha / sigma).log()
    assert (lam.diff() < 0).all()
    torch.testing.assert_close(path.t_of_log_snr(lam), t, rtol=1e-9, atol=1e-9)


@each_path
def test_rates_are_derivatives_on_the_network_clock(path):
    noise, data = path.ends()
    t = torch.tensor([0.13, 0.37, 0.71], dtype=torch.float64) * (noise - data) + data
    h = 1e-6 * noise
    direction = -1 if path.kind == "affine" else 1          # affine networks live on s = 1 - t
    for now, later, rate in zip(path.at(t - h), path.at(t + h), path.rates(t), strict=True):
        torch.testing.assert_close((later - now) / (2 * h) * direction, rate, rtol=1e-5, atol=1e-7)


@each_path
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 10])
def test_times_fall_from_the_noise(path, schedule, steps):
    t = path.times(steps, schedule=schedule)
    assert t.shape == (steps,)
    assert t.dtype == torch.float64
    assert (t.diff() < 0).all()
    assert t[0] == path.ends()[0]
    assert t[-1] >= 0


@each_path
def test_training_times_are_usable_and_repeatable(path):
    t = path.sample_t(500, generator(1, "t"))
    assert t.dtype == torch.float32
    assert torch.equal(t, path.sample_t(500, generator(1, "t")))
    assert t.min() >= 0
    if path.kind != "ve":
        assert t.max() <= max(1, path.ends()[0])
    assert all(v.isfinite().all() for v in (*path.at(t), *path.rates(t), path.network_time(t)))


@pytest.mark.parametrize("path", [p for p in PATHS if p.kind == "discrete"], ids=lambda p: str(PATHS.index(p)))
def test_discrete_chain_preserves_variance_and_is_exact_at_indices(path):
    index = torch.arange(path.steps)
    alpha, sigma = path.at(index.double())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-14)
    assert torch.equal(alpha, path.alpha_bar().sqrt()) or torch.allclose(alpha, path.alpha_bar().sqrt(), atol=1e-16)
    assert path.at(index)[0].dtype == torch.float32
    between = path.at(torch.linspace(0, path.steps - 1, 997, dtype=torch.float64))
    torch.testing.assert_close(between[0]**2 + between[1]**2, torch.ones(997, dtype=torch.float64), rtol=0, atol=1e-12)


def test_linear_betas_are_hos():
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(DiscretePath().alpha_bar(), torch.cumprod(1 - beta, 0), rtol=1e-12, atol=0)


def test_cosine_is_iddpms():
    def curve(u):
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    alpha_bar = DiscretePath(beta_schedule="cosine", steps=50).alpha_bar()
    want = torch.tensor([curve((i + 1) / 50) / curve(0) for i in range(49)], dtype=torch.float64)
    torch.testing.assert_close(alpha_bar[:49], want, rtol=1e-12, atol=0)
    assert alpha_bar[49] == pytest.approx(alpha_bar[48].item() * 1e-3)       # beta stops at 0.999


def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first():
    plain, zero = DiscretePath(), DiscretePath(zero_terminal_snr=True)
    alpha, sigma = zero.at(torch.tensor([0.0, 999.0], dtype=torch.float64))
    assert alpha[1] == 0
    assert sigma[1] == 1
    torch.testing.assert_close(alpha[0], plain.at(torch.tensor(0.0, dtype=torch.float64))[0])
    near, _ = zero.at(torch.tensor([998.0, 998.5, 998.999], dtype=torch.float64))
    assert (near.diff() < 0).all()
    assert near.isfinite().all()


def test_snr_shift_divides_the_snr_by_it():
    def snr(path):
        return path.alpha_bar() / (1 - path.alpha_bar())
    torch.testing.assert_close(snr(DiscretePath(snr_shift=3.0)) * 3, snr(DiscretePath()), rtol=1e-10, atol=0)


def test_respacings():
    assert DiscretePath(steps=1000, spacing="leading", offset=1).times(4).tolist() == [751, 501, 251, 1]
    assert DiscretePath(steps=1000, spacing="trailing").times(4).tolist() == [999, 749, 499, 249]
    assert DiscretePath(steps=1000, spacing="linspace").times(4).tolist() == [999, 666, 333, 0]
    assert DiscretePath(steps=10, spacing="leading", offset=1).times(10).tolist() == list(range(9, -1, -1))
    with pytest.raises(UsageError, match="11 steps"):
        DiscretePath(steps=10).times(11)
    with pytest.raises(UsageError, match="sideways"):
        DiscretePath().times(4, schedule="sideways")


def test_karras_times_are_equation_5():
    ramp = [(80 ** (1 / 7) + i / 5 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(6)]
    torch.testing.assert_close(VEPath().times(6), torch.tensor(ramp, dtype=torch.float64), rtol=1e-12, atol=0)


def test_log_snr_times_are_evenly_spaced():
    path = DiscretePath()
    alpha, sigma = path.at(path.times(9, schedule="log-snr"))
    gaps = (alpha / sigma).log().diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(8), rtol=1e-8, atol=0)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 10), st.integers(1, 60))
def test_rectified_shift_divides_the_snr_amplitude(shift, steps):
    plain, shifted = RectifiedPath().times(steps), RectifiedPath(shift=shift).times(steps)
    assert shifted[0] == 1
    torch.testing.assert_close((shifted / (1 - shifted))[1:], (shift * plain / (1 - plain))[1:])      # SD3, eq. 23


def test_flux_shift_depends_on_the_latent():
    path = RectifiedPath(dynamic_shift=(0.5, 1.15))
    for side, mu in ((32, 0.5), (128, 1.15)):
        u = torch.linspace(1, 0, 9, dtype=torch.float64)[:-1]
        want = math.exp(mu) / (math.exp(mu) + (1 / u - 1))
        torch.testing.assert_close(path.times(8, shape=(16, side, side)), want)


@pytest.mark.parametrize("kind", ["uniform", "logit-normal", "mode", "cosmap"])
def test_time_sampling_densities(kind):
    path = RectifiedPath(time_sampling=kind, mode_scale=0.8)
    t = path.sample_t(200_000, generator(0, kind)).double()
    grid = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    share = (t[:, None] <= grid).double().mean(0)
    if kind == "uniform":
        want = grid
    elif kind == "logit-normal":
        want = torch.special.ndtr(torch.logit(grid))
    elif kind == "cosmap":                                  # u = 2/pi atan(t / (1 - t)), SD3 eq. 21
        want = torch.atan(grid / (1 - grid)) * 2 / math.pi
    else:                                                   # eq. 20 falls in u; its inverse by a fine table
        u = torch.linspace(0, 1, 100_001, dtype=torch.float64)
        table = 1 - u - 0.8 * ((math.pi / 2 * u).cos() ** 2 - 1 + u)
        want = (table[:, None] <= grid).double().mean(0)
    torch.testing.assert_close(share, want, rtol=0, atol=6e-3)


def test_bad_settings_are_input_errors():
    with pytest.raises(InputError, match="beta_end"):
        DiscretePath.parse({"beta_end": 1.5})
    with pytest.raises(InputError, match="betas"):
        DiscretePath.parse({"betas": 1})
