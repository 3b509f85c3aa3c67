"""The KL picture codec: exact sizes, shapes, the scaling of latents, draws that the noise alone decides."""

import pytest
import torch

from nexus.codecs.kl_image import KLConfig, KLImage
from nexus.errors import InputError
from nexus.losses.kl import sample_gaussian

COUNTS = {"sd-f8": 83_653_863, "sdxl-f8": 83_653_863, "sd3": 83_819_683, "flux": 83_819_683}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codec(**changes) -> KLImage:
    torch.manual_seed(0)
    return KLConfig.parse(KLConfig.presets["tiny"] | changes).build().eval()


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published_one(name):
    with torch.device("meta"):
        net = KLConfig.preset(name).build()
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    assert not list(net.buffers())


def test_the_published_halves_of_stable_diffusions_codec():
    with torch.device("meta"):
        net = KLConfig.preset("sd-f8").build()
    halves = {name: sum(p.numel() for p in part.parameters()) for name, part in net.named_children()}
    assert (halves["encoder"], halves["decoder"]) == (34_163_592, 49_490_179) and sum(halves.values()) == 83_653_863


@pytest.mark.parametrize("name", sorted(KLConfig.presets))
def test_shapes_are_what_the_configuration_says(name):
    config = KLConfig.preset(name)
    side = config.size // config.factor
    assert config.latent_shape == (config.latent_channels, side, side)
    with torch.device("meta"):
        net = config.build()
        mean, logvar = net.encode(torch.empty(2, 3, config.size, config.size))
        assert mean.shape == logvar.shape == (2, *config.latent_shape)
        assert net.decode(mean).shape == (2, 3, config.size, config.size)


@pytest.mark.parametrize("name, shape", [("sd-f8", (4, 64, 64)), ("sdxl-f8", (4, 128, 128)), ("sd3", (16, 128, 128)),
                                         ("flux", (16, 128, 128)), ("picture-codec", (8, 16, 16))])
def test_latent_shape_of_each_preset(name, shape):
    assert KLConfig.preset(name).latent_shape == shape


def test_other_sides_need_no_other_weights():
    net = codec(patch=2)
    assert net.config.factor == 4
    for height, width in ((16, 16), (8, 24)):
        mean, _ = net.encode(random(1, 3, height, width))
        assert mean.shape == (1, 4, height // 4, width // 4)
        assert net.decode(mean).shape == (1, 3, height, width)


def test_fitted_changes_side_and_colours_only():
    before = KLConfig.preset("tiny")
    after = before.fitted(32, 1)
    assert (after.size, after.in_channels, after.out_channels) == (32, 1, 1)
    assert after.fitted(before.size, before.in_channels) == before


@torch.no_grad()
def test_scaled_latents_are_shifted_then_scaled_and_decode_undoes_it():
    net, x = codec(scale=0.3611, shift=0.1159), random(2, 3, 16, 16)
    mean, _ = net.encode(x)
    torch.testing.assert_close(net.latents(x), (mean - 0.1159) * 0.3611)
    torch.testing.assert_close(net.decode(net.latents(x)), net.decode_raw(mean))


@torch.no_grad()
def test_scaling_leaves_the_network_alone():
    plain, scaled, x = codec(), codec(scale=3.0, shift=-2.0), random(2, 3, 16, 16)
    assert torch.equal(plain.encode(x)[0], scaled.encode(x)[0])
    assert torch.equal(plain.decode_raw(plain.latents(x)), plain.decode(plain.latents(x)))
    torch.testing.assert_close(scaled.latents(x), 3 * (plain.latents(x) + 2))


@torch.no_grad()
def test_a_draw_is_decided_by_its_noise():
    net, x = codec(), random(2, 3, 16, 16)
    noise = random(2, *net.config.latent_shape, seed=1)
    drawn = net.latents(x, noise)
    assert torch.equal(drawn, net.latents(x, noise))
    assert torch.equal(drawn, sample_gaussian(*net.encode(x), noise))
    assert torch.equal(net.latents(x, torch.zeros_like(noise)), net.latents(x))
    torch.testing.assert_close((drawn + net.latents(x, -noise)) / 2, net.latents(x))
    assert (drawn - net.latents(x)).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"quant_conv": True, "mid_attention": True}, {"patch": 2}])
def test_an_item_does_not_see_its_batch(changes):
    net, x = codec(**changes), random(3, 3, 16, 16)
    together = net.decode(net.latents(x))
    for i in range(3):
        torch.testing.assert_close(together[i:i + 1], net.decode(net.latents(x[i:i + 1])), atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_bfloat16():
    net = codec().to(torch.bfloat16)
    z = net.latents(random(1, 3, 16, 16).bfloat16())
    assert z.dtype == net.decode(z).dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"groups": 3}, {"size": 17}, {"channels": ()}, {"scale": 0.0}, {"patch": 3}])
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(InputError):
        KLConfig.parse(KLConfig.presets["tiny"] | changes)
