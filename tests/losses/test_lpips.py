"""LPIPS against VGG16 put together here as torchvision does, from the files that are public; and what trains on it."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from nexus import api, checkpoint
from nexus.convert.convert import convert
from nexus.errors import InputError, ModelError, UsageError
from nexus.losses import lpips
from nexus.models.cv.vae.vae import VAEConfig
from nexus.models.diffusion.consistency_model import ConsistencyConfig
from nexus.models.diffusion.rectified_flow import RectifiedFlowConfig
from nexus.text.conditioner import NoCondConfig

WIDTHS = (4, 6, 8, 10, 12)
PLAN = (4, 4, "M", 6, 6, "M", 8, 8, 8, "M", 10, 10, 10, "M", 12, 12, 12, "M")       # VGG16, but narrow
TAKEN = (3, 8, 15, 22, 29)              # relu1_2, 2_2, 3_3, 4_3, 5_3


def torchvision_features() -> nn.Sequential:
    """`torchvision.models.vgg16().features`."""
    layers, before = [], 3
    for width in PLAN:
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(inplace=True)]
        before = width
    return nn.Sequential(*layers)


def published(features, heads, x, y, pool=None):
    """lpips.LPIPS(net="vgg").forward, with dropout off."""
    shift, scale = torch.tensor(lpips.MEAN).view(1, 3, 1, 1), torch.tensor(lpips.SPREAD).view(1, 3, 1, 1)
    maps = []
    for picture in (x, y):
        h, found = (picture - shift) / scale, []
        for i, layer in enumerate(features):
            h = pool(h) if pool and isinstance(layer, nn.MaxPool2d) else layer(h)
            if i in TAKEN:
                found.append(h / (h.pow(2).sum(1, keepdim=True).sqrt() + 1e-10))
        maps.append(found)
    return sum(F.conv2d((a - b) ** 2, head).mean((2, 3)) for a, b, head in zip(*maps, heads, strict=True)).flatten()


@pytest.fixture
def public(tmp_path):
    torch.manual_seed(0)
    features = torchvision_features()
    for conv in features:
        if isinstance(conv, nn.Conv2d):
            nn.init.normal_(conv.weight, std=(2 / conv.weight[0].numel()) ** 0.5)
            nn.init.normal_(conv.bias, std=0.1)
    heads = [torch.rand(1, width, 1, 1) for width in WIDTHS]
    state = {f"features.{k}": v for k, v in features.state_dict().items()} | {"classifier.0.weight": torch.ones(2, 2)}
    torch.save(state, tmp_path / "vgg16.pth")
    torch.save({f"lin{i}.model.1.weight": head for i, head in enumerate(heads)}, tmp_path / "vgg.pth")
    return tmp_path, features, heads


@pytest.fixture
def file(public):
    folder = public[0]
    convert(folder / "vgg16.pth", folder / "lpips.safetensors", to="lpips", overrides=[f"heads={folder / 'vgg.pth'}"])
    return folder / "lpips.safetensors"


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_it_is_the_published_distance(public, file, pooling):
    x, y = torch.rand(2, 3, 3, 40, 48) * 2 - 1
    net = lpips.opened(str(file), torch.device("cpu"), pooling)
    wanted = published(public[1], public[2], x, y, nn.AvgPool2d(2) if pooling == "avg" else None)
    assert torch.allclose(net(x, y), wanted, rtol=1e-5, atol=1e-7) and (wanted > 0.01).all()
    assert torch.equal(net(x, x), torch.zeros(3)) and torch.allclose(net(x, y), net(y, x))
    grey = x[:, :1]
    assert torch.allclose(net(grey, y), published(public[1], public[2], grey.expand(-1, 3, -1, -1), y,
                                                  nn.AvgPool2d(2) if pooling == "avg" else None), rtol=1e-5)


def test_gradients_reach_the_pictures_also_after_an_evaluation(file):
    with torch.inference_mode():
        lpips.opened(str(file), torch.device("cpu"))
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    lpips.opened(str(file), torch.device("cpu"))(x, torch.ones(1, 3, 32, 32)).sum().backward()
    assert x.grad.abs().sum() > 0


def test_small_pictures_are_enlarged_and_large_ones_stay():
    x = torch.rand(1, 3, 64, 64)
    assert lpips.enlarged(x).shape == (1, 3, 224, 224) and lpips.enlarged(x, 64) is x


def test_the_whole_modules_state_is_taken_too(public, file):
    """lpips.LPIPS and taming-transformers save VGG16's layers as net.sliceK.N."""
    folder, features, heads = public
    slices = {k: next(i for i, end in enumerate(TAKEN, 1) if int(k.split(".")[0]) <= end)
              for k in features.state_dict()}
    state = {f"net.slice{slices[k]}.{k}": v for k, v in features.state_dict().items()}
    state |= {f"lin{i}.model.1.weight": head for i, head in enumerate(heads)} | {"scaling_layer.shift": torch.ones(3)}
    torch.save(state, folder / "whole.pth")
    convert(folder / "whole.pth", folder / "again.safetensors", to="lpips")
    assert (folder / "again.safetensors").read_bytes() == file.read_bytes()


def test_what_does_not_fit_is_named(public):
    folder = public[0]
    with pytest.raises(ModelError, match="heads of LPIPS are missing"):
        convert(folder / "vgg16.pth", folder / "x.safetensors", to="lpips")
    assert len(convert(folder / "vgg.pth", folder / "x", to="lpips", check=True).problems) == 26
    with pytest.raises(UsageError, match="no such setting"):
        convert(folder / "vgg16.pth", folder / "x.safetensors", to="lpips", overrides=["head=x"])
    with pytest.raises(UsageError, match="one .safetensors file"):
        convert(folder / "vgg16.pth", folder / "x.pt", to="lpips")
    assert not list(folder.glob("x*"))
    with pytest.raises(ModelError, match="no file of LPIPS weights"):
        lpips.opened(str(folder / "none"), torch.device("cpu"))
    save_file({"a": torch.ones(1)}, folder / "other.safetensors")
    with pytest.raises(ModelError, match="does not hold the weights of LPIPS"):
        lpips.opened(str(folder / "other.safetensors"), torch.device("cpu"))


def test_the_published_size():
    with torch.device("meta"):
        assert sum(p.numel() for p in lpips.LPIPS().parameters()) == 14_714_688 + 1_472


def test_a_codec_is_trained_on_it(file):
    batch, (plain, with_it) = {"image": torch.rand(2, 3, 16, 16) * 2 - 1}, (
        VAEConfig.preset("tiny-codec").model_copy(update={"critic": None, "lpips_weight": weight, "lpips": str(file)})
        for weight in (0.0, 0.5))
    system = plain.build()
    torch.manual_seed(1)
    without = system.loss(batch, torch.Generator().manual_seed(0), 0)["loss"]
    shown = system.picture(system.rebuild(batch["image"], torch.Generator().manual_seed(0))[0])
    system.config = with_it
    loss = system.loss(batch, torch.Generator().manual_seed(0), 0)["loss"]
    far = lpips.opened(str(file), torch.device("cpu"))(shown, batch["image"]).mean()
    assert torch.allclose(loss, without + 0.5 * far, rtol=1e-5) and far > 0.01


def test_a_flow_is_distilled_on_it(file):
    """Liu et al. 2022, section 3: the distance of what one step makes, at 224 pixels."""
    config = RectifiedFlowConfig.preset("tiny").model_copy(update={
        "stage": "distil", "teacher": "x", "distance": "lpips", "lpips": str(file), "straightness_every": 0,
        "conditioner": NoCondConfig()})
    system = RectifiedFlowConfig.parse(config.to_json()).build()
    z0, x1 = torch.randn(2, 2, 3, 16, 16)
    values = system.loss({"noise": z0, "latent": x1}, torch.Generator().manual_seed(0), 0)
    jumped = z0 + system.net(z0, torch.zeros(2), None)              # one Euler step from the noise
    wanted = lpips.opened(str(file), torch.device("cpu"))(*(lpips.enlarged(x) for x in (jumped, x1))).mean()
    assert torch.allclose(values["loss"], wanted, rtol=2e-3)        # a path is trained from eps = 1e-3 on
    assert values["l2"] > 0
    values["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in system.net.parameters())


def test_jumps_are_compared_by_it(file):
    config = ConsistencyConfig.parse({**ConsistencyConfig.preset("tiny").to_json(), "distance": "lpips",
                                      "lpips": str(file), "conditioner": {"kind": "none"}})
    system = config.build()
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    values = system.loss({"image": torch.rand(2, 3, 16, 16) * 2 - 1}, torch.Generator().manual_seed(0), 0)
    assert values["distance"] > 0
    values["loss"].backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in system.net.parameters())


@pytest.mark.parametrize("config, setting", [(VAEConfig, {"lpips_weight": 1.0}),
                                             (ConsistencyConfig, {"distance": "lpips"}),
                                             (RectifiedFlowConfig, {"distance": "lpips"})])
def test_it_is_asked_for_with_its_weights(config, setting):
    with pytest.raises(InputError, match="lpips=FILE"):
        config.parse(setting)


@pytest.mark.parametrize("config, setting", [(VAEConfig, {"lpips_weight": 1.0}),
                                             (ConsistencyConfig, {"distance": "lpips"})])
def test_a_missing_file_is_missed_before_the_first_step(config, setting):
    system = config.parse(config.preset("tiny").to_json() | setting | {"lpips": "nowhere.safetensors"}).build()
    with pytest.raises(ModelError, match=r"nowhere\.safetensors"):
        system.phases()


def test_rebuilt_pictures_are_judged_by_it(file, tmp_path):
    torch.manual_seed(0)
    model = VAEConfig.preset("tiny-codec").build()
    checkpoint.save_model(tmp_path / "model", "vae", model.config.to_json(), model.state_dict())
    common = {"data": "emoji", "count": 12, "device": "cpu"}
    report = api.evaluate(str(tmp_path / "model"), lpips=str(file), **common)
    assert report["numbers"]["lpips"]["value"] > 0 and "VGG16" in report["protocol"]["lpips"]
    with pytest.raises(UsageError, match="--lpips has no meaning here"):
        api.evaluate("ddpm", lpips=str(file), **common)
