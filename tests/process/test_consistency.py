"""The parts of consistency models: schedules, distances, steps along a trajectory, jumps, edits, and a toy training."""

import math

import pytest
import torch
from torch import nn

from nexus.errors import InputError
from nexus.models.diffusion.consistency_model import ConsistencyConfig, ConsistencyPath
from nexus.models.diffusion.lcm import LCMConfig, SkippingPath
from nexus.process import consistency as cm
from nexus.process import edm
from nexus.process.paths import AffinePath, DiscretePath, RectifiedPath, VEPath
from nexus.process.predictions import masked, noised, output_of, over
from nexus.process.schedules import grid
from tests.exact import gaussian, gaussian_flow, mixture, mixture_flow

VE = VEPath()


def noises(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype)


# --- schedules ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first, last, total", [(2, 150, 1000), (2, 200, 800_000), (5, 20, 77)])
def test_progressive_scales(first, last, total):
    """N(k) = ceil(sqrt(k / K ((s1 + 1)^2 - s0^2) + s0^2) - 1) + 1."""
    def scales(k):
        return cm.progressive_scales(k, total, first, last)
    values = [scales(k) for k in range(0, total + 1, max(1, total // 500))]
    assert values == sorted(values) and (scales(0), scales(total)) == (first, last + 1)
    k = total // 3
    grown = math.sqrt(k / total * ((last + 1) ** 2 - first ** 2) + first ** 2)
    assert scales(k) == math.ceil(grown - 1) + 1


def test_doubling_scales():
    """The paper's: 11 to 1281 in eight equal parts."""
    total = 400_000
    values = [cm.doubling_scales(k, total) for k in range(0, total + 1, 1000)]
    assert values[0] == 11 and values[-1] == 1281 and set(values) == {10 * 2 ** i + 1 for i in range(8)}
    counts = [values.count(v) for v in sorted(set(values))]
    assert max(counts) - min(counts) <= 1
    assert cm.doubling_scales(9, 3) == 1281 and cm.doubling_scales(0, 3) == 11


def test_adaptive_decay():
    assert cm.adaptive_decay(3, 2, 0.95) == pytest.approx(0.95)
    assert cm.adaptive_decay(2, 2, 0.95) == pytest.approx(0.9025)
    decays = [cm.adaptive_decay(n, 2, 0.9) for n in (2, 10, 151)]
    assert decays == sorted(decays) and decays[-1] == pytest.approx(0.9 ** (2 / 150))


def test_levels_are_drawn_as_often_as_asked():
    sigmas, rng, n = edm.karras_sigmas(11), torch.Generator().manual_seed(0), 200_000
    uniform = torch.bincount(cm.uniform_levels(sigmas, n, rng), minlength=10) / n
    assert (uniform - 0.1).abs().max() < 0.004
    drawn = torch.bincount(cm.lognormal_levels(sigmas, n, rng), minlength=10) / n
    edges = sigmas.log()
    mass = (torch.erf((edges + 1.1) / (math.sqrt(2) * 2)) / 2).diff().abs()
    assert (drawn - mass / mass.sum()).abs().max() < 0.004


# --- distances ------------------------------------------------------------------------------------------------------

def test_distances():
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[1] = 2.0
    for distance in cm.DISTANCES.values():
        assert distance(a, b, 0.01)[0] == 0 and distance(a, b, 0.01).shape == (2,)
    assert cm.l1(a, b)[1] == 2 and cm.l2(a, b)[1] == 4
    size = 0.00054 * math.sqrt(48)
    assert cm.pseudo_huber(a, b)[1] == pytest.approx(math.sqrt(4 * 48 + size ** 2) - size)
    assert cm.huber(a, b)[1] == pytest.approx(math.sqrt(4 + 1e-6) - 1e-3)


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    near, far = torch.full((1, 100), 1e-6), torch.full((1, 100), 1e3)
    zero = torch.zeros(1, 100)
    c = 0.1
    assert cm.pseudo_huber(near.double(), zero, c).item() == pytest.approx(100e-12 / (2 * c * 10), rel=1e-3)
    assert cm.pseudo_huber(far, zero, c).item() == pytest.approx(1e4, rel=1e-3)


# --- steps along a trajectory ---------------------------------------------------------------------------------------

def test_heun_step_has_order_two():
    model, x = gaussian(VE, 0.3, 0.5), torch.tensor([[1.7]], dtype=torch.float64)
    errors = []
    for n in (8, 16, 32):
        sigmas, y = torch.linspace(2.0, 0.5, n + 1, dtype=torch.float64), x
        for t, s in zip(sigmas[:-1], sigmas[1:], strict=True):
            y = cm.heun_step(model, y, t[None], s[None])
        errors.append((y - gaussian_flow(x, 0.3, 0.5, (1, 2.0), (1, 0.5))).abs().item())
    assert 1.8 < math.log2(errors[0] / errors[1]) < 2.2 and 1.8 < math.log2(errors[1] / errors[2]) < 2.2


def test_heun_step_of_the_data_is_euler():
    """With x0 for the denoiser both slopes are eps, as consistency training has it."""
    x0, eps = torch.randn(5, 3), torch.randn(5, 3)
    t, s = torch.linspace(1, 9, 5), torch.linspace(0.5, 4, 5)
    near = cm.heun_step(lambda x, t: x0, x0 + t[:, None] * eps, t, s)
    torch.testing.assert_close(near, x0 + s[:, None] * eps)


def test_ddim_step_keeps_the_noise():
    path, x0, eps = SkippingPath(), torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double()
    t, s = (torch.tensor(v, dtype=torch.float64) for v in ([999, 499, 39, 19], [979, 479, 19, 0]))
    near = cm.ddim_step(path, x0, noised(path, x0, eps, t), t, s)
    torch.testing.assert_close(near, noised(path, x0, eps, s))


def test_replayed_calls_share_their_dropout():
    drop = nn.Dropout(0.5)
    one, two = cm.replayed(lambda: drop(torch.ones(100)), lambda: drop(torch.full((100,), 3.0)), torch.device("cpu"))
    assert torch.equal(one * 3, two) and 0 < (one == 0).sum() < 100
    before = torch.get_rng_state()
    drop(torch.ones(100))
    assert not torch.equal(before, torch.get_rng_state())


# --- jumps ----------------------------------------------------------------------------------------------------------

def loud(x, t, cond=None, prepared=None):
    return 1e3 * torch.ones_like(x)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_jump_from_the_data_goes_nowhere(shape):
    x = torch.randn(3, 2, 4, 4)
    assert torch.equal(ConsistencyConfig().jump(loud, x, torch.full(shape, 0.002, dtype=torch.float64)), x)
    assert torch.equal(LCMConfig(prediction="x0").jump(loud, x, torch.zeros(shape, dtype=torch.float64)), x)
    assert (ConsistencyConfig().jump(loud, x, torch.full(shape, 80.0)) - 500).abs().max() < 1
    assert (LCMConfig(prediction="x0").jump(loud, x, torch.full(shape, 999.0)) - 1000).abs().max() < 0.1


PATHS = {"chain": DiscretePath(), "line": RectifiedPath(), "cosine": AffinePath(scheduler="cosine"),
         "edm": VEPath(log_clock=0.25)}


@pytest.mark.parametrize("name, said", [("chain", "eps"), ("chain", "x0"), ("chain", "v"), ("line", "flow"),
                                        ("cosine", "flow"), ("edm", "edm")])
def test_a_network_of_another_path_denoises_as_on_its_own(name, said):
    """Told x and its clock as on its native path, a perfect network gives what a perfect one of this path gives."""
    native, mean, std = PATHS[name], 0.3, 0.7
    config = ConsistencyConfig(prediction=said, path=ConsistencyPath(native=native, sigma_data=1.0, sigma_min=0.02))
    sigma, x = torch.tensor([0.02, 0.5, 3.0, 80.0], dtype=torch.float64), noises(3)(torch.empty(4, 2).double())

    def net(seen, clock, cond, prepared):
        assert torch.equal(clock, config.path.network_time(sigma).float())
        t = native.t_of_log_snr(-sigma.log())
        there = gaussian(native, mean, std)(noised_x(native, x, t), t)
        return output_of(native, said, there, noised_x(native, x, t), t)
    want = gaussian(VE, mean, std)(x, sigma)
    torch.testing.assert_close(config.denoiser(net, None)(x, sigma), want, atol=1e-9, rtol=1e-7)
    assert torch.equal(config.jump(loud, x[:1], sigma[:1]), x[:1])
    far = config.jump(net, x, sigma) - want
    assert far.abs()[-1].max() < 1e-3                           # far from the data the jump is the denoiser's estimate


def noised_x(path, x, t):
    """x = x0 + sigma eps as it is on a path where t has the same signal to noise."""
    return over(path.at(t)[0], x) * x


def test_another_prediction_needs_its_path():
    with pytest.raises(InputError, match="prediction v needs path.native"):
        ConsistencyConfig.parse({"prediction": "v"})


def test_a_guided_teacher_is_led_away_from_its_null():
    config = ConsistencyConfig(teacher_guidance=3.0)
    alone, none = (config.denoiser(Pulled(), {"pull": v}) for v in (2.0, 0.5))
    x, sigma = torch.randn(2, 3, 4, 4), torch.tensor([1.0, 40.0])
    led = config.guided(Pulled(), {"pull": 2.0}, {"pull": 0.5})(x, sigma)
    torch.testing.assert_close(led, none(x, sigma) + 3 * (alone(x, sigma) - none(x, sigma)))
    assert torch.equal(ConsistencyConfig().guided(Pulled(), {"pull": 2.0}, None)(x, sigma), alone(x, sigma))


class Pulled(nn.Module):
    """A network that a condition pulls."""

    def forward(self, x, t, cond, prepared):
        return torch.tanh(x) * cond["pull"]


def test_multistep_of_an_exact_jump_keeps_the_distribution():
    """From the exact flow map to the data any number of steps gives samples of the data."""
    def jump(x, t):
        return gaussian_flow(x, 0.3, 0.5, (1, t), (1, 0.0))
    path = ConsistencyPath()
    for steps in (1, 2, 5):
        x = cm.multistep(jump, 80 * noises(1)(torch.empty(20_000, dtype=torch.float64)), grid(path, path.times(steps)),
                         noise=noises(steps + 2), floor=0.002)
        assert abs(x.mean() - 0.3) < 0.02 and abs(x.std() - 0.5) < 0.02


def test_multistep_adds_no_noise_last_and_the_floor_is_left_out():
    seen, path = [], VE
    x0 = torch.tensor([1.0, -1.0], dtype=torch.float64)

    def jump(x, t):
        seen.append((float(t), x.clone()))
        return x0
    points = grid(path, torch.tensor([80.0, 3.0]))
    out = cm.multistep(jump, torch.zeros(2, dtype=torch.float64), points, noise=lambda x: torch.ones_like(x), floor=1.0)
    assert torch.equal(out, x0) and [t for t, _ in seen] == [80, 3]
    torch.testing.assert_close(seen[1][1], x0 + math.sqrt(8))


# --- the levels a run visits ----------------------------------------------------------------------------------------

def test_published_levels():
    path = ConsistencyPath(visits=(0, 22))
    all_levels = edm.karras_sigmas(40)
    assert path.times(2).tolist() == all_levels[[0, 22]].tolist()
    assert path.times(1).tolist() == [80] and path.times(4).tolist() == all_levels[[0, 10, 20, 30]].tolist()
    part = path.times(3, strength=0.5)
    assert len(part) == 3 and part.tolist() == all_levels[[20, 26, 32]].tolist()
    assert len(path.times(8, strength=0.05)) == 2 and len(path.times(8, strength=0.0)) == 0


# --- editing --------------------------------------------------------------------------------------------------------

MASK = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
MASK[..., 2:6, 3:] = True


@pytest.mark.parametrize("part", [cm.outside(MASK), cm.grey, cm.blocks(2), cm.blocks(4)],
                         ids=["inpaint", "colourise", "twice", "four times"])
def test_what_an_edit_knows_is_an_orthogonal_projection(part):
    x, y = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(part(part(x)), part(x))
    assert ((part(x) * y).sum() - (x * part(y)).sum()).abs() < 1e-12
    held = cm.holding(lambda x, t: torch.tanh(x), part, y)
    path = ConsistencyPath()
    made = cm.multistep(held, 80 * x, grid(path, path.times(5)), noise=noises())
    torch.testing.assert_close(part(made), part(y))
    assert (made - y).abs().max() > 0.1                         # what is unknown is made
    assert part(torch.ones_like(x)).sum() == pytest.approx(part(torch.ones_like(x)).square().sum().item())


def test_grey_is_the_luminance():
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    weights = torch.tensor(cm.LUMA, dtype=torch.float64).view(1, 3, 1, 1)
    torch.testing.assert_close((cm.grey(x) * weights).sum(1), (x * weights).sum(1))


def test_inpainting_by_projection_is_inpainting_by_mask():
    known, x = torch.randn(2, 2, 3, 8, 8)
    jump, t = (lambda x, t: x * 0.5), torch.tensor(1.0)
    torch.testing.assert_close(cm.holding(jump, cm.outside(MASK), known)(x, t), masked(jump, MASK, known)(x, t))


# --- learning a map that is known -----------------------------------------------------------------------------------

class Small(nn.Module):
    """x [B, 1], t [B] = 250 ln sigma -> [B, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, t, cond=None, prepared=None):
        s = t[:, None] / 1000
        waves = [f(k * s) for k in (1.0, 2.0, 4.0) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x, x * x, s, x * s, *waves], 1))


CENTRES, WIDTH = torch.tensor([[-0.6], [0.5]]), 0.1


@pytest.mark.parametrize("way", ["distillation", "training"])
def test_a_toy_learns_the_flow_map(way):
    """Two bumps on a line: the map from noise to data is known in one dimension (it keeps the CDF)."""
    torch.manual_seed(0)
    taught = way == "distillation"
    config = ConsistencyConfig(path=ConsistencyPath(sigma_max=10.0), clip=False, s0=10, s1=80, total=800,
                               weighting="gap", distance="pseudo-huber", huber_c=0.03)
    net, rng, steps = Small(), torch.Generator().manual_seed(1), 800
    exact = mixture(config.path, CENTRES.double(), WIDTH)

    def teacher(x, t):
        return exact(x.double(), t).to(x)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x0 = CENTRES[torch.randint(2, (128,), generator=rng)] + WIDTH * torch.randn(128, 1, generator=rng)
        sigmas = edm.karras_sigmas(config.count(step), sigma_max=10.0)
        i = cm.lognormal_levels(sigmas, 128, rng, -1.1, 2.0)
        pair = config.pair(None, x0, torch.randn(128, 1, generator=rng), sigmas[i], sigmas[i + 1], None)
        near = cm.heun_step(teacher, pair.x, pair.t, pair.s) if taught else pair.near
        with torch.no_grad():
            target = config.jump(net, near, pair.s)
        far = cm.DISTANCES["pseudo-huber"](config.jump(net, pair.x, pair.t), target, config.huber_c)
        optimizer.zero_grad()
        (far * pair.weight).mean().backward()
        optimizer.step()
        schedule.step()
    x = 10 * torch.linspace(-2, 2, 401)[:, None].double()
    want = mixture_flow(x, CENTRES.double(), WIDTH, (1, 10.0), (1, 0.002))
    with torch.no_grad():
        made = config.jump(net, x.float(), torch.tensor(10.0)).double()
    mass = torch.exp(-0.5 * (x / 10).square())
    error = ((made - want).abs() * mass).sum() / mass.sum()
    assert error < 0.08                                         # the data's standard deviation is 0.56
