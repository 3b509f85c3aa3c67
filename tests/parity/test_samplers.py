"""Our samplers against diffusers' schedulers, with an exact denoiser, the same times and the same noises.

diffusers' Euler and Heun keep x / alpha (the VE scaling); their times are indices, "trailing" spacing is ours.
Its tables are float32, so they are replaced by ours where a scheduler takes them from `alphas_cumprod`.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus.errors import UsageError
from nexus.process import ode
from nexus.process.likelihood import flow_log_likelihood
from nexus.process.paths import AffinePath, DiscretePath, RectifiedPath, VEPath
from nexus.process.predictions import Estimate, clipped, noised, target, x0_of
from nexus.process.samplers import sample
from nexus.process.schedules import Grid, grid
from tests.exact import mixture

diffusers = pytest.importorskip("diffusers")
PATH = DiscretePath()
POINTS = torch.tensor([[1.0, 0.2, -0.5, 0.4], [-0.8, 0.9, 0.1, 0.0], [0.3, -1.0, 0.6, -0.9]])
CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear",
         "timestep_spacing": "trailing"}


# diffusers' DDPM adds noise on the last step too unless its time is 0: "leading" ends there
LEADING = CHAIN | {"timestep_spacing": "leading"}
SPACED = DiscretePath(spacing="leading")


def start():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def noises(seed=7):
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)


def theirs(scheduler, model, x, *, path=PATH, ve=False, variance=None, **step):
    """Run a scheduler on an x0 model of ours; it is told eps (or v at pure noise)."""
    if step.pop("generator", False):
        step["generator"] = torch.Generator().manual_seed(7)
    kind = scheduler.config.prediction_type
    for t in scheduler.timesteps:
        alpha, sigma = path.at(torch.tensor(float(t), dtype=torch.float64))
        plain = x * alpha if ve else x
        x0 = model(plain, t.double())
        out = (plain - alpha * x0) / sigma if kind == "epsilon" else (alpha * plain - x0) / sigma
        if variance is not None:
            out = torch.cat([out, torch.full_like(out, variance)], dim=1)
        scheduler.scale_model_input(x, t)
        x = scheduler.step(out.float(), t, x, **step).prev_sample
    return x


def check(name, scheduler, steps, *, path=PATH, ve=False, model=None, ours=None, tolerance=1e-5, run=None, to_data=True,
          **step):
    scheduler.set_timesteps(steps)
    g = grid(path, path.times(steps), to_data=to_data)
    model = model or mixture(path, POINTS, 0.3)
    x = start()
    want = theirs(scheduler, model, x / g.alpha[0].item() if ve else x, path=path, ve=ve, **step)
    got = sample(name, ours or model, x, g, noise=noises(), **(run or {}))
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max().item())


@pytest.mark.parametrize("steps", [10, 50, 1000])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(steps, variance):
    scheduler = diffusers.DDPMScheduler(**LEADING, variance_type=f"fixed_{variance}", clip_sample=False)
    check("ddpm", scheduler, steps, path=SPACED, run={"variance": variance}, generator=True,
          tolerance=2e-5 if steps > 100 else 1e-5)


def test_ddpm_with_learned_variance():
    scheduler = diffusers.DDPMScheduler(**LEADING, variance_type="learned_range", clip_sample=False)
    model = mixture(PATH, POINTS, 0.3)
    check("ddpm", scheduler, 40, path=SPACED, ours=lambda x, t: Estimate(model(x, t), torch.full_like(x, 0.7)),
          variance=0.4, generator=True)


def test_ddpm_with_clipped_x0():
    scheduler = diffusers.DDPMScheduler(**CHAIN, variance_type="fixed_small", clip_sample=True)
    model = mixture(PATH, POINTS * 2, 0.3)
    check("ddpm", scheduler, 40, model=model, ours=clipped(model), generator=True)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim(eta):
    check("ddim", diffusers.DDIMScheduler(**CHAIN, clip_sample=False), 25, run={"eta": eta}, eta=eta, generator=True)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_ddim_in_the_other_spacings(spacing):
    path = DiscretePath(spacing=spacing, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                        offset=1 if spacing == "leading" else 0)
    scheduler = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                        timestep_spacing=spacing, steps_offset=path.offset, clip_sample=False)
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == path.times(7).tolist()
    if spacing == "leading":        # linspace in diffusers still steps by T/N, not to the next of its times
        check("ddim", scheduler, 7, path=path)


def test_ddim_from_zero_terminal_snr():
    path = DiscretePath(zero_terminal_snr=True)
    scheduler = diffusers.DDIMScheduler(**CHAIN, clip_sample=False, rescale_betas_zero_snr=True,
                                        prediction_type="v_prediction")
    check("ddim", scheduler, 25, path=path)


@pytest.mark.parametrize(("name", "cls", "generator"), [("euler", "EulerDiscreteScheduler", False),
                                                        ("euler-a", "EulerAncestralDiscreteScheduler", True),
                                                        ("heun", "HeunDiscreteScheduler", False)])
def test_euler_family(name, cls, generator):
    scheduler = getattr(diffusers, cls)(**CHAIN)
    check(name, scheduler, 20, ve=True, tolerance=1e-5, **({"generator": True} if generator else {}))


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize(("name", "order", "algorithm"), [("dpmpp-2m", 2, "dpmsolver++"),
                                                          ("dpmpp-2m-sde", 2, "sde-dpmsolver++"),
                                                          ("dpmpp-3m-sde", 3, "dpmsolver++")])
def test_dpm_solver(name, order, algorithm, steps):
    if order == 3 and steps < 15:
        pytest.skip("diffusers lowers the order at the end of short runs; k-diffusion and we do not")
    scheduler = diffusers.DPMSolverMultistepScheduler(**CHAIN, algorithm_type=algorithm, solver_order=order)
    # with noise its third-order term has the wrong sign (it tends to -1, not 0, as h does), so only eta = 0 compares
    run = {"eta": 0.0} if order == 3 else {}
    check(name, scheduler, steps, run=run, tolerance=1e-5, **({"generator": True} if "sde" in algorithm else {}))


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_unipc(steps):
    check("unipc", diffusers.UniPCMultistepScheduler(**CHAIN), steps, tolerance=1e-5)


@pytest.mark.parametrize("steps", [2, 3, 5, 20])
def test_sa_solver(steps):
    """It draws noise in every step and uses it at 200 to 800; it ends at the first of the chain."""
    scheduler, model, x, draw = diffusers.SASolverScheduler(**CHAIN), mixture(PATH, POINTS, 0.3), start(), noises()
    scheduler.set_timesteps(steps)
    g = grid(PATH, PATH.times(steps), to_data=False)
    scheduler.sigmas = g.sigma / g.alpha                # its weights are differences, of which float32 leaves little
    drawn = [draw(x) for _ in range(steps)]
    used = iter([d for d, t in zip(drawn, scheduler.timesteps.tolist(), strict=True) if 200 <= t <= 800])
    want = theirs(scheduler, model, x, generator=True)
    got = sample("sa-solver", model, x, g, noise=lambda _: next(used))
    assert (got - want).abs().max() <= 1e-5 * max(1, want.abs().max().item())
    assert next(used, None) is None


@pytest.mark.parametrize("steps", [2, 3, 5, 20])
def test_lms(steps):
    check("lms", diffusers.LMSDiscreteScheduler(**CHAIN), steps, ve=True)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_pndm(steps):
    """As Stable Diffusion 1 was published with it: scaled betas, times from 1 on, an end at the first of the chain."""
    chain = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    path = DiscretePath(**chain, spacing="leading", offset=1, ends_at_first=True)
    scheduler = diffusers.PNDMScheduler(**chain, timestep_spacing="leading", steps_offset=1, skip_prk_steps=True,
                                        set_alpha_to_one=False)
    check("pndm", scheduler, steps, path=path, to_data=False)


@pytest.mark.parametrize(("name", "cls"), [("euler", "FlowMatchEulerDiscreteScheduler"),
                                           ("heun", "FlowMatchHeunDiscreteScheduler")])
def test_flow_matching(name, cls):
    path = RectifiedPath(shift=3.0)
    scheduler = getattr(diffusers, cls)(shift=3.0)
    if name == "euler":
        scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 28, 28).tolist())
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), path.times(28), rtol=0, atol=1e-6)
    else:
        scheduler.set_timesteps(28)
    sigmas = torch.unique(scheduler.sigmas.double()).flip(0)
    g = Grid(sigmas, 1 - sigmas, sigmas, path)
    denoise, x = mixture(path, POINTS, 0.3), start()
    y = x
    for t in scheduler.timesteps:
        w = t.double() / 1000
        y = scheduler.step(((y - denoise(y, w)) / w).float(), t, y).prev_sample
    assert (sample(name, denoise, x, g) - y).abs().max() <= 1e-5


def folder():
    root = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
    if not (root / "flow-matching-paths").is_dir():
        pytest.skip(f"no parity cases at {root} (set NEXUS_PARITY)")
    return root


@pytest.fixture(scope="module")
def case():
    return load_file(folder() / "flow-matching-paths" / "tensors.safetensors")


def close(got, want, tolerance=1e-4):
    assert (got - want).abs().max() <= tolerance * max(1, want.abs().max().item())


@pytest.mark.parametrize(("name", "scheduler"), [("condot", "condot"), ("cosine", "cosine"), ("poly2", "polynomial"),
                                                 ("vp", "vp"), ("linear_vp", "linear-vp")])
def test_affine_paths_are_flow_matchings(case, name, scheduler):
    path, t = AffinePath(scheduler=scheduler), 1 - case["t"].double()     # their clock runs the other way
    names = ("alpha_t", "sigma_t", "d_alpha_t", "d_sigma_t")
    curves = [v[:, None, None] for v in (*path.at(t), *path.rates(t))]
    for key, got in zip(names, curves, strict=True):
        close(got.flatten(), case[f"{name}_{key}"])
    noise, data = case["x_0"].double(), case["x_1"].double()
    close(noised(path, data, noise, t), case[f"{name}_x_t"])
    close(target(path, "flow", data, noise, t), case[f"{name}_dx_t"])
    x, u = case[f"{name}_x_t"].double(), case["u"].double()
    a, s, da, ds = curves
    for kind, prediction in (("velocity", "flow"), ("epsilon", "eps"), ("target", "x0")):
        x0 = x0_of(path, prediction, u, x, t)
        eps = (x - a * x0) / s
        for other, value in (("velocity", da * x0 + ds * eps), ("epsilon", eps), ("target", x0)):
            if other != kind:
                close(value, case[f"{name}_{kind}_to_{other}"])


def test_edm_times(case):
    sigmas = torch.cat([VEPath().times(6), torch.zeros(1, dtype=torch.float64)])
    close(1 / (1 + sigmas), case["edm_time_discretization_6"])


def velocity(case):
    return lambda x, t: x @ case["ode_A"].double().T + t * case["ode_b"].double()


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun3", "rk4"])
@pytest.mark.parametrize("h", [0.1, 0.3])
def test_fixed_step_solvers_are_torchdiffeqs(case, method, h):
    w = torch.cat([torch.arange(math.ceil(1 / h - 1e-9), dtype=torch.float64) * h, torch.ones(1, dtype=torch.float64)])
    key = f"ode_{method}_step_{h}"
    if key not in case:
        pytest.skip(f"{key} is not among the cases")
    close(ode.integrate(velocity(case), case["ode_x_init"].double(), w, method), case[key])


def test_solvers_run_on_any_grid_in_any_direction(case):
    x = case["ode_x_init"].double()
    for i in range(1, 4):
        got = ode.integrate(velocity(case), x, case["ode_time_grid"][:i + 1].double(), "midpoint")
        close(got, case["ode_midpoint_time_grid"][i])
    back = torch.linspace(1, 0, 5, dtype=torch.float64)
    close(ode.integrate(velocity(case), x, back, "midpoint"), case["ode_midpoint_reverse"])


def test_adaptive_solver(case):
    def f(x, t):
        return x @ case["ode_A"].double().T + t[:, None] * case["ode_b"].double()
    got = ode.dopri5(f, case["ode_x_init"].double(), 0.0, 1.0, rtol=1e-5, atol=1e-5)
    close(got, case["ode_dopri5"], 1e-3)


def test_likelihood(case):
    def log_prior(y):
        return torch.distributions.Normal(0.0, 1.0).log_prob(y).sum(1)
    w = torch.linspace(1, 0, 11, dtype=torch.float64)
    got = flow_log_likelihood(velocity(case), case["ode_x_init"].double(), w, log_prior, None, method="midpoint")
    close(got, case["likelihood_log_p"])


def test_rectified_flow_of_the_original_code():
    root = folder() / "rectified-flow-mlp"
    case = load_file(root / "tensors.safetensors")
    state = torch.load(root / "checkpoint.pt", weights_only=True)
    state = state.get("model", state)
    assert {"fc1.weight", "fc2.weight"} <= set(state)
    x, path = case["z"], RectifiedPath()

    def net(x, labels):
        hidden = torch.cat([x.flatten(1), (labels / 999)[:, None]], dim=1)
        hidden = torch.tanh(hidden @ state["fc1.weight"].T + state["fc1.bias"])
        return (hidden @ state["fc2.weight"].T + state["fc2.bias"]).reshape(x.shape)

    def denoise(x, t):              # their velocity points to the data, on a clock that runs from noise
        return x + t * net(x, torch.full((len(x),), 999 * (1 - t.item())))
    # the original tells the network i/N (1 - eps) + eps but steps by 1/N; so do its times here, our path's do not
    times = 1 - (torch.arange(5, dtype=torch.float64) / 5 * (1 - 1e-3) + 1e-3)
    y = x
    for t in times:
        y = y + (denoise(y, t) - y) / t / 5
    close((y + 1) / 2, case["sample_euler_5"])
    g = grid(path, path.times(1000))
    assert sample("euler", denoise, x, g).isfinite().all()


@pytest.mark.parametrize("spacing, offset", [("linspace", 0), ("leading", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler"])
def test_times_of_multistep_solvers(kind, spacing, offset):
    scheduler = getattr(diffusers, kind)(**CHAIN | {"timestep_spacing": spacing, "steps_offset": offset})
    path = DiscretePath(spacing=spacing, offset=offset, open_end=True)
    for steps in (*range(1, 120), 333, 499, 500, 998):
        scheduler.set_timesteps(steps)
        wanted = scheduler.timesteps.tolist()
        if spacing == "trailing" and len(wanted) > steps:       # numpy's range slips past its end: a time of -1
            wanted = wanted[:steps]
        assert path.times(steps).tolist() == wanted


@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_an_open_end_needs_one_index_more(spacing):
    path = DiscretePath(steps=10, spacing=spacing, open_end=True)
    assert path.times(9)[-1] == 1
    with pytest.raises(UsageError, match="10 steps, but this model's noise chain has 9"):
        path.times(10)
