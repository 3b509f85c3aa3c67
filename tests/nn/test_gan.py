"""Blocks of adversarial training: augmentation, the pool, norms, labels, spectral norms; networks' published shapes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nexus.errors import InputError
from nexus.nn.dcgan import DCCriticConfig, DCGeneratorConfig
from nexus.nn.diffaugment import CHANGES, color, cutout, diff_augment, hue, translation
from nexus.nn.gan_blocks import BatchNorm, frozen, lipschitz
from nexus.nn.gan_resnet import ResCriticConfig, ResGeneratorConfig
from nexus.nn.image_pool import ImagePool
from nexus.nn.translators import ResnetConfig, UNetConfig
from nexus.rng import ItemNoise, generator

POLICY = tuple(CHANGES)
SMALL = {"widths": (16, 16, 8), "blocks": 1, "group": 8}


def pictures(n=4, side=16, seed=0):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- DiffAugment -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("policy", [(name,) for name in POLICY] + [POLICY], ids=str)
def test_equal_generators_augment_equally_and_gradients_pass(policy):
    x = pictures().double().requires_grad_()
    one, two = (diff_augment(x, generator(3, "augment"), policy) for _ in range(2))
    assert torch.equal(one, two) and one.shape == x.shape
    assert not torch.equal(one, diff_augment(x, generator(4, "augment"), policy))
    small = pictures(2, 8, 1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: diff_augment(v, generator(1, "a"), policy), (small,), nondet_tol=0.0)


def test_pictures_are_changed_one_by_one():
    x = pictures(1).expand(6, -1, -1, -1)
    for name, change in CHANGES.items():
        made = change(x, generator(0, name))
        assert len({tuple(m.flatten().tolist()) for m in made}) > 3, name


def test_color_keeps_grey_pictures_grey_and_translation_moves_pixels():
    grey = pictures()[:, :1].expand(-1, 3, -1, -1)
    made = color(grey, generator(1, "c"))
    assert torch.allclose(made[:, 0], made[:, 1], atol=1e-6) and torch.allclose(made[:, 1], made[:, 2], atol=1e-6)
    spot = torch.zeros(64, 1, 16, 16)
    spot[:, :, 8, 8] = 1.0
    moved = translation(spot, generator(2, "t"))
    assert moved.flatten(1).sum(1).eq(1).all()
    rows, cols = moved.flatten(1).argmax(1) // 16 - 8, moved.flatten(1).argmax(1) % 16 - 8
    assert rows.abs().max() == 2 and cols.abs().max() == 2
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) > 8


def test_hue_turns_about_the_grey_axis():
    x = 0.3 * pictures()
    made = hue(x, generator(1, "hue"))
    assert torch.allclose(made.mean(1), x.mean(1), atol=1e-6)               # as grey as before, and as colourful
    assert torch.allclose(made.var(1), x.var(1), atol=1e-6)
    red = torch.tensor([0.6, 0.0, 0.0]).view(1, 3, 1, 1).expand(3000, 3, 1, 1)
    whole = hue(red, generator(2, "hue"))[:, :, 0, 0]
    assert (whole.max(0).values > 0.59).all()           # red becomes green and blue somewhere on the circle
    for same in (pictures()[:, :1].expand(-1, 3, -1, -1), pictures()[:, :1]):
        assert torch.allclose(hue(same, generator(3, "hue")), same, atol=1e-6)
    assert hue(pictures(), generator(4, "hue")).abs().max() <= 1


def test_cutout_takes_at_most_a_quarter():
    holes = (cutout(torch.ones(200, 1, 16, 16), generator(5, "h")) == 0).flatten(1).float().mean(1)
    assert holes.max() == 0.25 and holes.min() > 0


# --- the pool --------------------------------------------------------------------------------------------------------

def test_a_pool_fills_then_exchanges_and_is_a_function_of_its_state():
    pool, rng = ImagePool(6, (1, 1, 1)), generator(0, "pool")
    fresh = torch.arange(4.0).view(4, 1, 1, 1)
    assert torch.equal(pool.query(fresh, rng), fresh) and int(pool.count) == 4
    shown = pool.query(fresh + 4, rng)
    assert torch.equal(shown[:2], fresh[:2] + 4) and int(pool.count) == 6
    copy = ImagePool(6, (1, 1, 1))
    copy.load_state_dict(pool.state_dict())
    given, kept = [], set(range(6))
    for step in range(50):
        new = torch.full((1, 1, 1, 1), 100.0 + step)
        out = pool.query(new, generator(step, "pool"))
        assert torch.equal(out, copy.query(new, generator(step, "pool")))
        given.append(float(out))
    older = [v for step, v in enumerate(given) if v != 100.0 + step]
    assert 15 < len(older) < 35 and kept & {int(v) for v in older}
    assert torch.equal(pool.pictures, copy.pictures)


def test_an_empty_pool_and_a_batch_that_is_not_finite():
    fresh = torch.ones(2, 1, 1, 1)
    assert torch.equal(ImagePool(0, (1, 1, 1)).query(fresh, generator(0)), fresh)
    pool = ImagePool(2, (1, 1, 1))
    pool.query(fresh * float("nan"), generator(0))
    assert int(pool.count) == 0


# --- norms and weights -----------------------------------------------------------------------------------------------

def test_batch_norm_is_torchs_and_its_own_statistics_those_of_a_batch_of_one():
    ours, theirs, x = BatchNorm(3), nn.BatchNorm2d(3), pictures()
    for norm in (ours, theirs):
        norm.train()(x)
    assert torch.allclose(ours(x), theirs(x)) and torch.allclose(ours.running_var, theirs.running_var)
    ours.eval()
    assert torch.allclose(ours(x), theirs.eval()(x))
    alone = torch.cat([nn.BatchNorm2d(3).train()(p[None]) for p in x])
    assert torch.allclose(ours(x, True), alone, atol=1e-5)


def test_spectral_norms_have_a_largest_singular_value_of_one():
    torch.manual_seed(0)
    net = lipschitz(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5)), True)
    for _ in range(60):
        net(torch.randn(1, 3, 3, 3))
    for part in (net[0], net[2]):
        assert torch.linalg.matrix_norm(part.weight.detach().flatten(1), 2).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("config", [ResCriticConfig(spectral=True, **SMALL),
                                    DCCriticConfig(width=8, norm="none", spectral=True)], ids=["resnet", "dcgan"])
def test_a_spectral_critic_is_finite_from_the_start_and_learns(config):
    torch.manual_seed(0)
    critic = config.build(ResGeneratorConfig(latents=8, **SMALL))
    scores, _ = critic(pictures(3))
    scores.sum().backward()
    assert scores.isfinite().all() and all(p.grad.isfinite().all() for p in critic.parameters() if p.grad is not None)


def test_a_frozen_critic_passes_gradients_and_gets_none():
    net, x = nn.Linear(3, 1), torch.ones(2, 3, requires_grad=True)
    net.bias.requires_grad_(False)
    with frozen(net) as critic:
        critic(x).sum().backward()
    assert x.grad is not None and net.weight.grad is None
    assert net.weight.requires_grad and not net.bias.requires_grad


# --- the networks ----------------------------------------------------------------------------------------------------

def test_dcgan_has_its_published_shapes():
    net = DCGeneratorConfig(width=4)
    made, critic = net.build(), DCCriticConfig(width=4).build(net)
    assert made(torch.randn(2, 100)).shape == (2, 3, 64, 64)
    scores, logits = critic(torch.randn(2, 3, 64, 64))
    assert scores.shape == (2, 1) and logits is None
    weights = torch.cat([c.weight.flatten() for c in DCGeneratorConfig().build().convs])
    assert weights.std().item() == pytest.approx(0.02, rel=0.01) and abs(weights.mean().item()) < 1e-4
    with torch.device("meta"):
        assert sum(p.numel() for p in DCCriticConfig().build(DCGeneratorConfig()).parameters()) == 2_765_568


@pytest.mark.parametrize("use", ["map", "projection", "auxiliary"])
@pytest.mark.parametrize("kind", ["dcgan", "resnet"])
def test_critics_see_the_label(use, kind):
    torch.manual_seed(1)
    tables = {"num_classes": 3, "num_styles": 2}
    net = DCGeneratorConfig(size=16, width=8, latents=8, **tables) if kind == "dcgan" else \
        ResGeneratorConfig(latents=8, norm="batch", **SMALL, **tables)
    critic = DCCriticConfig(width=8, norm="none", label=use).build(net) if kind == "dcgan" else \
        ResCriticConfig(label=use, **SMALL).build(net)
    x, style = pictures(3), torch.tensor([0, 1, 0])
    conds = [{"label": torch.tensor(ids), "style": style} for ids in ([0, 1, 2], [1, 2, 0])]
    (one, logits), (two, _) = (critic(x, cond) for cond in conds)
    assert torch.equal(one, two) == (use == "auxiliary") and (logits is not None) == (use == "auxiliary")
    made = net.build()
    z = torch.randn(3, 8)
    assert not torch.equal(made(z, conds[0]), made(z, conds[1]))
    with pytest.raises(InputError):
        made(z, {"style": style})


def test_projection_is_an_inner_product_with_the_row_of_the_label():
    torch.manual_seed(2)
    net = DCGeneratorConfig(size=16, width=8, num_classes=3)
    critic, x = DCCriticConfig(width=8, norm="none", label="projection").build(net), pictures(2)
    scores = [critic(x, {"label": torch.tensor([k, k])})[0] for k in range(3)]
    h = F.leaky_relu(critic.convs[1](F.leaky_relu(critic.convs[0](x), 0.2)), 0.2).sum((2, 3))
    rows = critic.head.rows.label.weight
    assert torch.allclose(scores[1] - scores[0], (h @ (rows[1] - rows[0]))[:, None], atol=1e-4)


def test_residual_networks_start_as_their_skips():
    torch.manual_seed(3)
    net = ResGeneratorConfig(latents=8, **SMALL)
    made, critic = net.build(), ResCriticConfig(**SMALL).build(net)
    h = torch.randn(1, 16, 4, 4)
    assert all(torch.equal(b(h), h) for b in made.stages[0])
    assert made(torch.randn(2, 8)).shape == (2, 3, 16, 16) and critic(pictures(2))[0].shape == (2, 1)


@pytest.mark.parametrize("config", [ResnetConfig(width=4, blocks=2), UNetConfig(width=4, depth=4),
                                    ResnetConfig(width=4, blocks=1, norm="batch", dropout=True)], ids=str)
def test_translators_take_any_multiple(config):
    net = config.build().eval()
    for sides in ((16, 16), (32, 48)):
        assert net(torch.rand(2, 3, *sides)).shape == (2, 3, *sides)


def test_dropout_at_sampling_is_drawn_by_each_item():
    torch.manual_seed(4)
    net, x = UNetConfig(width=4, depth=6).build().eval(), torch.rand(1, 3, 64, 64).expand(3, -1, -1, -1)
    with torch.no_grad():
        made = net(x, ItemNoise([5, 6, 5], "dropout"), True)
        assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
        assert torch.allclose(net(x[:1], ItemNoise([6], "dropout"), True), made[1:2], atol=1e-5)
        assert torch.equal(net(x[:1]), net(x[:1]))
