"""junyanz' networks and the DCGAN example against saved numbers and the published numbering; their files."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign
from nexus.convert.layouts import cyclegan, dcgan
from nexus.losses.adversarial import LOSSES
from nexus.models.gan.cycle_gan import CycleGANConfig
from nexus.nn.dcgan import DCGeneratorConfig
from nexus.nn.patch_critic import PatchCritic
from nexus.nn.translators import ResnetConfig, UNetConfig
from tests.parity.whole import assert_close

FOLDER = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
needs_cases = pytest.mark.skipif(not (FOLDER / "cyclegan-resnet6").is_dir(),
                                 reason=f"no parity cases at {FOLDER}; set NEXUS_PARITY")
LAYOUTS = {f"{one.system}/{one.name}": one for one in (*cyclegan.LAYOUTS, *dcgan.LAYOUTS)}


def count(net):
    return sum(p.numel() for p in net.parameters())


def converted(name, tmp_path, file="checkpoint.pt", **how):
    """(system in eval mode, conversion's report, saved tensors, foreign state)."""
    folder = FOLDER / name
    report = convert(folder / file, tmp_path / "model", **how)
    system = checkpoint.load(str(tmp_path / "model"), device="cpu")
    state = torch.load(folder / file, weights_only=True)
    return system, report, load_file(folder / "tensors.safetensors"), state


def assert_round_trip(report, net, state):
    """Every foreign key but what carries no information comes back byte for byte."""
    back = to_foreign(LAYOUTS[report.layout].table(report.config), net.state_dict())
    assert back.keys() == state.keys() - set(report.dropped)
    assert all(torch.equal(back[key], state[key]) for key in back)


def test_published_counts():
    with torch.device("meta"):
        assert count(ResnetConfig().build()) == 11_378_179
        assert count(ResnetConfig(blocks=6).build()) == 7_837_699
        assert count(PatchCritic()) == 2_764_737
        assert count(DCGeneratorConfig().build()) == 3_576_704
        assert count(UNetConfig().build()) == 54_413_955 and count(UNetConfig(depth=7).build()) == 41_828_995


@needs_cases
@pytest.mark.parametrize("file", ["checkpoint.pt", "checkpoint_old.pt"])
def test_the_residual_generator_is_cyclegans(file, tmp_path):
    system, report, saved, state = converted("cyclegan-resnet6", tmp_path, file)
    assert report.layout == "cyclegan/resnet" and count(system.net) == 124_931
    assert bool(report.dropped) == (file == "checkpoint_old.pt")
    with torch.no_grad():
        assert_close(system.net(saved["x"]), saved["output"])
        assert_close(system.translate(saved["x"]), saved["output"])
    assert_round_trip(report, system.net.ab, state)


@needs_cases
@pytest.mark.parametrize("name, params", [("cyclegan-unet-in", 65_626), ("pix2pix-unet-bn", 65_706)])
def test_the_unet_is_pix2pixs(name, params, tmp_path):
    system, report, saved, state = converted(name, tmp_path)
    assert report.layout == "cgan/unet" and count(system.net) == params
    with torch.no_grad():
        assert_close(system.net(saved["x"]), saved["output"])
        if "output_train_mode" in saved:
            system.net.config = system.net.config.model_copy(update={"dropout": False})
            assert_close(system.net.train()(saved["x"]), saved["output_train_mode"])
    system = checkpoint.load(str(tmp_path / "model"), device="cpu")
    assert_round_trip(report, system.net, state)


@needs_cases
def test_own_statistics_are_the_published_test_of_one_picture(tmp_path):
    system, _, saved, _ = converted("pix2pix-unet-bn", tmp_path)
    system.net.config = system.net.config.model_copy(update={"dropout": False})
    with torch.no_grad():
        alone = torch.cat([system.net.train()(x[None]) for x in saved["x"]])
    system = checkpoint.load(str(tmp_path / "model"), device="cpu")
    with torch.no_grad():
        assert_close(system.net(saved["x"], None, True), alone)


@needs_cases
def test_a_unet_can_be_taken_as_a_cyclegan(tmp_path):
    system, report, saved, state = converted("cyclegan-unet-in", tmp_path, read_as="cyclegan/unet")
    with torch.no_grad():
        assert_close(system.net(saved["x"]), saved["output"])
    assert_round_trip(report, system.net.ab, state)


@needs_cases
def test_the_critic_and_its_losses_are_cyclegans(tmp_path):
    system, report, saved, state = converted("cyclegan-patchgan", tmp_path)
    assert report.layout == "cyclegan/critic" and count(system.net) == 44_537
    with torch.no_grad():
        scores = system.net(saved["x"])
    assert_close(scores, saved["output"])
    assert_close(LOSSES["lsgan"].generator(None, scores), saved["lsgan_real"])
    assert_close(2 * LOSSES["lsgan"].critic(torch.ones(()), scores), saved["lsgan_fake"])
    assert_round_trip(report, system.net, state)


class Example(nn.Module):
    """pytorch/examples' generator by its published numbering: item 3i a convolution, 3i + 1 its norm."""

    def __init__(self, latents=10, width=8, channels=3):
        super().__init__()
        ends, items = [latents, *(width * 2**i for i in (3, 2, 1, 0)), channels], []
        for i in range(5):
            items.append(nn.ConvTranspose2d(ends[i], ends[i + 1], 4, 2 if i else 1, 1 if i else 0, bias=False))
            items += [nn.BatchNorm2d(ends[i + 1]), nn.ReLU(True)] if i < 4 else [nn.Tanh()]
        self.main = nn.Sequential(*items)

    def forward(self, z):
        return self.main(z)


@pytest.mark.parametrize("wrapped", ["", "module."])
def test_the_dcgan_example(wrapped, tmp_path):
    torch.manual_seed(0)
    theirs = Example()
    for _ in range(3):
        theirs(torch.randn(8, 10, 1, 1))
    state = theirs.eval().state_dict()
    torch.save({wrapped + key: tensor for key, tensor in state.items()}, tmp_path / "netG_epoch_24.pth")
    report = convert(tmp_path / "netG_epoch_24.pth", tmp_path / "model")
    assert report.layout == "gan/pytorch-example" and len(report.dropped) == 4
    system, z = checkpoint.load(str(tmp_path / "model"), device="cpu"), torch.randn(4, 10)
    with torch.no_grad():
        assert_close(system.net(z), theirs(z[:, :, None, None]))
    assert_round_trip(report, system.net, state)
    convert(tmp_path / "model", tmp_path / "back.pt", to="pytorch-example")
    again = Example()
    again.load_state_dict(torch.load(tmp_path / "back.pt", weights_only=True), strict=False)
    with torch.no_grad():
        assert torch.equal(again.eval()(z[:, :, None, None]), theirs(z[:, :, None, None]))


@pytest.mark.parametrize("fields", [{"norm": "batch", "dropout": True, "blocks": 2}, {"norm": "batch", "blocks": 3},
                                    {"dropout": True, "blocks": 2}])
def test_residual_generators_of_every_kind_go_out_and_come_back(fields, tmp_path):
    torch.manual_seed(1)
    net = ResnetConfig.parse({"width": 4, **fields}).build().eval()
    table = LAYOUTS["cyclegan/resnet"].table({"net": net.config.to_json()})
    state = to_foreign(table, net.state_dict())
    torch.save(state, tmp_path / "latest_net_G_A.pth")
    convert(tmp_path / "latest_net_G_A.pth", tmp_path / "model")
    loaded, x = checkpoint.load(str(tmp_path / "model"), device="cpu"), torch.rand(1, 3, 16, 16)
    assert loaded.net.ab.config == net.config
    with torch.no_grad():
        assert torch.equal(loaded.net(x), net(x))


def test_the_generators_of_both_ways_in_one_folder_are_one_model(tmp_path):
    config = CycleGANConfig.preset("tiny").override(["two_way=false"])
    (tmp_path / "run").mkdir()
    ways = {}
    for name in ("latest_net_G_A", "latest_net_G_B", "5_net_G_A", "5_net_G_B"):
        torch.manual_seed(len(ways))
        ways[name] = config.build()
        checkpoint.save_model(tmp_path / name, "cyclegan", config.to_json(), checkpoint.released_state(ways[name]))
        convert(tmp_path / name, tmp_path / f"run/{name}.pth.safetensors", to="resnet")
        foreign = load_file(tmp_path / f"run/{name}.pth.safetensors")
        (tmp_path / f"run/{name}.pth.safetensors").unlink()
        torch.save(foreign, tmp_path / f"run/{name}.pth")
    torch.save({}, tmp_path / "run/latest_net_D_A.pth")
    convert(tmp_path / "run", tmp_path / "both")
    system, x = checkpoint.load(str(tmp_path / "both"), device="cpu"), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        for way, name in (("ab", "latest_net_G_A"), ("ba", "latest_net_G_B")):
            assert torch.equal(system.translate(x, way), ways[name].translate(x))
    (tmp_path / "run/latest_net_G_B.pth").unlink()
    convert(tmp_path / "run", tmp_path / "early")       # the last epoch that has both
    early = checkpoint.load(str(tmp_path / "early"), device="cpu")
    with torch.no_grad():
        assert torch.equal(early.translate(x, "ba"), ways["5_net_G_B"].translate(x))
