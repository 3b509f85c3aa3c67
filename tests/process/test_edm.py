"""EDM's preconditioning, as a prediction on a path. Karras et al. 2022."""

import pytest
import torch

from nexus import catalog
from nexus.errors import InputError
from nexus.process import edm
from nexus.process.paths import DiscretePath, VEPath
from nexus.process.predictions import PREDICTIONS, denoiser, network_input, noised, target, x0_of
from nexus.process.samplers import sample
from nexus.process.schedules import Grid, grid
from tests.exact import gaussian, gaussian_flow

PATH = VEPath(log_clock=0.25)
SIGMAS = torch.tensor([0.002, 0.1, 0.5, 3.0, 80.0], dtype=torch.float64)


def draws(n=5, seed=0):
    return torch.randn(2, n, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_network_that_says_nothing_gives_c_skip_x():
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    denoise = denoiser(lambda x, t, cond, prepared: torch.zeros_like(x), PATH, "edm")
    torch.testing.assert_close(denoise(x, SIGMAS), edm.c_skip(SIGMAS).view(-1, 1, 1, 1) * x)


def test_the_prediction_is_table_1_on_this_path():
    x0, eps = draws()
    x, out = noised(PATH, x0, eps, SIGMAS), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    skip, size, scale = (f(SIGMAS).view(-1, 1, 1, 1) for f in (edm.c_skip, edm.c_out, edm.c_in))
    torch.testing.assert_close(x0_of(PATH, "edm", out, x, SIGMAS), skip * x + size * out)
    torch.testing.assert_close(target(PATH, "edm", x0, eps, SIGMAS), (x0 - skip * x) / size)
    torch.testing.assert_close(network_input(PATH, "edm", x, SIGMAS), scale * x)
    torch.testing.assert_close(PATH.network_time(SIGMAS), SIGMAS.log() / 4)


def test_input_and_target_have_unit_variance_for_data_of_that_deviation():
    x0, eps = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = x0 * edm.SIGMA_DATA
    for sigma in SIGMAS:
        x = noised(PATH, x0, eps, sigma)
        assert network_input(PATH, "edm", x, sigma).std().item() == pytest.approx(1, abs=0.01)
        assert target(PATH, "edm", x0, eps, sigma).std().item() == pytest.approx(1, abs=0.01)


def test_the_error_of_F_is_the_weighted_error_of_D():
    x0, eps = draws()
    x, out = noised(PATH, x0, eps, SIGMAS), torch.randn(5, 3, 4, 4, dtype=torch.float64)
    of_f = (out - target(PATH, "edm", x0, eps, SIGMAS)).square().flatten(1).mean(1)
    of_d = (x0_of(PATH, "edm", out, x, SIGMAS) - x0).square().flatten(1).mean(1)
    torch.testing.assert_close(of_f, edm.weight(SIGMAS) * of_d)


def test_with_unit_data_it_is_minus_v():
    path = DiscretePath()
    x0, eps = draws(3)
    a, s = (v.view(-1, 1, 1, 1) for v in path.at(torch.tensor([10.0, 300.0, 990.0], dtype=torch.float64)))
    f, v = (PREDICTIONS[name].target(x0, eps, a, s, *more) for name, more in (("edm", (1.0,)), ("v", ())))
    torch.testing.assert_close(f, -v)


def test_the_boundary_of_consistency_models():
    least = torch.tensor(0.002, dtype=torch.float64)
    assert edm.c_skip(least, 0.5, 0.002) == 1 and edm.c_out(least, 0.5, 0.002) == 0


def test_the_exact_gaussian_denoiser_is_reproduced():
    exact = gaussian(PATH, 0.3, 0.7)

    def net(seen, clock, cond, prepared):               # what a perfect F answers, from what it sees alone
        sigma = (4 * clock.double()).exp().view(-1, 1)
        x = seen / edm.c_in(sigma)
        return (exact(x, sigma.flatten()) - edm.c_skip(sigma) * x) / edm.c_out(sigma)

    x = torch.randn(5, 8, dtype=torch.float64) * SIGMAS.view(-1, 1)
    torch.testing.assert_close(denoiser(net, PATH, "edm")(x, SIGMAS), exact(x, SIGMAS), rtol=1e-5, atol=1e-5)


def test_heun_is_of_order_2_on_it():
    path = VEPath(sigma_max=10.0, sigma_min=0.01)
    exact, x = gaussian(path, 0.3, 0.7), 10 * torch.randn(4, 3, dtype=torch.float64)
    want = gaussian_flow(x, 0.3, 0.7, (1.0, 10.0), (1.0, 0.01))
    errors = []
    for n in (33, 65, 129):
        full = grid(path, path.times(n))                # without the last step, which is Euler's
        cut = Grid(full.t[:-1], full.alpha[:-1], full.sigma[:-1], path)
        errors.append((sample("heun", exact, x, cut) - want).abs().max())
    orders = [(a / b).log2().item() for a, b in zip(errors, errors[1:], strict=False)]
    assert all(1.8 < order < 2.3 for order in orders), orders


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_sigmas_are_those_of_diffusers(steps):
    from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
    ours = grid(VEPath(), VEPath().times(steps)).sigma
    torch.testing.assert_close(edm.karras_sigmas(steps), ours[:-1])
    for scheduler in (EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, final_sigmas_type="zero"),
                      EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, final_sigmas_type="zero")):
        scheduler.set_timesteps(steps)
        torch.testing.assert_close(ours, scheduler.sigmas.double().cpu(), rtol=1e-5, atol=1e-7)


def test_preconditioning_is_that_of_diffusers():
    from diffusers import EDMEulerScheduler
    scheduler = EDMEulerScheduler()
    x, out = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    for sigma in SIGMAS.float():
        torch.testing.assert_close(edm.c_in(sigma) * x, scheduler.precondition_inputs(x, sigma))
        torch.testing.assert_close(edm.c_noise(sigma), scheduler.precondition_noise(sigma))
        torch.testing.assert_close(x0_of(PATH, "edm", out, x, sigma), scheduler.precondition_outputs(x, out, sigma))


def test_training_sigmas_are_log_normal():
    drawn = PATH.sample_t(20_000, torch.Generator().manual_seed(0)).log()
    assert drawn.mean().item() == pytest.approx(-1.2, abs=0.03) and drawn.std().item() == pytest.approx(1.2, abs=0.03)


@pytest.mark.parametrize("changes", [{}, {"min_snr": 5.0}], ids=["plain", "min-snr"])
def test_a_system_trains_and_samples_on_it(changes):
    config = catalog.config_class("conditional").preset("edm-tiny").model_copy(update=changes)
    built = config.build()
    batch = {"image": torch.randn(4, 3, 16, 16).clamp(-1, 1), "label": torch.zeros(4, dtype=torch.long)}
    loss = built.loss(batch, torch.Generator().manual_seed(0), 0)["loss"]
    loss.backward()
    assert loss.isfinite() and (0.5 < loss.item() < 4 or changes)       # F's target has unit variance
    from nexus.requests import SampleRequest
    made = built.eval().generate(SampleRequest(), seeds=[0]).data
    assert made.shape == (1, 3, 16, 16) and made.isfinite().all()


def test_edm_needs_its_clock():
    with pytest.raises(InputError, match="log_clock"):
        catalog.config_class("ddpm").parse({"prediction": "edm", "path": {"kind": "ve"}})
