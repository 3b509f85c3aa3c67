"""PixArt-alpha: exact sizes, the start, captions and their null, prepared runs, sizes, positions and refusals."""

import pytest
import torch

from nexus.errors import InputError
from nexus.models.diffusion.pixart_alpha import PixArt, PixArtConfig, PixArtNetConfig, position_table
from nexus.nn.embed import sincos_2d

COUNTS = {"xl-256": 610_856_096, "xl-512": 610_856_096, "xl-1024-ms": 611_349_152}
TIMES = torch.tensor([1.0, 20.0, 300.0])


def random_net(**changes) -> PixArt:
    """A tiny PixArt whose zero-initialised layers are random too, so that every weight matters."""
    torch.manual_seed(0)
    net = PixArtNetConfig.parse(PixArtNetConfig.presets["tiny"] | changes).build().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0, 0.2)
    return net


def latents(batch: int = 3, rows: int = 8, cols: int = 8) -> torch.Tensor:
    return torch.randn(batch, 4, rows, cols, generator=torch.Generator().manual_seed(1))


def captions(*words: int, length: int = 6, width: int = 16) -> dict[str, torch.Tensor]:
    """One caption an item, of so many words."""
    context = torch.randn(len(words), length, width, generator=torch.Generator().manual_seed(2))
    return {"context": context, "context_mask": torch.arange(length) < torch.tensor(words)[:, None]}


def close(ours, reference, tolerance=1e-5):
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_papers(name):
    with torch.device("meta"):
        net = PixArtNetConfig.preset(name).build()
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    assert {key: tuple(b.shape) for key, b in net.named_buffers()} == {"null": (120, 4096)}


def test_a_new_network_says_zero_and_does_not_hear_the_caption():
    net = PixArtNetConfig.preset("tiny").build()
    out = net(latents(), TIMES, captions(1, 3, 6))
    assert out.shape == (3, 8, 8, 8) and not out.any()
    torch.nn.init.normal_(net.final.weight)
    assert torch.equal(net(latents(), TIMES, captions(1, 3, 6)), net(latents(), TIMES, captions(6, 1, 2)))
    assert net(latents(), TIMES).any()


def test_initial_spread_of_weights():
    net = PixArtNetConfig(hidden=192, depth=1, heads=4, sized=True).build()
    for layer in (net.time.fc1, net.side.fc2, net.aspect.fc1, net.adaln, net.caption1, net.caption2):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert net.blocks[0].qkv.weight.std().item() == pytest.approx((2 / (192 + 3 * 192)) ** 0.5, rel=0.03)
    assert net.null.std().item() == pytest.approx(4096**-0.5, rel=0.03)
    assert net.blocks[0].table.std().item() == pytest.approx(192**-0.5, rel=0.1)


def test_words_behind_the_mask_are_not_read():
    net, cond = random_net(), captions(1, 3, 6)
    other = cond | {"context": torch.where(cond["context_mask"][..., None], cond["context"], 7.0)}
    assert torch.equal(net(latents(), TIMES, cond), net(latents(), TIMES, other))
    short = {name: value[:1, :1] for name, value in cond.items()}
    close(net(latents(1), TIMES[:1], short), net(latents(), TIMES, cond)[:1])
    assert not torch.allclose(net(latents(), TIMES, cond), net(latents(), TIMES, captions(2, 3, 6)))


@pytest.mark.parametrize("length", [2, 4, 6])
def test_the_stored_null_stands_for_no_caption(length):
    """No context, the stored rows as context, and a mask without a word are one thing; the others keep theirs."""
    net, x = random_net(), latents()
    none = net(x, TIMES)
    close(net(x, TIMES, {"context": net.null.expand(3, -1, -1)}), none)
    cond = captions(1, 0, 2, length=length)
    mixed = net(x, TIMES, cond)
    close(mixed[1], none[1])
    for i in (0, 2):
        alone = {name: value[i:i + 1] for name, value in cond.items()}
        close(net(x[i:i + 1], TIMES[i:i + 1], alone)[0], mixed[i])
        assert not torch.allclose(mixed[i], none[i])


def test_the_stored_null_under_a_captions_mask():
    """The paper's scripts keep the prompt's mask for the null."""
    net, x = random_net(), latents()
    mask = captions(1, 3, 4, length=4)["context_mask"]
    under = net(x, TIMES, {"context_mask": mask})
    assert torch.equal(under, net(x, TIMES, {"context": net.null.expand(3, -1, -1), "context_mask": mask}))
    close(under[2], net(x, TIMES)[2])
    assert not torch.allclose(under[0], net(x, TIMES)[0])


def test_a_network_without_a_stored_null_needs_a_caption():
    net = random_net(null_tokens=0)
    assert "null" not in net.state_dict()
    with pytest.raises(InputError, match="needs a caption"):
        net(latents(), TIMES)


@pytest.mark.parametrize("sized", [False, True], ids=["plain", "sized"])
@pytest.mark.parametrize("cond", [
    None, captions(1, 3, 5), captions(2, 0, 1), {"context": captions(6, 6, 6)["context"]},
], ids=["none", "captions", "one null", "no mask"])
def test_a_prepared_run_is_the_computed_one(cond, sized):
    net, x = random_net(sized=sized), latents()
    prepared = net.prepare(torch.tensor([999.0, 12.5, 0.0]), cond)
    for t in (999.0, 12.5, 0.0, 7.0):                                # the last one was not prepared
        times = torch.full((3,), t)
        close(net(x, times, cond, prepared), net(x, times, cond))
    alone = {name: value[:1] for name, value in cond.items()} if cond else None
    close(net(x[:1], times[:1], alone, prepared), net(x, times, cond)[:1])              # another batch: computed anew


def test_a_prepared_caption_ends_with_its_last_word():
    words, mask = random_net().prepare(TIMES, captions(1, 3, 2))["words"]
    assert {k.shape[2] for pair in words for k in pair} == {3} and mask.shape == (3, 1, 1, 3)


def test_prepare_gives_up_when_it_would_not_fit(monkeypatch):
    monkeypatch.setattr("nexus.models.diffusion.pixart_alpha.PREPARED_BYTES", 10)
    net, x, t = random_net(), latents(), torch.full((3,), 4.0)
    assert net.prepare(t[:1]) == {}
    assert torch.equal(net(x, t, None, {}), net(x, t))


def test_the_size_is_the_pictures_unless_it_is_told():
    net, x = random_net(sized=True), latents(3, 8, 4)
    told = {"size": torch.tensor([[64.0, 32.0]]).expand(3, 2), "aspect": torch.full((3, 1), 2.0)}
    own = net(x, TIMES)
    close(net(x, TIMES, told), own)
    close(net(x, TIMES, {"size": told["size"]}), own)
    for change in ({"size": told["size"].flip(1)}, {"aspect": torch.ones(3, 1)}):
        assert not torch.allclose(net(x, TIMES, told | change), own)
    plain = random_net()
    assert torch.equal(plain(x, TIMES, told), plain(x, TIMES))


def test_items_do_not_see_each_other():
    net, x, cond = random_net(sized=True), latents(), captions(1, 0, 6)
    cond["size"] = torch.tensor([[64.0, 64.0], [512.0, 256.0], [100.0, 300.0]])
    alone = torch.cat([net(x[i:i + 1], TIMES[i:i + 1], {n: v[i:i + 1] for n, v in cond.items()}) for i in range(3)])
    close(alone, net(x, TIMES, cond))


def test_patches_go_back_where_they_came_from():
    """With blocks that do nothing and a final layer that reads one token, only that token's patch is written."""
    net = random_net(depth=1)
    with torch.no_grad():
        for layer in (net.blocks[0].proj, net.blocks[0].cross_proj, net.blocks[0].fc2):
            layer.weight.zero_(), layer.bias.zero_()
    x = latents(1, 8, 12)
    y = x.clone()
    y[:, :, 2:4, 6:8] += 1
    changed = (net(x, TIMES[:1]) != net(y, TIMES[:1])).any(1)[0]
    assert changed.shape == (8, 12) and changed[2:4, 6:8].all() and changed.sum() == 4


def test_each_side_is_stretched_onto_the_trained_grid():
    config = PixArtNetConfig.preset("tiny")
    trained = position_table(config).view(4, 4, -1)
    assert torch.equal(trained.flatten(0, 1), sincos_2d(24, 4, 4))
    assert torch.equal(position_table(config, 8, 4).view(8, 4, -1)[::2], trained)
    assert torch.equal(position_table(config, 4, 12).view(4, 12, -1)[:, ::3], trained)
    assert not torch.equal(position_table(config, 2, 8).view(2, 8, -1)[1, ::2], trained[1])


def test_a_scale_puts_a_larger_grid_onto_the_one_before():
    """1024 pixels, scale 2, reads the positions of 512 pixels, scale 1, between and on its own; 256 pixels the same."""
    middle = PixArtNetConfig.parse(PixArtNetConfig.presets["tiny"] | {"size": 16})
    large = position_table(middle.model_copy(update={"size": 32, "pos_scale": 2.0})).view(16, 16, -1)
    small = position_table(middle.model_copy(update={"size": 8, "pos_scale": 0.5})).view(4, 4, -1)
    own = position_table(middle).view(8, 8, -1)
    assert torch.equal(large[::2, ::2], own) and torch.equal(small, own[::2, ::2])


def test_bfloat16_stays_near_float32():
    net, cond, t = random_net(sized=True), captions(1, 0, 6), torch.full((3,), 20.0)
    with torch.no_grad():
        full = net(latents(), t, cond)
        half = net.bfloat16()
        out = half(latents(), t, cond, half.prepare(t[:1], cond))
    assert out.dtype == torch.bfloat16
    assert (out.float() - full).abs().max() < 0.06 * full.abs().max()


def test_a_network_built_on_meta_computes_after_loading():
    net = random_net()
    with torch.device("meta"):
        copy = net.config.build()
    copy.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(copy.eval()(latents(), TIMES), net(latents(), TIMES))


def test_gradients_reach_every_weight_but_not_the_null():
    net = random_net(sized=True)
    net(latents(), TIMES, captions(1, 0, 6)).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())
    assert not net.null.requires_grad


def test_the_emoji_model_is_small():
    built = PixArtConfig.preset("emoji").build()
    assert sum(p.numel() for p in built.net.parameters()) < 4_000_000
    words = tuple(f"word{i}" for i in range(1500))                  # a little more than the emoji captions have
    config = PixArtConfig.preset("emoji").override([f"conditioner.encoder.words={list(words)}".replace("'", '"')])
    phase, = config.build().phases()
    assert sum(p.numel() for p in phase.module.parameters()) <= 5_000_000


def test_the_width_of_words_follows_the_conditioner():
    class Facts:
        classes, styles = ("red ball", "tree"), ("", "flat")
    config = PixArtConfig.preset("tiny").override(["conditioner.encoder.dim=24"]).adapt(Facts)
    assert config.net.context_dim == 24 and config == PixArtConfig.parse(config.to_json())


@pytest.mark.parametrize(("bad", "said"), [
    ({"hidden": 26}, "position table's 4"), ({"heads": 5}, "heads 5"), ({"size": 9}, "patch 2"),
    ({"hidden": 32, "sized": True}, "size embedders' 3"), ({"heads": 0}, "heads")])
def test_impossible_networks_are_refused(bad, said):
    with pytest.raises(InputError, match=said):
        PixArtNetConfig.parse(PixArtNetConfig.presets["tiny"] | bad)


@pytest.mark.parametrize(("bad", "said"), [
    ({"learned_variance": False}, "net.out_channels 8"),
    ({"net": {"null_tokens": 0}, "conditioner": {"kind": "pretrained", "recipe": "pixart", "null": "zeros"}},
     "net.null_tokens is 0")])
def test_settings_that_contradict_each_other_are_refused(bad, said):
    with pytest.raises(InputError, match=said):
        PixArtConfig.parse(bad)


def test_a_latent_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="7x8 does not divide"):
        random_net()(latents(1, 7, 8), TIMES[:1])
