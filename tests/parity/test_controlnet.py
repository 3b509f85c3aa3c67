"""ControlNet against diffusers: the residuals, and a UNet with them; both public layouts, both ways."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import ControlNetModel

from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts import controlnet, unet_diffusers
from nexus.models.diffusion.controlnet import ControlConfig, ControlNetConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.process.control import Controlled

sys.path.insert(0, str(Path(__file__).parent))
import pipelines  # noqa: E402

DIFFUSERS, ORIGINAL = controlnet.LAYOUTS


def pair():
    torch.set_num_threads(1)
    unet = pipelines.unet(64)
    theirs = pipelines.randomise(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)), 4)
    state = theirs.state_dict()
    shapes = {k: tuple(t.shape) for k, t in state.items()}
    assert DIFFUSERS.matches(shapes, dict(theirs.config)) and not ORIGINAL.matches(shapes, None)
    config = DIFFUSERS.config(shapes, dict(theirs.config))
    net = ControlNetConfig.parse(config["net"]).build().eval()
    net.load_state_dict(to_native(DIFFUSERS.table(config), state))
    ours = UNetConfig.parse(unet_diffusers.config_of({k: tuple(t.shape) for k, t in unet.state_dict().items()},
                                                     dict(unet.config)))
    whole = ours.build().eval()
    whole.load_state_dict(to_native(unet_diffusers.table({"net": ours.to_json()}), unet.state_dict()))
    return theirs, net, config, unet, whole


def inputs():
    g = torch.Generator().manual_seed(1)
    return (torch.randn(2, 4, 8, 8, generator=g), torch.tensor([100.0, 900.0]), torch.randn(2, 5, 64, generator=g),
            torch.rand(1, 3, 16, 16, generator=g))


def near(a, b):
    return (a - b).abs().max() <= 1e-4 * max(1.0, float(b.abs().max()))


@torch.no_grad()
def test_residuals_and_the_controlled_prediction():
    theirs, net, _, unet, whole = pair()
    x, t, words, hint = inputs()
    down, middle = theirs(x, t, words, hint.expand(2, -1, -1, -1), conditioning_scale=0.7, return_dict=False)
    made = net(x, t, {"context": words, "hint": hint.expand(2, -1, -1, -1)})
    assert len(made) == len(down) + 1
    assert all(near(0.7 * a, b) for a, b in zip(made, (*down, middle), strict=True))
    wanted = unet(x, t, words, down_block_additional_residuals=down, mid_block_additional_residual=middle).sample
    both = Controlled(whole, net, hint, 0.7)
    assert near(both(x, t, {"context": words}), wanted)
    assert (whole(x, t, {"context": words}) - wanted).abs().max() > 0.01
    cond, times = {"context": words}, torch.tensor([100.0])
    ready = both.prepare(times, cond)
    assert near(both(x, times.expand(2), cond, ready), both(x, times.expand(2), cond))


def test_both_layouts_come_back_byte_for_byte():
    theirs, net, config, *_ = pair()
    state = theirs.state_dict()
    back = to_foreign(DIFFUSERS.table(config), net.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    made = DIFFUSERS.foreign_config({"net": ControlNetConfig.parse(config["net"]).to_json()})
    assert ControlNetModel.from_config(made).state_dict().keys() == state.keys()
    original = to_foreign(ORIGINAL.table({"net": net.config.to_json()}), net.state_dict())
    shapes = {k: tuple(t.shape) for k, t in original.items()}
    assert ORIGINAL.matches(shapes, None) and all(k.startswith("control_model.") for k in shapes)
    read = ORIGINAL.config(shapes, None)
    read["net"] |= {"heads": 2}
    assert ControlNetConfig.parse(read["net"]) == net.config
    again = to_native(ORIGINAL.table(read), original)
    assert all(torch.equal(again[n], t) for n, t in net.state_dict().items())


@pytest.mark.parametrize("preset, count", [("sd15", 361_279_120), ("sdxl", 1_251_014_160)])
def test_parameter_counts_of_the_published_models(preset, count):
    """diffusers' ControlNetModel.from_unet of each, on the meta device."""
    with torch.device("meta"):
        net = ControlNetConfig.preset(preset).build()
    said = DIFFUSERS.foreign_config({"net": ControlNetConfig.preset(preset).to_json()})
    with torch.device("meta"):
        theirs = ControlNetModel.from_config(said)
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in theirs.parameters()) == count


def test_a_new_controlnet_changes_nothing():
    torch.manual_seed(0)
    system = ControlConfig.preset("tiny").build()
    x, t, words, hint = inputs()
    both = Controlled(system.backbone, system.net, hint)
    torch.nn.init.normal_(system.backbone.conv_out.weight)
    cond = {"context": words[..., :16]}
    with torch.no_grad():
        assert torch.equal(both(x, t, cond), system.backbone(x, t, cond))
