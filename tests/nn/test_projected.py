"""The critic of projected GANs and the frozen features that it sees, against the package that publishes them."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nexus.codecs.kl_image import KLConfig
from nexus.convert.convert import convert
from nexus.errors import InputError, ModelError, UsageError
from nexus.models.gan.base_gan import GANConfig
from nexus.nn import efficientnet
from nexus.nn.dcgan import DCGeneratorConfig
from nexus.nn.gan_blocks import frozen
from nexus.nn.projected import Mixer, ProjectedCriticConfig
from nexus.rng import generator
from tests.played import played


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random features."""
    torch.manual_seed(0)
    net = efficientnet.EfficientNet(efficientnet.REPEATS["lite0"])
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    file = tmp_path_factory.mktemp("features") / "lite0.safetensors"
    save_file(net.state_dict(), file)
    return str(file)


def pictures(n=2, side=64, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def built(weights, **more):
    config = ProjectedCriticConfig.parse({"weights": weights, "width": 8} | more)
    return config.build(DCGeneratorConfig(size=64), 64)


@pytest.mark.parametrize("name, side", [("lite0", 224), ("lite1", 240)])
def test_features_are_the_packages(tmp_path, name, side):
    """At the side that it pads for; norms with random statistics, folded into the convolutions."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    torch.manual_seed(1)
    theirs = package.EfficientNet.from_name(f"efficientnet-{name}").eval()
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight, 0.5), (module.bias, -0.3), (module.running_mean, -0.3),
                               (module.running_var, 0.5)):
                nn.init.uniform_(value, low, low + 0.8)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    report = convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", to="efficientnet")
    assert {"_conv_head.weight", "_fc.weight"} <= set(report.dropped) and not report.problems
    ours = efficientnet.opened(str(tmp_path / "ours.safetensors"), torch.device("cpu"))
    x, maps = pictures(1, side), []
    with torch.no_grad():
        h = theirs._swish(theirs._bn0(theirs._conv_stem((x / 2 + 0.5 - ours.mean) / ours.spread)))
        for block in theirs._blocks:
            h = block(h)
            maps.append(h)
        made = ours(x)
    ends = torch.tensor(efficientnet.REPEATS[name]).cumsum(0) - 1
    for level, group in zip(made, efficientnet.SEEN, strict=True):
        wanted = maps[ends[group]]
        assert level.shape == wanted.shape and (level - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_what_is_no_efficientnet_is_named(tmp_path, weights):
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="0 blocks: this is no EfficientNet-lite that is known"):
        convert(tmp_path / "other.safetensors", tmp_path / "x.safetensors", to="efficientnet")
    with pytest.raises(UsageError, match="one .safetensors file"):
        convert(tmp_path / "other.safetensors", tmp_path / "x.pt", to="efficientnet")
    with pytest.raises(UsageError, match="no settings"):
        convert(tmp_path / "other.safetensors", tmp_path / "x.safetensors", to="efficientnet", overrides=["a=1"])
    assert not (tmp_path / "x.safetensors").exists()
    for file in ("other.safetensors", "none.safetensors"):
        with pytest.raises(ModelError, match="EfficientNet"):
            efficientnet.opened(str(tmp_path / file), torch.device("cpu"))
    state = load_file(weights)
    save_file(state | {"stem.weight": torch.ones(1)}, tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match="stem.weight"):
        efficientnet.opened(str(tmp_path / "bad.safetensors"), torch.device("cpu"))


def test_maps_are_mixed_from_the_smallest_up():
    """By hand: channels by 1 x 1 convolutions, then each map twice as large under the next."""
    torch.manual_seed(0)
    mixer = Mixer(4)
    maps = [torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate(efficientnet.LEVELS)]
    made = mixer(maps)
    up = nn.UpsamplingBilinear2d(scale_factor=2)
    below = mixer.scales[3](up(mixer.channels[3](maps[3])))
    assert torch.equal(made[3], below)
    for i in (2, 1, 0):
        below = mixer.scales[i](up(mixer.channels[i](maps[i]) + below))
        torch.testing.assert_close(made[i], below)
    assert [tuple(m.shape[1:]) for m in made] == [(4, 32, 32), (4, 16, 16), (8, 8, 8), (16, 4, 4)]
    assert not any(p.requires_grad for p in mixer.parameters())


@pytest.mark.parametrize("more, scores", [({}, 3 * 5**2 + 1), ({"levels": 2, "end": 16}, 2 * 13**2),
                                          ({"side": 128}, 4 * 5**2)], ids=["usual", "two maps", "enlarged"])
def test_scores(weights, more, scores):
    made, guess = built(weights, **more)(pictures())
    assert made.shape == (2, scores) and guess is None
    with pytest.raises(InputError, match="critic.levels: 4 maps of a picture of 32 pixels"):
        built(weights, side=32)


def test_gradients_reach_pictures_and_heads_but_no_frozen_part(weights):
    critic, x = built(weights, levels=2), pictures().requires_grad_()
    critic(x)[0].mean().backward()
    assert x.grad.abs().sum() > 0
    learning = {name.split(".")[0] for name, p in critic.named_parameters() if p.requires_grad}
    assert learning == {"heads"}
    assert all(p.grad is None for p in critic.mixer.parameters())
    assert all(p.grad is None for p in critic.features(torch.device("cpu")).parameters())
    assert not any(name.startswith("features") for name in critic.state_dict())
    with frozen(critic):
        assert not any(p.requires_grad for p in critic.parameters())
    assert not any(p.requires_grad for p in critic.mixer.parameters())


def test_a_label_moves_the_scores_of_its_own_pictures_alone(weights):
    config = ProjectedCriticConfig.parse({"weights": weights, "width": 8, "label": "projection", "label_dim": 6})
    critic = config.build(DCGeneratorConfig(size=64, num_classes=3, num_styles=2), 64).eval()
    x = pictures(2)

    def scores(labels, styles=(0, 0)):
        return critic(x, {"label": torch.tensor(labels), "style": torch.tensor(styles)})[0]
    first, other = scores([0, 1]), scores([0, 2])
    assert first.shape == critic(x, {"label": torch.zeros(2, dtype=torch.long)})[0].shape
    assert torch.equal(first[0], other[0]) and not torch.allclose(first[1], other[1])
    assert not torch.allclose(scores([0, 1], [0, 1])[1], first[1])
    first.mean().backward()
    assert critic.labels.label.weight.grad[:2].abs().sum() > 0 and not critic.labels.label.weight.grad[2].any()


LATENT = {"net": {"kind": "resnet", "widths": (8, 8), "blocks": 1, "channels": 4, "norm": "batch"},
          "codec": {"net": KLConfig.presets["tiny"]}}
PIXELS = {"net": {"kind": "resnet", "widths": (8, 8, 8), "blocks": 1, "norm": "batch"}}


def game(weights, kind):
    critic = {"kind": "projected", "width": 4, "levels": 2, "side": 32, "weights": str(weights)}
    return GANConfig.parse(kind | {"critic": critic, "loss": "hinge", "augment": ["color", "translation", "cutout"]})


@pytest.mark.parametrize("kind, batch", [(PIXELS, {"image": torch.full((4, 3, 16, 16), 0.5)}),
                                         (LATENT, {"latent": torch.linspace(-9, 9, 8).expand(4, 4, 8, 8)})],
                         ids=["pixels", "latents"])
def test_the_game_is_learnt(weights, kind, batch):
    """The critic tells noise from a plain picture within some steps, whether or not a codec stands before it."""
    torch.manual_seed(0)
    system = game(weights, kind).build()
    critic, maker = system.phases()
    losses = played(critic, batch, steps=12, lr=2e-3)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    values = maker.loss(batch, generator(0, "game", 99), 99)
    values["loss"].backward()
    assert values["loss"].isfinite() and all(p.grad is not None for p in system.net.parameters())
    if system.codec is not None:
        assert all(p.grad is None for p in system.codec.parameters())


def test_what_it_needs_is_missed_before_the_first_step(weights):
    with pytest.raises(ModelError, match="no file of EfficientNet weights 'nowhere'"):
        game("nowhere", PIXELS).build().phases()
    with pytest.raises(ModelError, match="is named"):
        game("", PIXELS).build().phases()
