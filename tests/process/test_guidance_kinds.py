"""Kinds of guidance: identities, exact denoisers, and what a request makes of them."""

import pytest
import torch

from nexus import catalog
from nexus.errors import InputError, UsageError
from nexus.nn.perturb import Perturb
from nexus.process import guidance_kinds as kinds
from nexus.process.guidance import alone, during, guided
from nexus.process.paths import DiscretePath, RectifiedPath
from nexus.process.predictions import noised, target, x0_of
from nexus.process.samplers import sample
from nexus.process.schedules import grid
from nexus.requests import GUIDANCE_KINDS, SampleRequest, check_guidance
from tests.exact import gaussian, mixture
from tests.process.test_diffusion import made, system

PATH = RectifiedPath()
T = torch.tensor(0.6, dtype=torch.float64)
POINTS = torch.tensor([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], dtype=torch.float64)


def sides():
    return mixture(PATH, POINTS[:1], 0.3), mixture(PATH, POINTS, 0.3)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rules():
    return {"cfg-zero": kinds.cfg_zero(PATH, "flow"), "apg": kinds.apg(), "apg of eta 1": kinds.apg(1.0, 0.0, 0.0)}


@pytest.mark.parametrize("name", rules())
def test_scale_1_is_the_condition_alone(name):
    cond, uncond = sides()
    x = draw(5, 2)
    torch.testing.assert_close(guided(cond, uncond, 1.0, rule=rules()[name])(x, T), cond(x, T))


@pytest.mark.parametrize("name", rules())
def test_without_a_difference_there_is_nothing_to_guide(name):
    cond, _ = sides()
    x = draw(5, 2)
    torch.testing.assert_close(guided(cond, cond, 5.0, rule=rules()[name])(x, T), cond(x, T))


def test_the_optimal_scale_leaves_an_error_across_uncond():
    v_c, v_u = draw(2, 4, 3, 5)
    s = kinds.optimal_scale(v_c, v_u).view(-1, 1, 1)
    torch.testing.assert_close(((v_c - s * v_u) * v_u).flatten(1).sum(1), torch.zeros(4, dtype=torch.float64), rtol=0,
                               atol=1e-6)
    torch.testing.assert_close(kinds.optimal_scale(3 * v_u, v_u), torch.full((4,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("path, t", [(PATH, T), (DiscretePath(), torch.tensor(400.0, dtype=torch.float64))])
@pytest.mark.parametrize("prediction", ["flow", "eps", "v", "x0", "edm"])
def test_cfg_zero_acts_on_what_the_network_says(path, t, prediction):
    x0_c, x0_u, eps = draw(3, 4, 3, 2, 2)
    x = noised(path, x0_c, eps, t)
    a, s = path.at(t)
    v_c, v_u = (target(path, prediction, x0, (x - a * x0) / s, t) for x0 in (x0_c, x0_u))
    v_u = v_u * kinds.optimal_scale(v_c, v_u).view(-1, 1, 1, 1)
    want = x0_of(path, prediction, v_u + 4.0 * (v_c - v_u), x, t)
    torch.testing.assert_close(kinds.cfg_zero(path, prediction)(x0_c, x0_u, 4.0, x, t), want)


def test_zero_init_leaves_the_noise_as_it_is():
    g = grid(PATH, PATH.times(10))
    x = draw(4, 2)
    calls, seen = [], []
    cond, _ = sides()
    still = kinds.zero_init(lambda x, t: calls.append(t.item()) or cond(x, t), PATH, "flow", during(g, 0, 0.2))
    sample("euler", still, x, g, watch=lambda i, x, x0: seen.append(x))
    torch.testing.assert_close(seen[1], x)
    assert not torch.equal(seen[2], x) and len(calls) == 8


def test_apg_with_all_of_the_parallel_part_is_cfg():
    cond, uncond = sides()
    x = draw(5, 2)
    plain = guided(cond, uncond, 4.0)(x, T)
    torch.testing.assert_close(guided(cond, uncond, 4.0, rule=kinds.apg(1.0, 0.0, 0.0))(x, T), plain)


def test_apg_moves_across_the_condition_and_no_further_than_its_norm():
    cond, uncond = draw(2, 6, 3, 4, 4)
    change = kinds.apg(0.0, 0.5, 0.0)(cond, uncond, 3.0, None, None) - cond
    torch.testing.assert_close((change * cond).flatten(1).sum(1), torch.zeros(6, dtype=torch.float64), atol=1e-12,
                               rtol=0)
    assert change.flatten(1).norm(dim=1).max() <= 2 * 0.5 + 1e-12
    free = kinds.apg(0.0, 0.0, 0.0)(cond, uncond, 3.0, None, None) - cond
    assert (free.flatten(1).norm(dim=1) > 1.0).all()


def test_apg_momentum_adds_up_differences():
    a, b, zero = *draw(2, 2, 3), torch.zeros(2, 3, dtype=torch.float64)
    rule = kinds.apg(1.0, 0.0, -0.5)
    torch.testing.assert_close(rule(a, zero, 2.0, None, None), 2 * a)
    torch.testing.assert_close(rule(b, zero, 2.0, None, None), b + (b - 0.5 * a))


def test_a_perturbed_side_pushes_the_estimate_away():
    cond, uncond = sides()
    weak = gaussian(PATH, 0.0, 1.0)
    x = draw(5, 2)
    away = kinds.away_from(weak, 3.0)
    push = 3 * (cond(x, T) - weak(x, T))
    torch.testing.assert_close(alone(cond, 1.0, away)(x, T), cond(x, T) + push)
    torch.testing.assert_close(guided(cond, uncond, 4.0, rule=away)(x, T), guided(cond, uncond, 4.0)(x, T) + push)
    torch.testing.assert_close(alone(cond, 1.0, kinds.away_from(cond, 3.0))(x, T), cond(x, T))


def test_outside_its_interval_every_rule_is_the_condition():
    cond, uncond = sides()
    x, off = draw(3, 2), lambda t: t > 2
    for rule in (*rules().values(), kinds.away_from(uncond, 2.0)):
        torch.testing.assert_close(guided(cond, uncond, 4.0, rule=rule, active=off)(x, T), cond(x, T))
        some = guided(cond, uncond, 4.0, rule=rule, active=lambda t: t > 0.5)(x, torch.tensor([0.6, 0.4, 0.3]))
        torch.testing.assert_close(some[1:], cond(x[1:], torch.tensor([0.4, 0.3])))


def test_autoguidance_keeps_samples_in_the_data():
    # of a mixture learnt with too much spread, the sharper of two models away from the blunter one is nearer the data
    g = grid(PATH, PATH.times(40))
    x = draw(400, 2)
    good, bad = mixture(PATH, POINTS, 0.25), mixture(PATH, POINTS, 0.5)

    def off(denoise):
        return torch.cdist(sample("heun", denoise, x, g), POINTS).min(1).values.mean().item()
    assert off(guided(good, bad, 1.5)) < 0.8 * off(good) < 0.8 * off(bad)


# --- parity with diffusers -----------------------------------------------------------------------------------------

def guider(name, **settings):
    from diffusers import guiders
    made = getattr(guiders, name)(**settings)
    made.set_state(5, 28, torch.tensor(500))
    return made


@pytest.mark.parametrize("prediction", ["flow", "eps"])
def test_cfg_zero_is_that_of_diffusers(prediction):
    path, t = (PATH, T) if prediction == "flow" else (DiscretePath(), torch.tensor(500.0, dtype=torch.float64))
    pred_c, pred_u, x = draw(3, 2, 4, 8, 8)
    theirs = guider("ClassifierFreeZeroStarGuidance", guidance_scale=6.0).forward(pred_c, pred_u).pred
    x0_c, x0_u = (x0_of(path, prediction, v, x, t) for v in (pred_c, pred_u))
    ours = kinds.cfg_zero(path, prediction)(x0_c, x0_u, 6.0, x, t)
    torch.testing.assert_close(ours, x0_of(path, prediction, theirs, x, t), rtol=1e-6, atol=1e-6)
    if prediction == "flow":
        first = guider("ClassifierFreeZeroStarGuidance", zero_init_steps=6).forward(pred_c, pred_u).pred
        still = kinds.zero_init(None, path, prediction, lambda t: torch.tensor(True))(x, t)
        torch.testing.assert_close(still, x0_of(path, prediction, first, x, t))


@pytest.mark.parametrize("eta, norm, momentum", [(0.0, 15.0, None), (1.0, 0.0, None), (0.3, 5.0, -0.5)])
def test_apg_is_that_of_diffusers(eta, norm, momentum):
    theirs = guider("AdaptiveProjectedGuidance", guidance_scale=6.0, eta=eta, use_original_formulation=True,
                    adaptive_projected_guidance_rescale=norm, adaptive_projected_guidance_momentum=momentum)
    if momentum is not None:
        from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
        theirs.momentum_buffer = MomentumBuffer(momentum)
    ours = kinds.apg(eta, norm, momentum or 0.0)
    for seed in range(3):
        cond, uncond = draw(2, 2, 4, 8, 8, seed=seed)
        want = theirs.forward(cond, uncond).pred        # the paper's w is their scale + 1
        torch.testing.assert_close(ours(cond, uncond, 7.0, None, None), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name, word", [("PerturbedAttentionGuidance", "perturbed_guidance"),
                                        ("SkipLayerGuidance", "skip_layer_guidance")])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_perturbed_guidance_is_that_of_diffusers(name, word, rescale):
    cond, uncond, weak = draw(3, 2, 4, 8, 8)
    theirs = guider(name, guidance_scale=6.0, guidance_rescale=rescale, **{
        f"{word}_scale": 2.8, f"{word}_stop": 1.0, f"{word}_layers": [1]}).forward(cond, uncond, weak).pred
    ours = guided(lambda x, t: cond, lambda x, t: uncond, 6.0, rule=kinds.away_from(lambda x, t: weak, 2.8),
                  rescale=rescale)
    torch.testing.assert_close(ours(cond, T), theirs, rtol=1e-6, atol=1e-6)


def test_autoguidance_is_that_of_diffusers():
    cond, weak = draw(2, 2, 4, 8, 8)
    theirs = guider("AutoGuidance", guidance_scale=2.5, auto_guidance_layers=[1], dropout=0.1).forward(cond, weak).pred
    torch.testing.assert_close(guided(lambda x, t: cond, lambda x, t: weak, 2.5)(cond, T), theirs, rtol=1e-6,
                               atol=1e-6)


# --- networks that can be weakened ----------------------------------------------------------------------------------

@pytest.mark.parametrize("name, preset", [("dit", "tiny"), ("conditional", "tiny"), ("conditional", "tiny-text"),
                                          ("pixart", "tiny")])
def test_a_perturbed_network_differs_and_an_empty_perturbation_does_not(name, preset):
    built = system(name, preset)
    net, cond = built.net, built.conditioner.null(2, torch.device("cpu"))
    x, t = torch.randn(2, *built.config.latent_shape), torch.full((2,), 500.0)
    with torch.no_grad():
        plain = net(x, t, cond)
        assert torch.equal(net(x, t, cond, perturb=Perturb()), plain)
        seen = [plain]
        for layer in range(net.layers):
            for perturb in (Perturb(identity=frozenset({layer})), Perturb(skip=frozenset({layer}))):
                out = net(x, t, cond, perturb=perturb)
                assert all(not torch.equal(out, other) for other in seen), (layer, perturb)
                seen.append(out)
        assert torch.equal(net(x, t, cond), plain)


def test_identity_attention_gives_every_pixel_its_own_value():
    from nexus.nn.resnet import SelfAttention2d
    attention = SelfAttention2d(8, 2, groups=4)
    x = torch.randn(2, 8, 4, 4)
    other = x.clone()
    other[:, :, 0, 0] += 1                              # changes the norm's statistics, so compare without them
    attention.norm = torch.nn.Identity()
    changed = (attention(other, True) - attention(x, True)).abs().amax(dim=(0, 1)) > 1e-6
    assert changed.nonzero().tolist() == [[0, 0]]


# --- what a request makes of them -------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, preset", [("dit", "tiny"), ("conditional", "tiny"), ("conditional", "tiny-text"),
                                          ("flow", "tiny")])
@pytest.mark.parametrize("kind", ["cfg-zero", "apg", "pag", "slg"])
def test_every_kind_changes_the_picture_and_keeps_items_apart(name, preset, kind):
    built = system(name, preset)
    shared = {"prompt": "cat", "guidance": 3.0, "sampler": "ddim"}
    plain, of_kind = made(built, **shared), made(built, seeds=(0, 1, 2), guidance_kind=kind, **shared)
    assert of_kind.isfinite().all() and not torch.equal(of_kind[:1], plain)
    assert (made(built, seeds=(2,), guidance_kind=kind, **shared)[0] - of_kind[2]).abs().max() <= 2 / 255
    start = {"zero_init": 0} if kind == "cfg-zero" else {}
    off = made(built, guidance_kind=kind, guidance_interval=(0.0, 0.0), **start, **shared)
    torch.testing.assert_close(off, made(built, **{**shared, "guidance": 1.0}))


@pytest.mark.parametrize("kind", ["pag", "slg"])
def test_an_unconditional_model_steers_away_from_its_weaker_self(kind):
    built = system("ddpm")
    plain = made(built, sampler="ddim")
    assert (made(built, sampler="ddim", guidance_kind=kind) - plain).abs().max() > 1e-3
    torch.testing.assert_close(made(built, sampler="ddim", guidance_kind=kind, perturb_scale=0.0), plain)


def test_autoguidance_by_the_model_itself_changes_nothing():
    built, request = system("dit"), SampleRequest(prompt="cat", guidance_kind="autoguidance", guide_model="it",
                                                  sampler="ddim")
    same = built.generate(request, seeds=[0], guide=built).data
    torch.testing.assert_close(same, made(built, prompt="cat", guidance=1.0, sampler="ddim"))
    weaker = system("dit")
    with torch.no_grad():
        weaker.net.final.weight.mul_(0.5)
    assert (built.generate(request, seeds=[0], guide=weaker).data - same).abs().max() > 1e-3
    assert built.used_settings(request)["guidance"] == 2.0


def test_dynamic_thresholds_are_for_pixels():
    pixels = system("conditional")
    shared = {"prompt": "cat", "guidance": 7.0, "sampler": "ddim"}
    assert not torch.equal(made(pixels, dynamic_threshold=0.9, **shared), made(pixels, **shared))
    with pytest.raises(UsageError, match="--dynamic-threshold"):
        made(system("dit"), dynamic_threshold=0.9, **shared)


@pytest.mark.parametrize("given, flag", [
    ({"guidance_kind": "autoguidance"}, "--guide-model"), ({"guidance_kind": "classifier"}, "--guide-model"),
    ({"guide_model": "x"}, "--guide-model"), ({"guidance_kind": "cfg", "apg": (0, 1, 0)}, "--apg"),
    ({"guidance_kind": "apg", "perturb_layers": (1,)}, "--perturb-layers"), ({"zero_init": 1}, "--zero-init")])
def test_settings_without_meaning_are_named(given, flag):
    with pytest.raises(UsageError, match=flag):
        check_guidance(given)
    with pytest.raises(UsageError, match=flag):
        made(system("dit"), prompt="cat", **given)


def test_what_a_model_cannot_do_is_said():
    from nexus.models.diffusion.unet import UNetConfig
    flat = UNetConfig.parse(UNetConfig.presets["tiny"] | {"attention": [], "mid_attention": False})
    with pytest.raises(UsageError, match="cannot skip layers"):
        made(system("ddpm", net=flat), guidance_kind="slg")
    with pytest.raises(UsageError, match="layers 0 to 1"):
        made(system("dit"), prompt="cat", guidance_kind="pag", perturb_layers=(7,))
    with pytest.raises(UsageError, match="unconditional"):
        made(system("ddpm"), guidance_kind="apg")
    with pytest.raises(UsageError, match="dopri5"):
        made(system("conditional"), prompt="cat", guidance_kind="apg", sampler="dopri5")
    request = SampleRequest(prompt="cat", guidance_kind="autoguidance", guide_model="other")
    with pytest.raises(UsageError, match="other was trained on another noise process"):
        system("conditional").generate(request, seeds=[0], guide=system("flow", size=16))
    with pytest.raises(UsageError, match="other does not see"):
        system("dit").generate(request, seeds=[0], guide=system("flow"))
    with pytest.raises(UsageError, match="is no classifier"):
        request = SampleRequest(prompt="cat", guidance_kind="classifier", guide_model="other")
        system("conditional").generate(request, seeds=[0], guide=system("conditional"))


# --- classifier guidance ----------------------------------------------------------------------------------------------

def batch(n=4):
    return {"image": torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0)).clamp(-1, 1),
            "label": torch.arange(n) % 3, "style": torch.zeros(n, dtype=torch.long), "caption": ["cat"] * n}


def test_a_classifier_learns_from_noised_pictures():
    built = system("conditional", "classifier-tiny").train()
    values = built.loss(batch(), torch.Generator().manual_seed(1), 0)
    values["loss"].backward()
    assert values["loss"].item() == pytest.approx(torch.tensor(3.0).log().item(), abs=1.5)
    assert 0 <= values["accuracy"] <= 1
    assert all(p.grad is not None and p.grad.isfinite().all() for p in built.net.parameters())


@pytest.mark.parametrize("name", ["ddpm", "conditional"])
def test_a_classifier_guides_with_and_without_a_condition(name):
    built, guide = system(name), system("conditional", "classifier-tiny")
    settings = {"prompt": "green pear", "guidance_kind": "classifier", "guide_model": "it", "sampler": "ddim"}
    media = built.generate(SampleRequest(guidance=3.0, **settings), seeds=[0], guide=guide)
    plain = built.generate(SampleRequest(guidance=0.0, **settings), seeds=[0], guide=guide)
    assert media.notes[0]["class"] == "green pear"
    assert (media.data - plain.data).abs().max() > 1e-4

    def belief(data):
        t = torch.tensor(20.0, dtype=torch.float64)
        return guide.log_prob(data, t, torch.tensor([1])).item()
    assert belief(media.data) > belief(plain.data)


def test_a_classifier_makes_no_pictures():
    with pytest.raises(InputError, match="classifier"):
        made(system("conditional", "classifier-tiny"), prompt="cat")


def test_a_classifier_needs_labels():
    config = catalog.config_class("conditional")
    with pytest.raises(InputError, match="label"):
        config.parse(config.presets["classifier-tiny"] | {"conditioner": {"kind": "text"}})


def test_every_kind_has_a_test_here():
    assert set(GUIDANCE_KINDS) == {"cfg", "cfg-zero", "apg", "pag", "slg", "autoguidance", "classifier"}
