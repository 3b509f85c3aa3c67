"""Rectified flow against its authors' code and minRF (saved numbers): samplers, losses, the DiT, and its file."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nexus.convert.keymap import to_native
from nexus.convert.layouts.dit_llama import LAYOUTS
from nexus.models.diffusion.ncsnpp import NCSNppConfig
from nexus.models.diffusion.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from nexus.process.guidance import guided
from nexus.process.paths import RectifiedPath
from nexus.process.predictions import denoiser, noised
from nexus.process.rectified import StraightPath, euler_sde
from nexus.process.samplers import sample
from nexus.process.schedules import grid
from tests.parity.whole import assert_close, assert_round_trip, shapes

MINRF, = LAYOUTS
FOLDER = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
needs_cases = pytest.mark.skipif(not (FOLDER / "minrf-dit").is_dir(),
                                 reason=f"no parity cases at {FOLDER}; set NEXUS_PARITY")


def read(name):
    folder = FOLDER / name
    return torch.load(folder / "checkpoint.pt", weights_only=True), load_file(folder / "tensors.safetensors")


# --- the authors' samplers and loss, on a small network of the case's own --------------------------------------------

class Small(nn.Module):
    """The case's network, told labels = t x 999."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(13, 24), nn.Linear(24, 12)

    def forward(self, x, t, cond=None, prepared=None):
        h = torch.cat([x.flatten(1), t[:, None] / 999], 1)
        return self.fc2(torch.tanh(self.fc1(h))).view_as(x)


@pytest.fixture(scope="module")
def small():
    state, saved = read("rectified-flow-mlp")
    net = Small()
    net.load_state_dict(state)
    assert sum(p.numel() for p in net.parameters()) == 636
    return net.requires_grad_(False), saved


def euler(net, z, steps, path=StraightPath()):
    return sample("euler", denoiser(net, path, "flow"), z, grid(path, path.times(steps)))


@needs_cases
def test_euler_is_the_authors(small):
    net, saved = small
    assert_close((euler(net, saved["z"], 5) + 1) / 2, saved["sample_euler_5"])
    assert_close(euler(net, saved["z"], 7), saved["euler_ode_7"])


@needs_cases
def test_euler_with_noise_is_the_authors(small):
    net, saved = small
    path, noises = StraightPath(), iter(saved["noises"])
    x = euler_sde(denoiser(net, path, "flow"), saved["z"], grid(path, path.times(5)), spread=0.3,
                  noise=lambda x: next(noises))
    assert_close((x + 1) / 2, saved["sample_euler_5_sigma_0.3"])
    assert_close(euler_sde(denoiser(net, path, "flow"), saved["z"], grid(path, path.times(7)), spread=0.0),
                 saved["euler_ode_7"])


@needs_cases
def test_the_loss_is_the_authors(small, monkeypatch):
    net, saved = small
    system = RectifiedFlowConfig(net=NCSNppConfig.preset("tiny"), size=2).build()
    system.net = net
    monkeypatch.setattr(RectifiedFlow, "_times", lambda self, n, rng: 1 - saved["t_uniform"])
    batch = {"latent": saved["data"], "noise": saved["z"]}
    loss = system.loss(batch, torch.Generator(), 0)["loss"]
    assert_close(loss, saved["loss"])
    assert_close(loss * 12 / 2, saved["loss_sum"])              # theirs is half the sum over 12 numbers


@needs_cases
def test_the_network_is_told_the_authors_time(small):
    net, saved = small
    assert_close(net(saved["z"], saved["t_uniform"] * 999), saved["velocity"])
    path, u = StraightPath(), saved["t_uniform"]
    assert_close(path.network_time(1 - u), (u * (1 - 1e-3) + 1e-3) * 999)
    assert_close(noised(path, saved["data"], saved["z"], path.trained_at(1 - u)),
                 torch.lerp(saved["z"], saved["data"], (u * (1 - 1e-3) + 1e-3)[:, None, None, None]))


# --- minRF ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def minrf():
    state, saved = read("minrf-dit")
    assert MINRF.matches(shapes(state), None)
    config = MINRF.config(shapes(state), None)
    config["net"] |= {"size": 8, "heads": 4}
    config["size"] = 8
    system = RectifiedFlowConfig.parse(config).build().eval()
    system.net.load_state_dict(to_native(MINRF.table(config), state))
    return system, config, state, saved


@needs_cases
def test_minrf_output_and_round_trip(minrf):
    system, config, state, saved = minrf
    assert sum(p.numel() for p in system.net.parameters()) == 224_300
    with torch.no_grad():
        assert_close(system.net(saved["x"], saved["t"], {"label": saved["y"]}), saved["output"])
    assert_round_trip(MINRF, system.net, config, state)


@needs_cases
def test_minrf_guidance_and_sampling(minrf):
    system, _, _, saved = minrf
    path = system.config.path
    with_label, without = (denoiser(system.net, path, "flow", {"label": label})
                           for label in (saved["y"], torch.full((3,), 10)))
    points = grid(path, path.times(4))
    with torch.no_grad():
        assert_close(sample("euler", with_label, saved["z"], points), saved["sampled_4_nocfg"])
        assert_close(sample("euler", guided(with_label, without, 2.0), saved["z"], points), saved["sampled_4_cfg2"])
        v = system.net(saved["x"][:1].repeat(2, 1, 1, 1), torch.full((2,), 0.3), {"label": torch.tensor([4, 10])})
    assert_close((v[1] + 2.0 * (v[0] - v[1])).expand(2, -1, -1, -1), saved["output_cfg"])


@needs_cases
def test_minrf_loss(minrf, monkeypatch):
    system, _, _, saved = minrf
    monkeypatch.setattr(RectifiedFlow, "_times", lambda self, n, rng: saved["logit_t"].sigmoid())
    batch = {"latent": saved["x"], "noise": saved["z"], "label": saved["y"]}
    system.config = system.config.model_copy(update={"p_uncond": 0.0})
    assert_close(system.loss(batch, torch.Generator(), 0)["loss"], saved["loss"])


# --- flow_matching's straight path ----------------------------------------------------------------------------------

@needs_cases
@pytest.mark.parametrize("path", [StraightPath(), RectifiedPath()], ids=["straight", "rectified"])
def test_the_straight_line_is_flow_matchings(path):
    saved = load_file(FOLDER / "flow-matching-paths" / "tensors.safetensors")
    t, data, noise = 1 - saved["t"], saved["x_1"], saved["x_0"]
    assert_close(noised(path, data, noise, t), saved["condot_x_t"])
    d_alpha, d_sigma = path.rates(t)
    sign = d_alpha[:, None, None]
    assert_close(sign * (d_alpha[:, None, None] * data + d_sigma[:, None, None] * noise), saved["condot_dx_t"])


@needs_cases
def test_reverse_integration_is_torchdiffeqs():
    from nexus.process.rectified import invert
    saved = load_file(FOLDER / "flow-matching-paths" / "tensors.safetensors")
    matrix, shift = saved["ode_A"].double(), saved["ode_b"].double()
    x = invert(lambda x, t: x @ matrix.T + (1 - t) * shift, saved["ode_x_init"].double(), steps=4, method="midpoint")
    assert_close(x, saved["ode_midpoint_reverse"])
