"""Large pictures in stripes: what the whole picture gives, on smooth and on textured pictures, and when it happens."""

import pytest
import torch

from nexus.codecs import tiling
from nexus.codecs.kl_image import KLConfig, KLImage
from nexus.memory import tiled

KINDS = [{}, {"quant_conv": True, "mid_attention": True}, {"patch": 2}, {"channels": (8, 8, 16), "blocks": 2},
         {"channels": (8, 8, 16), "attention": (1, 2), "mid_attention": True}]


def codec(**changes) -> KLImage:
    torch.manual_seed(0)
    return KLConfig.parse(KLConfig.presets["tiny"] | changes).build().eval()


@pytest.fixture
def thin(monkeypatch):
    """Stripes of eight rows."""
    monkeypatch.setattr(tiling, "STRIPE_BYTES", 1)


def smooth(high, wide):
    y, x = torch.meshgrid(torch.linspace(-1, 1, high), torch.linspace(-1, 1, wide), indexing="ij")
    return torch.stack([torch.stack([y, x, y * x]), torch.stack([x, -y, x])])


def textured(high, wide):
    return torch.rand(2, 3, high, wide, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("picture", [smooth, textured])
@pytest.mark.parametrize("high, wide", [(48, 32), (72, 104), (88, 16)])
def test_stripes_give_the_whole_picture(thin, changes, picture, high, wide):
    net, x = codec(**changes), picture(high, wide)
    whole, parts = net.encoder(x), tiling.encode(net.encoder, x)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=0)
    z = whole.chunk(2, 1)[0]
    torch.testing.assert_close(tiling.decode(net.decoder, z), net.decoder(z), atol=2e-5, rtol=0)


@torch.no_grad()
def test_statistics_of_a_map_whose_stripes_differ_much(thin):
    x = torch.randn(1, 16, 50, 8) * torch.linspace(0.1, 30, 50)[:, None] + torch.linspace(-1e3, 1e3, 50)[:, None]
    norm = torch.nn.GroupNorm(4, 16, 1e-6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    found = tiling._norm(norm, tiling._kept(x))
    torch.testing.assert_close(x.double() * found.scale + found.shift, norm.double()(x.double()), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_mode_decides_and_nothing_is_written_over(thin, monkeypatch):
    net, x = codec(), textured(48, 48)
    before, calls = x.clone(), []
    real = tiling.decode
    monkeypatch.setattr(tiling, "decode", lambda *a: calls.append(1) or real(*a))
    net.tile = "off"
    z, whole = net.latents(x), net.decode(net.latents(x))
    kept = z.clone()
    assert calls == []
    net.tile = "on"
    torch.testing.assert_close(net.latents(x), z, atol=2e-5, rtol=0)
    torch.testing.assert_close(net.decode(z), whole, atol=2e-5, rtol=0)
    assert calls == [1] and torch.equal(x, before) and torch.equal(z, kept)


def test_auto_means_above_768_by_768():
    assert not tiled("auto", 768, 768) and tiled("auto", 776, 768)
    assert tiled("on", 8, 8) and not tiled("off", 4096, 4096)


def test_training_is_never_in_stripes(thin):
    net = codec()
    net.tile = "on"
    x = textured(48, 48).requires_grad_()
    net.decode(net.latents(x)).sum().backward()
    assert x.grad.abs().max() > 0


@torch.no_grad()
def test_bfloat16_errs_no_more_than_the_whole_picture_does(thin):
    net, z = codec(), torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(1))
    truth = net.decoder(z)
    half = net.bfloat16()
    whole, parts = half.decoder(z.bfloat16()), tiling.decode(half.decoder, z.bfloat16())
    assert parts.dtype == torch.bfloat16
    assert (parts - truth).square().mean() < 1.1 * (whole - truth).square().mean()
