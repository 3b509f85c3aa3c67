"""DiT: exact sizes, the identity at the start, prepared modulations, positions, dtypes and refusals."""

import pytest
import torch

from nexus.errors import InputError
from nexus.models.diffusion.dit import DiT, DiTNetConfig, position_table

COUNTS = {"S/2": 32_865_056, "B/2": 130_315_808, "L/2": 457_840_672, "XL/2": 674_834_720, "XL/4": 675_000_704,
          "XL/8": 675_664_640}
POSITIONS = {"S/2": 98_304, "B/2": 196_608, "L/2": 262_144, "XL/2": 294_912}


def random_net(**changes) -> DiT:
    """A tiny DiT whose zero-initialised layers are random too, so that every weight matters."""
    torch.manual_seed(0)
    net = DiTNetConfig.parse(DiTNetConfig.presets["tiny"] | changes).build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.1)
    return net


def latents(batch: int = 3, side: int = 8, channels: int = 4) -> torch.Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_papers(name):
    with torch.device("meta"):
        net = DiTNetConfig.preset(name).build()
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    assert not list(net.buffers())
    if name in POSITIONS:
        assert position_table(net.config).numel() == POSITIONS[name]


def test_a_new_network_says_zero_and_every_block_is_the_identity():
    net = DiTNetConfig.preset("tiny").build()
    out = net(latents(), torch.tensor([0.0, 3.0, 999.0]), {"label": torch.tensor([0, 1, 3])})
    assert out.shape == (3, 8, 8, 8) and not out.any()
    tokens = torch.randn(3, 16, 32)
    assert torch.equal(net.blocks[0](tokens, net.blocks[0].adaln(torch.randn(3, 32))), tokens)


def test_initial_spread_of_weights():
    net = DiTNetConfig(hidden=256, depth=1, heads=4, num_classes=500).build()
    assert net.label.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.time.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    fan_in, fan_out = 256, 3 * 256
    assert net.blocks[0].qkv.weight.std().item() == pytest.approx((2 / (fan_in + fan_out)) ** 0.5, rel=0.02)
    assert net.patch.weight.std().item() == pytest.approx((2 / (16 + 256)) ** 0.5, rel=0.02)


def test_patches_go_back_where_they_came_from():
    """With identity blocks and a final layer that reads one token, only that token's patch is written."""
    net = random_net(depth=1)
    with torch.no_grad():
        net.blocks[0].adaln.weight.zero_()
        net.blocks[0].adaln.bias.zero_()
    x, t = latents(1, 8), torch.tensor([5.0])
    y = x.clone()
    y[:, :, 2:4, 6:8] += 1
    changed = (net(x, t) != net(y, t)).any(1)[0]
    assert changed[2:4, 6:8].all() and changed.sum() == 4


@pytest.mark.parametrize("cond", [
    None, {"label": torch.tensor([0, 2, 0])}, {"style": torch.tensor([1, 2, 0])},
    {"label": torch.tensor([0, 2, 0]), "style": torch.tensor([1, 2, 0])},
], ids=["none", "label", "style", "both"])
def test_prepared_modulations_are_the_computed_ones(cond):
    net, x = random_net(num_styles=2), latents()
    prepared = net.prepare(torch.tensor([999.0, 12.5, 0.0]), cond)
    for t in (999.0, 12.5, 0.0, 7.0):                                # the last one was not prepared
        times = torch.full((3,), t)
        torch.testing.assert_close(net(x, times, cond, prepared), net(x, times, cond), rtol=1e-5, atol=1e-5)


def test_prepare_gives_up_when_it_would_not_fit(monkeypatch):
    monkeypatch.setattr("nexus.models.diffusion.dit.PREPARED_BYTES", 10)
    net, x, t = random_net(), latents(), torch.full((3,), 4.0)
    assert net.prepare(t[:1]) == {}
    assert torch.equal(net(x, t, None, {}), net(x, t))


def test_a_missing_label_is_the_null_row():
    net, x, t = random_net(num_styles=2), latents(), torch.tensor([1.0, 2.0, 3.0])
    null = {"label": torch.full((3,), 3), "style": torch.full((3,), 2)}
    assert torch.equal(net(x, t), net(x, t, null))
    assert not torch.equal(net(x, t), net(x, t, null | {"label": torch.zeros(3, dtype=torch.long)}))


def test_a_network_without_null_class_needs_a_label():
    net = random_net(null_class=False)
    assert len(net.label.weight) == 3
    with pytest.raises(InputError, match="no null label"):
        net(latents(), torch.zeros(3))


def test_a_network_without_labels_has_no_table():
    net = random_net(num_classes=0, learn_sigma=False)
    assert net.label is None and net(latents(), torch.zeros(3)).shape == (3, 4, 8, 8)


def test_items_do_not_see_each_other():
    net, x, t = random_net(), latents(), torch.tensor([1.0, 20.0, 300.0])
    label = torch.tensor([0, 1, 2])
    alone = torch.cat([net(x[i:i + 1], t[i:i + 1], {"label": label[i:i + 1]}) for i in range(3)])
    torch.testing.assert_close(alone, net(x, t, {"label": label}), rtol=1e-5, atol=1e-5)


def test_other_sizes_are_stretched_onto_the_trained_grid():
    net = random_net()
    assert net(latents(1, 12), torch.zeros(1)).shape == (1, 8, 12, 12)
    trained, doubled = position_table(net.config), position_table(net.config, 8, 8)
    assert torch.equal(doubled.view(8, 8, -1)[::2, ::2].flatten(0, 1), trained)
    assert position_table(net.config, 4, 2).shape == (8, 32)
    with pytest.raises(InputError, match="patches of 2x2"):
        net(latents(1, 7), torch.zeros(1))


def test_bfloat16_stays_near_float32():
    net, x, t = random_net(), latents(), torch.tensor([3.0, 500.0, 999.0])
    with torch.no_grad():
        full = net(x, t)
        half = net.bfloat16()(x, t)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.03 * full.abs().max()


def test_a_network_built_on_meta_computes_after_loading():
    net = random_net()
    with torch.device("meta"):
        copy = net.config.build()
    copy.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(copy.eval()(latents(), torch.zeros(3)), net(latents(), torch.zeros(3)))


def test_gradients_reach_every_weight():
    net = random_net(num_styles=2)
    net(latents(), torch.tensor([1.0, 2.0, 3.0]), {"label": torch.tensor([0, 1, 2])}).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("bad", [{"hidden": 30}, {"hidden": 33, "heads": 3}, {"size": 9}, {"heads": 0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(InputError):
        DiTNetConfig.parse(DiTNetConfig.presets["tiny"] | bad)
