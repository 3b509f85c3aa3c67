"""The UNet's sizes, conditions, preparation and refusals."""

import pytest
import torch

from nexus.errors import InputError
from nexus.models.diffusion.unet import UNetConfig

PUBLISHED = {"cifar10": 35_746_307, "ddpm-256": 113_673_219,
             "imagenet-64": 295_899_267, "lsun-256": 526_304_771,
             "sd15": 859_520_964, "sd15-inpaint": 859_535_364, "lcm": 859_602_884, "sd21": 865_910_724,
             "sdxl": 2_567_463_684}
SMALL = {"channels": 16, "mult": (1, 2), "blocks": 1, "groups": 8}
WORDS = SMALL | {"context_dim": 12, "pooled_dim": 12, "num_styles": 3, "head_dim": 8}


def build(seed: int = 0, **settings):
    """A UNet with every weight random: the initial zeros would hide most of it."""
    net = UNetConfig(**settings).build().eval()
    torch.manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def text(batch: int = 2, words: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"context": torch.randn(batch, words, 12), "pooled": torch.randn(batch, 12),
            "context_mask": torch.ones(batch, words, dtype=torch.bool)}


def picture(batch: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(batch, channels, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name):
    with torch.device("meta"):
        net = UNetConfig.preset(name).build()
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", UNetConfig.presets)
def test_config_round_trip(name):
    config = UNetConfig.preset(name)
    assert UNetConfig.parse(config.to_json()) == config


def test_starts_as_zero():
    net = UNetConfig.preset("tiny").build()
    assert torch.equal(net(picture(), torch.tensor([1.0, 999.0])), torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("extra", [{}, {"resblock_updown": True}, {"scale_shift": True}, {"corner_pad": True},
                                   {"mid_attention": False}, {"mult": (0.5, 1, 1.5)}, {"attention": (0, 1)},
                                   {"blocks": 3, "out_channels": 6}])
def test_batch_independent(extra):
    net = build(**SMALL | extra)
    x, t = picture(3), torch.tensor([5.0, 100.0, 900.0])
    whole = net(x, t)
    assert whole.shape == (3, extra.get("out_channels", 3), 8, 8)
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1]) for i in range(3)])
    assert torch.allclose(whole, alone, atol=1e-5 * whole.abs().max().item())


def test_null_rows_are_the_default():
    net = build(**SMALL, num_classes=4, num_styles=2)
    x, t = picture(), torch.full((2,), 7.0)
    null = {"label": torch.tensor([4, 4]), "style": torch.tensor([2, 2])}
    assert torch.equal(net(x, t), net(x, t, null))
    assert not torch.allclose(net(x, t), net(x, t, null | {"label": torch.tensor([0, 0])}))
    assert not torch.allclose(net(x, t), net(x, t, null | {"style": torch.tensor([0, 0])}))


def test_masked_words_do_not_count():
    net, cond, x, t = build(**WORDS), text(), picture(), torch.full((2,), 7.0)
    cond["context_mask"][:, 3:] = False
    short = cond | {"context": cond["context"][:, :3], "context_mask": cond["context_mask"][:, :3]}
    assert torch.allclose(net(x, t, cond), net(x, t, short), atol=1e-5)
    other = cond | {"context": cond["context"].flip(0)}
    assert not torch.allclose(net(x, t, cond), net(x, t, other), atol=1e-4)


def test_prepared_equals_unprepared():
    net, cond, x = build(**WORDS), text(), picture()
    prepared = net.prepare(torch.tensor([3.0, 500.5]), cond)
    for time in (3.0, 500.5, 44.0):                      # the last was not prepared: the network computes it
        t = torch.full((2,), time)
        assert torch.allclose(net(x, t, cond, prepared), net(x, t, cond), atol=1e-6)


def test_concat_is_more_channels():
    net, x, t = build(**SMALL | {"in_channels": 5}), picture(), torch.full((2,), 7.0)
    low = picture(channels=2)
    assert torch.equal(net(x, t, {"concat": low}), net(torch.cat([x, low], 1), t))


def test_checkpointing_changes_no_gradient():
    grads = []
    for on in (False, True):
        net = build(**WORDS, checkpoint=on)
        net(picture(), torch.full((2,), 7.0), text()).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_stays_near():
    net, cond, x, t = build(**WORDS), text(), picture(), torch.full((2,), 7.0)
    exact = net(x, t, cond)
    rough = net.bfloat16()(x, t, cond)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("settings, cond, word", [
    (SMALL | {"num_classes": 3, "null_class": False}, {}, "label"),
    (WORDS, {}, "pooled"),
    (SMALL | {"context_dim": 12}, {}, "context"),
    (SMALL | {"guidance_dim": 8}, {}, "guidance"),
    (SMALL | {"in_channels": 4}, {}, "channels"),
])
def test_missing_condition(settings, cond, word):
    with pytest.raises(InputError, match=word) as error:
        build(**settings)(picture(), torch.full((2,), 7.0), cond)
    assert error.value.hint


def test_odd_sides():
    with pytest.raises(InputError, match="multiples of 2"):
        build(**SMALL)(torch.zeros(1, 3, 7, 8), torch.zeros(1))


@pytest.mark.parametrize("settings, word", [
    ({"channels": 20}, "groups"), ({"attention": [4]}, "levels"), ({"heads": 3}, "heads"),
    ({"depth": [1]}, "depth"), ({"micro": 6}, "pooled_dim"),
    ({"head_dim": 24}, "24"), ({"chanels": 3}, "chanels"),
])
def test_refused_settings(settings, word):
    with pytest.raises(InputError, match=word):
        UNetConfig.parse(settings)
