"""ControlNet as a part of sampling: hints, the seam, what is refused; and a short training."""

import numpy as np
import pytest
import torch

from nexus import api, checkpoint
from nexus.codecs.kl_image import KLConfig
from nexus.errors import ModelError, UsageError
from nexus.images import read_image
from nexus.models.diffusion.controlnet import ControlConfig
from nexus.process.control import hint_of
from nexus.requests import SampleRequest
from nexus.train.start import train
from tests.drawn import drawn

FLAGS = {"steps": 2, "batch_size": 4, "save_every": 2, "samples": 0, "lr": 0.05, "ema": 0.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with data, a tiny sd, and a ControlNet trained for it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("control")
    data = drawn(folder / "data", ("red ball", "green tree"), count=3, side=32)
    settings = {"data": str(data), "preset": "tiny", "device": "cpu", "flags": FLAGS}
    train("sd", run=folder / "sd", **settings)
    train("controlnet", run=folder / "control", overrides=[f"base={folder / 'sd'}"], **settings)
    train("ddpm", run=folder / "ddpm", **settings)
    return folder


def pictures(system, **request):
    asked = SampleRequest(steps=2, prompt="red ball", **request)
    return np.stack([item.image for item in api.sample(system, asked, seeds=[0, 1])]).astype(int)


def test_hints_of_pictures():
    flat = torch.zeros(1, 3, 8, 8)
    assert not hint_of(flat, "edges").any() and (hint_of(flat, "grey") == 0.5).all()
    step = torch.ones(1, 3, 8, 8)
    step[..., :4] = -1
    edges = hint_of(step, "edges")
    assert edges.shape == (1, 3, 8, 8) and edges.max() == 1 and not edges[..., :3].any() and edges[..., 3:5].eq(1).all()


def test_training_starts_as_the_base_and_leaves_it_alone(made):
    control = checkpoint.load(str(made / "control"), device="cpu")
    base = checkpoint.load(str(made / "sd"), device="cpu")
    stored = checkpoint.read_tensors(made / "control/step-0000002/model.safetensors")
    assert not any(n.startswith("backbone.") for n in stored)
    assert all(torch.equal(t, base.net.state_dict()[n]) for n, t in control.backbone.state_dict().items())
    assert all(torch.equal(t, base.conditioner.state_dict()[n]) for n, t in control.conditioner.state_dict().items())
    assert any(p.any() for n, p in control.net.named_parameters() if n.startswith("zero"))


def test_a_control_picture_steers_and_the_model_is_as_before(made):
    system, hint = checkpoint.load(str(made / "sd"), device="cpu"), str(made / "data/red ball/0.png")
    plain = pictures(system)
    steer = {"control": str(made / "control"), "control_image": hint}
    steered = pictures(system, **steer)
    assert np.abs(steered - plain).max() > 0
    assert np.abs(pictures(system, control_scale=0, **steer) - plain).max() <= 1
    assert (pictures(system) == plain).all()
    beside = pictures(system, image=hint, outpaint="8,0,0,0", **steer)     # the hint covers the run's own size
    assert beside.shape[-2] == read_image(hint).shape[1] + 8
    own = checkpoint.load(str(made / "control"), device="cpu")
    assert np.abs(pictures(own, control_image=hint) - steered).max() <= 1
    assert np.abs(pictures(own) - plain).max() <= 1


def test_a_controlnet_without_its_base_steers_any_that_fits(made, tmp_path):
    """As files of the public layout are converted: they hold no base."""
    system, hint = checkpoint.load(str(made / "sd"), device="cpu"), str(made / "data/red ball/0.png")
    whole = checkpoint.find(str(made / "control"))
    tensors = {name: tensor for name, tensor in checkpoint.read_tensors(whole / "model.safetensors").items()
               if name.startswith("net.")}
    checkpoint.save_model(tmp_path / "alone", "controlnet", checkpoint.read_description(whole)["config"] | {"base": ""},
                          tensors)
    both = [pictures(system, control=str(at), control_image=hint) for at in (made / "control", tmp_path / "alone")]
    assert (both[0] == both[1]).all()


def test_the_hint_ends_where_the_latents_of_a_base_begin(made):
    config = ControlConfig.preset("emoji")
    base = {"codec": {"net": KLConfig.presets["sd-f8"]}}
    assert config.fitting(base)["hint_widths"] == (16, 32, 96, 256)         # of a base that halves three times
    assert config.fitting({"codec": config.codec.to_json()})["hint_widths"] == config.net.hint_widths == (8, 16, 32)
    assert config.fitting({"codec": None})["hint_widths"] == (16,)


def test_what_does_not_fit_is_refused(made):
    hint = str(made / "data/red ball/0.png")
    for name, control, image, said in (("sd", "sd", hint, "no ControlNet"), ("sd", "control", None, "shown a picture"),
                                       ("ddpm", "control", hint, "another network"),
                                       ("control", "control", hint, "of its own")):
        system = checkpoint.load(str(made / name), device="cpu")
        with pytest.raises(UsageError, match=said):
            request = SampleRequest(steps=2, control=str(made / control), control_image=image)
            next(api.sample(system, request, seeds=[0]))
    with pytest.raises(ModelError, match="another net"):
        checkpoint.build("controlnet", checkpoint.read_description(made / "control")["config"]
                         | {"base": str(made / "ddpm")})
