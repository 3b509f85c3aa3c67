"""MMDiT and FLUX: exact sizes, the identity at the start, prepared runs, positions, masks, distilled guidance."""

import pytest
import torch

from nexus.errors import InputError, UsageError
from nexus.models.diffusion.flux import FluxNetConfig
from nexus.models.diffusion.mmdit import Distilled, MMDiTConfig, MMDiTNetConfig, SD3Path, position_table
from nexus.nn.joint import alone
from nexus.nn.norm import QKNorm
from nexus.nn.perturb import Perturb
from nexus.nn.rope import axial_rotation, grid_positions, rotate
from nexus.process.paths import RectifiedPath
from nexus.requests import SampleRequest
from nexus.text.conditioner import TextCondConfig

COUNTS = {"sd3-medium": 2_028_328_000, "sd35-large": 8_056_627_520, "sd35-medium": 2_243_171_520,
          "flux-dev": 11_901_408_320, "flux-schnell": 11_891_178_560}
FAMILIES = {"sd3": MMDiTNetConfig, "flux": FluxNetConfig}
each_family = pytest.mark.parametrize("family", FAMILIES)


def random_net(family, **changes):
    """A tiny network whose zero-initialised layers are random too, so that every weight matters."""
    torch.manual_seed(0)
    config = FAMILIES[family]
    net = config.parse(config.presets["tiny"] | changes).build().eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.normal_(1.0 if "norm." in name else 0.0, 0.1)
    return net


def latents(batch=3, rows=8, cols=8, channels=4):
    return torch.randn(batch, channels, rows, cols, generator=torch.Generator().manual_seed(1))


def text(batch=3, length=5, seed=2):
    rng = torch.Generator().manual_seed(seed)
    return {"context": torch.randn(batch, length, 16, generator=rng), "pooled": torch.randn(batch, 16, generator=rng)}


TIMES = torch.tensor([3.0, 500.0, 1000.0])


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_count_is_the_published(name):
    with torch.device("meta"):
        net = MMDiTConfig.preset(name).net.build()
    assert sum(p.numel() for p in net.parameters()) == COUNTS[name]
    assert not list(net.buffers())


def test_a_stored_table_of_positions_is_a_buffer():
    with torch.device("meta"):
        net = MMDiTNetConfig(stored_positions=True).build()
    assert sum(t.numel() for t in net.state_dict().values()) == 2_084_951_104
    assert net.positions.shape == (1, 192 * 192, 1536)


def test_the_small_model_is_small():
    """With a vocabulary as large as the emoji's, the network and its text encoder have at most 4.5M parameters."""
    config = MMDiTConfig.preset("emoji")
    encoder = config.conditioner.encoder.model_copy(update={"words": tuple(map(str, range(1600)))})
    with torch.device("meta"):
        system = config.model_copy(update={"conditioner": TextCondConfig(encoder=encoder)}).build()
    phase, = system.phases()
    assert 3_000_000 < sum(p.numel() for p in phase.module.parameters()) <= 4_500_000


@each_family
def test_a_new_network_says_zero_and_every_block_is_the_identity(family):
    net = FAMILIES[family].preset("tiny").build()
    out = net(latents(), TIMES, text())
    assert out.shape == (3, 4, 8, 8) and not out.any()
    block, x, context = net.blocks[0], torch.randn(3, 16, 32), torch.randn(3, 5, 32)
    mods = (block.x.adaln(torch.randn(3, 32)), block.context.adaln(torch.randn(3, 32)))
    rotation = axial_rotation(torch.zeros(21, 3), (4, 6, 6)) if family == "flux" else None
    after = block(x, context, *mods, rotation=rotation)
    assert torch.equal(after[0], x) and torch.equal(after[1], context)


@each_family
def test_patches_go_back_where_they_came_from(family):
    """With identity blocks and a final layer that reads one token, only that token's patch is written."""
    net = random_net(family)
    with torch.no_grad():
        for layer in net.adalns()[:-1]:
            layer.weight.zero_()
            layer.bias.zero_()
    x, t, cond = latents(1), TIMES[:1], text(1)
    y = x.clone()
    y[:, :, 2:4, 6:8] += 1
    changed = (net(x, t, cond) != net(y, t, cond)).any(1)[0]
    assert changed[2:4, 6:8].all() and changed.sum() == 4


@each_family
@pytest.mark.parametrize("batch", [1, 3])
def test_prepared_runs_are_the_computed_ones(family, batch):
    net, x = random_net(family), latents(batch)
    cond = text(batch)
    if batch == 3:                                                    # two items with one condition
        cond["pooled"][2] = cond["pooled"][0]
    if family == "flux":
        cond["reference"] = latents(batch, 4, 6)
    prepared = net.prepare(torch.tensor([1000.0, 12.5, 3.0]), cond)
    assert len(prepared["mods"][0][0]) == min(batch, 2)
    for t in (1000.0, 12.5, 3.0, 7.0):                                # the last one was not prepared
        times = torch.full((batch,), t)
        torch.testing.assert_close(net(x, times, cond, prepared), net(x, times, cond), rtol=1e-5, atol=1e-5)


@each_family
def test_prepare_leaves_modulations_out_that_would_not_fit(family, monkeypatch):
    monkeypatch.setattr("nexus.nn.joint.PREPARED_BYTES", 10)
    net, x, t, cond = random_net(family), latents(), torch.full((3,), 4.0), text()
    prepared = net.prepare(t[:1], cond)
    assert not prepared["steps"] and torch.equal(net(x, t, cond, prepared), net(x, t, cond))


@each_family
def test_masked_words_are_not_seen(family):
    net, x, cond = random_net(family), latents(), text()
    mask = torch.arange(5) < torch.tensor([[2], [5], [3]])
    out = net(x, TIMES, cond | {"context_mask": mask})
    shorter = {"context": cond["context"][:1, :2], "pooled": cond["pooled"][:1]}
    torch.testing.assert_close(out[:1], net(x[:1], TIMES[:1], shorter), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[1:2], net(x, TIMES, cond)[1:2], rtol=1e-4, atol=1e-4)


@each_family
def test_words_matter_and_their_order_does_not(family):
    """Neither family numbers its words."""
    net, x, cond = random_net(family), latents(), text()
    out, turned = net(x, TIMES, cond), net(x, TIMES, cond | {"context": cond["context"].flip(1)})
    torch.testing.assert_close(out, turned, rtol=1e-4, atol=1e-4)
    for key in cond:
        assert (net(x, TIMES, cond | {key: 2 * cond[key]}) - out).abs().max() > 1e-3


@each_family
def test_items_do_not_see_each_other(family):
    net, x, cond = random_net(family), latents(), text()
    alone_each = torch.cat([net(x[i:i + 1], TIMES[i:i + 1], {k: v[i:i + 1] for k, v in cond.items()})
                            for i in range(3)])
    torch.testing.assert_close(alone_each, net(x, TIMES, cond), rtol=1e-4, atol=1e-4)


@each_family
def test_bfloat16_stays_near_float32(family):
    net, x, cond = random_net(family), latents(), text()
    with torch.no_grad():
        full = net(x, TIMES, cond)
        half = net.bfloat16()(x, TIMES, cond)
        prepared = net(x, TIMES, cond, net.prepare(TIMES[:1], cond))
    assert half.dtype == prepared.dtype == torch.bfloat16
    assert (half.float() - full).abs().max() < 0.05 * full.abs().max()


@each_family
def test_a_network_built_on_meta_computes_after_loading(family):
    net, cond = random_net(family), text()
    with torch.device("meta"):
        copy = net.config.build()
    copy.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(copy.eval()(latents(), TIMES, cond), net(latents(), TIMES, cond))


@each_family
def test_gradients_reach_every_weight(family):
    net = random_net(family, **({"guidance": True} if family == "flux" else {}))
    net(latents(), TIMES, text()).square().mean().backward()
    unseen = {f"blocks.{len(net.blocks) - 1}.context.attn.norm.q.weight"} if family == "sd3" else set()
    without = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == unseen, "only the queries of SD3's last text side ask for nothing"
    assert all(p.grad is not None for p in net.parameters())


@each_family
@pytest.mark.parametrize("cond, message", [(None, "context"), ({"context": torch.zeros(3, 2, 16)}, "pooled")])
def test_a_missing_text_is_refused(family, cond, message):
    with pytest.raises(InputError, match=message):
        random_net(family)(latents(), TIMES, cond)
    with pytest.raises(InputError, match=message):
        random_net(family).prepare(TIMES, cond)


@each_family
def test_layers_can_be_weakened(family):
    net, x, cond = random_net(family), latents(), text()
    out = net(x, TIMES, cond)
    assert net.layers == (2 if family == "sd3" else 3) and net.middle < net.layers
    assert torch.equal(net(x, TIMES, cond, perturb=Perturb()), out)
    outputs = [out] + [net(x, TIMES, cond, perturb=Perturb(**{kind: frozenset({i})}))
                       for kind in ("identity", "skip") for i in range(net.layers)]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(outputs) for b in outputs[:i])


def test_alone_leaves_text_and_the_token_itself():
    mask = alone(None, 2, 3, torch.device("cpu"))[0, 0]
    assert mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1]]
    words = torch.tensor([[True, False]])
    assert not alone(torch.nn.functional.pad(words, (0, 3), value=True)[:, None, None], 2, 3, mask.device)[..., 1].any()


# --- SD3 -----------------------------------------------------------------------------------------------------------

def test_other_sizes_see_the_centre_of_the_table():
    config = MMDiTNetConfig.preset("tiny")
    whole = position_table(config).view(6, 6, -1)
    assert torch.allclose(position_table(config, 4, 2).view(4, 2, -1), whole[1:5, 2:4], atol=1e-6)
    assert torch.allclose(position_table(config, 3, 3).view(3, 3, -1), whole[1:4, 1:4], atol=1e-6)
    net = random_net("sd3")
    stored = random_net("sd3", stored_positions=True)
    for rows, cols in ((12, 4), (2, 10), (8, 8)):
        x, cond = latents(2, rows, cols), text(2)
        assert net(x, TIMES[:2], cond).shape == x.shape
        torch.testing.assert_close(stored(x, TIMES[:2], cond), net(x, TIMES[:2], cond), rtol=1e-5, atol=1e-5)
    for rows, cols in ((7, 8), (8, 14)):
        with pytest.raises(InputError, match=f"{rows}x{cols}"):
            net(latents(1, rows, cols), TIMES[:1], text(1))


def test_sd3s_grid_ends_at_its_least_time():
    path = SD3Path(shift=3.0)
    times = path.times(10)
    least = 3e-3 / (1 + 2e-3)
    assert times[0] == 1 and times[-1].item() == pytest.approx(3 * least / (1 + 2 * least))
    assert torch.equal(path.times(1), torch.ones(1, dtype=torch.float64))
    assert SD3Path(shift=1.0).times(1000).flip(0).tolist() == pytest.approx([i / 1000 for i in range(1, 1001)])
    rng = torch.Generator().manual_seed(0)
    usual = RectifiedPath(shift=3.0).sample_t(5, torch.Generator().manual_seed(0))
    assert torch.equal(path.sample_t(5, rng), usual)


# --- FLUX ----------------------------------------------------------------------------------------------------------

def test_rotation_depends_on_distance_alone():
    q, k = torch.randn(2, 3, 1, 16, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(a, b):
        turned = (rotate(v, axial_rotation(torch.tensor([p]), (4, 6, 6))) for v, p in ((q, a), (k, b)))
        left, right = turned
        return (left * right).sum(-1)

    torch.testing.assert_close(score([1, 2, 5], [1, 7, 3]), score([0, 10, 15], [0, 15, 13]), rtol=1e-4, atol=1e-5)
    assert (score([1, 2, 5], [1, 7, 3]) - score([1, 2, 5], [1, 3, 7])).abs().max() > 1e-3
    torch.testing.assert_close(score([4, 4, 4], [4, 4, 4]), (q * k).sum(-1), rtol=1e-5, atol=1e-5)


def test_rotation_keeps_lengths_and_the_origin():
    places = grid_positions(2, 3, first=1)
    assert places.tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    x = torch.randn(2, 6, 8)
    turned = rotate(x, axial_rotation(places, (2, 2, 4)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x[:, :1], axial_rotation(torch.zeros(1, 3), (2, 2, 4))), x[:, :1])
    assert rotate(x.bfloat16(), axial_rotation(places, (2, 2, 4))).dtype == torch.bfloat16


def test_qk_norm_gives_unit_mean_squares():
    q, k = QKNorm(8)(3 * torch.randn(2, 4, 5, 8), 0.1 + torch.randn(2, 4, 5, 8))
    for v in (q, k):
        torch.testing.assert_close(v.square().mean(-1), torch.ones(2, 4, 5), rtol=1e-3, atol=1e-3)


def test_missing_guidance_is_one():
    net, x, cond = random_net("flux", guidance=True), latents(), text()
    out = net(x, TIMES, cond)
    assert torch.equal(out, net(x, TIMES, cond | {"guidance": torch.ones(3)}))
    assert (out - net(x, TIMES, cond | {"guidance": torch.full((3,), 3.5)})).abs().max() > 1e-3
    with_scale = cond | {"guidance": torch.tensor([1.0, 3.5, 3.5])}
    prepared, t = net.prepare(TIMES[:1], with_scale), TIMES[:1].expand(3)
    torch.testing.assert_close(net(x, t, with_scale, prepared), net(x, t, with_scale), rtol=1e-5, atol=1e-5)


def test_a_reference_is_looked_at_and_not_written():
    net, x, cond = random_net("flux"), latents(), text()
    out = net(x, TIMES, cond | {"reference": latents(3, 4, 6)})
    assert out.shape == x.shape and (out - net(x, TIMES, cond)).abs().max() > 1e-3
    with pytest.raises(InputError, match="4x5"):
        net(x, TIMES, cond | {"reference": latents(3, 4, 5)})


def test_concatenated_channels_are_counted():
    net = random_net("flux", in_channels=6)
    assert net(latents(), TIMES, text() | {"concat": latents(channels=2)}).shape == (3, 4, 8, 8)
    with pytest.raises(InputError, match="4 channels given, 6 expected"):
        net(latents(), TIMES, text())
    with pytest.raises(InputError, match="6x5"):
        random_net("flux")(latents(3, 6, 5), TIMES, text())


# --- the system ----------------------------------------------------------------------------------------------------

def distilled():
    config = MMDiTConfig.preset("tiny-flux").override(["net.guidance=true", "guidance=3.5"])
    torch.manual_seed(0)
    system = config.build().eval()
    with torch.no_grad():
        for name, parameter in system.net.named_parameters():
            parameter.normal_(1.0 if "norm." in name else 0.0, 0.1)
    return system


def test_distilled_guidance_is_an_input_and_no_second_half():
    system = distilled()
    assert isinstance(system, Distilled) and type(MMDiTConfig.preset("tiny-flux").build()) is not Distilled
    seen = []
    system.net.register_forward_pre_hook(lambda net, args: seen.append((len(args[0]), args[2]["guidance"].tolist())))
    first = system.generate(SampleRequest(prompt="red", steps=2), seeds=[0, 1])
    assert seen == [(2, [3.5, 3.5])] * 2
    second = system.generate(SampleRequest(prompt="red", steps=2, guidance=1.5), seeds=[0, 1])
    assert seen[2:] == [(2, [1.5, 1.5])] * 2 and not torch.equal(first.data, second.data)
    assert first.notes[0]["caption"] == "red"


def test_distilled_guidance_goes_with_skipped_layers():
    system, shared = distilled(), {"prompt": "red", "steps": 2}
    plain = system.generate(SampleRequest(**shared), seeds=[0]).data
    for kind in ("pag", "slg"):
        assert not torch.equal(system.generate(SampleRequest(**shared, guidance_kind=kind), seeds=[0]).data, plain)


@pytest.mark.parametrize("wrong", [{"negative_prompt": "blue"}, {"guidance_interval": (0.2, 0.8)},
                                   {"guidance_rescale": 0.5}, {"guidance_kind": "apg"}])
def test_distilled_guidance_cannot_steer_away(wrong):
    with pytest.raises(UsageError, match="input of its network"):
        distilled().generate(SampleRequest(prompt="red", steps=2, **wrong), seeds=[0])


def test_every_family_trains_and_samples():
    for preset in ("tiny", "tiny-flux"):
        system = MMDiTConfig.preset(preset).build()
        batch = {"latent": torch.randn(4, 4, 8, 8), "caption": ["red ball"] * 4, "style": torch.zeros(4).long()}
        loss = system.loss(batch, torch.Generator().manual_seed(0), 0)["loss"]
        loss.backward()
        assert loss.isfinite() and system.net.final.weight.grad.any()
        made = system.eval().generate(SampleRequest(prompt="red ball", steps=2), seeds=[0, 1])
        assert made.data.shape == (2, 3, 16, 16) and made.data.isfinite().all()


@pytest.mark.parametrize("bad", [{"hidden": 30, "heads": 4}, {"hidden": 34}, {"size": 9}, {"size": 16},
                                 {"dual": (2,)}, {"heads": 0}])
def test_impossible_sd3_settings_are_refused(bad):
    with pytest.raises(InputError):
        MMDiTNetConfig.parse(MMDiTNetConfig.presets["tiny"] | bad)


@pytest.mark.parametrize("bad", [{"axes": (4, 6, 8)}, {"axes": (5, 5, 6)}, {"heads": 3}, {"axes": "x"},
                                 {"axes": (-2, 10, 8)}])
def test_impossible_flux_settings_are_refused(bad):
    with pytest.raises(InputError):
        FluxNetConfig.parse(FluxNetConfig.presets["tiny"] | bad)
