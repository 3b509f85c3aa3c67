"""NCSN++: sizes, the start as zero, labels, prepared times, dtypes and refusals."""

import pytest
import torch

from nexus.errors import InputError
from nexus.models.diffusion.ncsnpp import NCSNpp, NCSNppConfig
from nexus.nn.fir import FirConvDown, fir_down, fir_up

# By adding up the layers of the published configurations; the fixed frequencies are not among them.
COUNTS = {"cifar10": 61_804_419, "ncsnpp-cifar10": 62_758_787, "ncsnpp-256": 65_574_421}
TINY = NCSNppConfig.presets["tiny"]


def random_net(**fields) -> NCSNpp:
    torch.manual_seed(0)
    net = NCSNppConfig.parse(TINY | fields).build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1)
    return net


def pictures(n=3, side=8):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count(name):
    with torch.device("meta"):
        net = NCSNppConfig.preset(name).build()
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    assert sum(b.numel() for b in net.buffers()) == (128 if net.config.embedding == "fourier" else 0)


@pytest.mark.parametrize("fields", [{}, {"block": "ddpm"}, {"fir": True, "progressive": "output_skip"}])
def test_a_new_network_says_zero(fields):
    net = NCSNppConfig.parse(TINY | fields).build()
    assert not net(pictures(), torch.tensor([1.0, 30.0, 999.0])).any()


def test_prepared_times_change_nothing_and_labels_do():
    net = random_net(num_classes=3, num_styles=2)
    x, t = pictures(), torch.full((3,), 500.0)
    cond = {"label": torch.tensor([0, 2, 3]), "style": torch.tensor([1, 0, 2])}
    with torch.no_grad():
        out = net(x, t, cond)
        assert torch.allclose(net(x, t, cond, net.prepare(torch.tensor([20.0, 500.0]), cond)), out, atol=1e-6)
        none = net(x, t)
    assert torch.allclose(none[2], out[2], atol=1e-6) and (none[:2] - out[:2]).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("fields", [{}, {"fir": True, "embedding": "fourier", "progressive_input": "residual"}])
def test_bfloat16_is_near_float32(fields):
    net = random_net(**fields)
    x, t = pictures(), torch.tensor([5.0, 300.0, 999.0])
    with torch.no_grad():
        exact = net(x, t)
        rough = net.bfloat16()(x.bfloat16(), t)
    assert rough.dtype == torch.bfloat16 and (rough.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_what_does_not_fit_is_refused():
    net = random_net()
    with pytest.raises(InputError, match="multiples of 2"):
        net(pictures(side=7), torch.ones(3))
    with pytest.raises(InputError, match="3 channels"):
        net(pictures()[:, :2], torch.ones(3))
    with pytest.raises(InputError, match="no null label"):
        random_net(num_classes=2, null_class=False)(pictures(), torch.ones(3))


@pytest.mark.parametrize(("fields", "word"), [
    ({"channels": 18}, "split"), ({"attention": (2,)}, "attention"), ({"block": "ddpm", "fir": True}, "fir"),
    ({"scale_by_time": True}, "fourier")])
def test_settings_that_contradict_each_other_are_refused(fields, word):
    with pytest.raises(InputError, match=word):
        NCSNppConfig.parse(TINY | fields)


def test_the_filter_keeps_flat_pictures_inside_and_the_mean_where_nothing_leaves():
    flat = torch.ones(1, 2, 8, 8)
    torch.testing.assert_close(fir_down(flat)[..., 1:-1, 1:-1], torch.ones(1, 2, 2, 2))
    torch.testing.assert_close(fir_up(flat)[..., 1:-1, 1:-1], torch.ones(1, 2, 14, 14))
    dot = torch.zeros(1, 1, 8, 8)
    dot[..., 4, 4] = 1
    assert fir_up(dot).sum().item() == pytest.approx(4) and fir_down(dot).sum().item() == pytest.approx(0.25)
    assert FirConvDown(2, 5)(flat).shape == (1, 5, 4, 4)
