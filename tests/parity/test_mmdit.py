"""SD3 and FLUX against their authors' code (saved numbers) and diffusers (tiny and random), and back to their files."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.mmdit import LAYOUTS
from nexus.errors import ModelError
from nexus.models.diffusion.mmdit import MMDiTConfig, position_table
from nexus.process import samplers
from nexus.process.guidance import guided
from nexus.process.predictions import denoiser
from nexus.process.schedules import grid
from tests.parity import whole
from tests.parity.whole import assert_round_trip, shapes

ORIGINAL, REPACKED, DIFFUSERS = LAYOUTS
ROOT = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
needs_sd3, needs_flux = (
    pytest.mark.skipif(not (ROOT / name).is_dir(), reason=f"no parity case at {ROOT / name}; set NEXUS_PARITY")
    for name in ("sd3-mmdit-a", "flux-a"))
SD3 = {"sample_size": 8, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 3, "in_channels": 4,
       "joint_attention_dim": 20, "caption_projection_dim": 48, "pooled_projection_dim": 24, "out_channels": 4,
       "pos_embed_max_size": 10}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 20, "pooled_projection_dim": 24, "axes_dims_rope": [4, 6, 6]}


def loaded(layout, state, foreign=None, **said):
    assert [one.name for one in LAYOUTS if one.matches(shapes(state), foreign)] == [layout.name]
    data = layout.config(shapes(state), foreign)
    data["net"] |= said
    config = MMDiTConfig.parse(data)
    assert not layout.constants(config.to_json())
    net = config.net.build().eval()
    net.load_state_dict(to_native(layout.table(config.to_json()), state))
    return net, config


def assert_close(ours, reference):
    assert ours.shape == reference.shape
    whole.assert_close(ours, reference)


# --- the authors' code ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def sd3():
    state = load_file(ROOT / "sd3-mmdit-a/checkpoint.safetensors")
    return *loaded(ORIGINAL, state), state, load_file(ROOT / "sd3-mmdit-a/tensors.safetensors")


@pytest.fixture(scope="module")
def flux():
    state = load_file(ROOT / "flux-a/checkpoint.safetensors")
    return *loaded(ORIGINAL, state, axes=(4, 6, 6)), state, load_file(ROOT / "flux-a/tensors.safetensors")


@needs_sd3
@torch.no_grad()
def test_sd3_output(sd3):
    net, config, state, saved = sd3
    assert sum(p.numel() for p in net.parameters()) == 847_232 and net.config.stored_positions
    cond = {"context": saved["context"], "pooled": saved["y"]}
    assert_close(net(saved["x"], saved["t"], cond), saved["output"])
    sigma = torch.tensor([0.4, 0.9])
    denoise = denoiser(net, config.path, config.prediction, cond)
    assert_close(denoise(saved["x"], sigma), saved["apply_model"])
    assert_round_trip(ORIGINAL, net, config.to_json(), state)


@needs_sd3
@torch.no_grad()
def test_sd3_sampling(sd3):
    net, config, _, saved = sd3
    points = grid(config.path, config.path.times(4, shape=saved["noise"].shape[1:]))
    assert (points.sigma - saved["sigmas_4"]).abs().max() <= 1e-6
    each = ({"context": saved[f"{un}context"], "pooled": saved[f"{un}y"]} for un in ("", "uncond_"))
    cond, uncond = (denoiser(net, config.path, config.prediction, c, net.prepare(1000 * points.t[:-1].float(), c))
                    for c in each)
    x = samplers.sample(config.sampler, guided(cond, uncond, 4.5), saved["noise"] * points.sigma[0], points)
    assert_close(x.float(), saved["sampled_euler"])


def packed(x):
    """[B, C, H, W] -> [B, H/2 * W/2, 4 C], as FLUX's code keeps latents."""
    return torch.nn.functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens, rows, cols):
    return torch.nn.functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (rows, cols)), 2)


def flux_cond(saved, guidance):
    return {"context": saved["txt"], "pooled": saved["vec"], "guidance": guidance}


@needs_flux
@torch.no_grad()
def test_flux_output(flux):
    net, config, state, saved = flux
    assert sum(p.numel() for p in net.parameters()) == 284_032
    assert torch.equal(packed(saved["latent"]), saved["img"])
    out = net(saved["latent"], 1000 * saved["timesteps"], flux_cond(saved, saved["guidance"]))
    assert_close(packed(out), saved["output"])
    assert_round_trip(ORIGINAL, net, config.to_json(), state)


@needs_flux
@torch.no_grad()
@pytest.mark.parametrize("name, guidance", [("denoised", 3.5), ("denoised_kontext", 2.5)])
def test_flux_sampling(flux, name, guidance):
    net, config, _, saved = flux
    ids = saved["img_cond_seq_ids"][0]
    rows, cols = (int(ids[:, i].max()) + 1 for i in (1, 2))
    cond = flux_cond(saved, torch.full((2,), guidance))
    if name == "denoised_kontext":
        assert ids[:, 0].eq(1).all()
        cond["reference"] = unpacked(saved["img_cond_seq"], rows, cols)
    points = grid(config.path, config.path.times(3, shape=saved["latent"].shape[1:]))
    assert (points.sigma - saved["schedule_3"]).abs().max() <= 1e-6
    prepared = net.prepare(config.path.network_time(points.t[:-1]).float(), cond)
    for ready in (prepared, None):
        denoise = denoiser(net, config.path, config.prediction, cond, ready)
        x = samplers.sample(config.sampler, denoise, saved["latent"], points).float()
        assert_close(packed(x), saved[name])
    if name == "denoised":
        assert_close(x, saved["denoised_unpacked"])


@needs_flux
def test_flux_schedule_at_4096_tokens(flux):
    _, config, _, saved = flux
    points = grid(config.path, config.path.times(4, shape=(16, 128, 128)))
    assert (points.sigma - saved["schedule_4_len4096"]).abs().max() <= 1e-6


@needs_flux
def test_axes_are_asked_for_when_the_width_of_a_head_is_unknown(flux, tmp_path):
    source = ROOT / "flux-a/checkpoint.safetensors"
    with pytest.raises(ModelError, match=r"net\.axes"):
        convert(source, tmp_path / "a")
    report = convert(source, tmp_path / "a", overrides=["net.axes=[4,6,6]"])
    assert report.layout == "mmdit/original" and report.assumed == {}
    convert(tmp_path / "a", tmp_path / "back.safetensors", to="original")
    back, state = load_file(tmp_path / "back.safetensors"), flux[2]
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)


@needs_sd3
@needs_flux
def test_files_with_and_without_the_prefix(sd3, flux, tmp_path):
    from safetensors.torch import save_file
    for net, config, state, _ in (sd3, flux):
        other = to_foreign(REPACKED.table(config.to_json()), net.state_dict())
        again, settings = loaded(REPACKED, other, **({"axes": (4, 6, 6)} if config.net.kind == "flux" else {}))
        assert settings == config and all(torch.equal(a, b) for a, b in zip(
            again.state_dict().values(), net.state_dict().values(), strict=True))
        assert {key.removeprefix("model.diffusion_model.") for key in state} == {
            key.removeprefix("model.diffusion_model.") for key in other}
    # A whole model's file: the transformer is taken, the codec and the text encoders are left.
    beside = {"first_stage_model.decoder.conv_in.weight": torch.zeros(2), "text_encoders.clip_l.x": torch.zeros(2)}
    save_file(sd3[2] | beside, tmp_path / "whole.safetensors")
    assert set(convert(tmp_path / "whole.safetensors", tmp_path / "m").dropped) == set(beside)


# --- diffusers -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def random_model(cls, options):
    torch.manual_seed(0)
    model = cls(**options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Gains away from 1, so that a wrong place of one shows.
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (1 if "norm_" in name and parameter.ndim == 1 else 0))
    return model


@pytest.mark.parametrize("extra", [{}, {"qk_norm": "rms_norm"},
                                   {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}],
                         ids=["sd3", "sd35-large", "sd35-medium"])
@torch.no_grad()
def test_diffusers_sd3(diffusers, extra):
    reference = random_model(diffusers.SD3Transformer2DModel, SD3 | extra)
    state = reference.state_dict()
    net, config = loaded(DIFFUSERS, state, dict(reference.config))
    assert torch.allclose(position_table(net.config), state["pos_embed.pos_embed"][0], atol=1e-6)
    for height, width in ((8, 8), (12, 6), (20, 20)):
        x, t = torch.randn(2, 4, height, width), torch.tensor([3.0, 900.0])
        context, pooled = torch.randn(2, 5, 20), torch.randn(2, 24)
        expected = reference(x, context, pooled, t).sample
        assert_close(net(x, t, {"context": context, "pooled": pooled}), expected)
    assert_round_trip(DIFFUSERS, net, config.to_json(), state)
    again = type(reference).from_config(DIFFUSERS.foreign_config(config.to_json()))
    assert shapes(again.state_dict()) == shapes(state)
    assert {k: again.config[k] for k in SD3} == {k: reference.config[k] for k in SD3}


def test_a_computed_table_of_positions_is_written_out(diffusers):
    """A native model computes its table; what is written is diffusers' own, and read back it is stored."""
    config = MMDiTConfig.parse({"net": {"kind": "sd3", "size": 8, "in_channels": 4, "hidden": 48, "heads": 3,
                                        "depth": 2, "context_dim": 20, "pooled_dim": 24, "positions": 10}})
    net, data = config.net.build().eval(), config.to_json()
    constants = DIFFUSERS.constants(data)
    foreign = to_foreign(DIFFUSERS.table(data), net.state_dict()) | constants
    theirs = diffusers.SD3Transformer2DModel.from_config(DIFFUSERS.foreign_config(data)).state_dict()
    assert shapes(foreign) == shapes(theirs)
    assert torch.allclose(theirs["pos_embed.pos_embed"], constants["pos_embed.pos_embed"], atol=1e-6)
    stored, _ = loaded(DIFFUSERS, foreign, DIFFUSERS.foreign_config(data))
    x, cond = torch.randn(1, 4, 6, 10), {"context": torch.randn(1, 3, 20), "pooled": torch.randn(1, 24)}
    assert torch.equal(stored(x, torch.ones(1), cond), net(x, torch.ones(1), cond))


@pytest.mark.parametrize("extra", [{"guidance_embeds": True}, {}, {"in_channels": 32, "out_channels": 16}],
                         ids=["dev", "schnell", "fill"])
@torch.no_grad()
def test_diffusers_flux(diffusers, extra):
    reference = random_model(diffusers.FluxTransformer2DModel, FLUX | extra)
    state = reference.state_dict()
    net, config = loaded(DIFFUSERS, state, dict(reference.config))
    assert config.guidance == (3.5 if extra.get("guidance_embeds") else 1.0)
    x = torch.randn(2, net.config.in_channels, 6, 10)
    context, pooled, t = torch.randn(2, 5, 20), torch.randn(2, 24), torch.tensor([30.0, 900.0])
    ids = torch.tensor([[0, r, c] for r in range(3) for c in range(5)])
    guidance = torch.tensor([3.5, 1.5])
    cond = {"context": context, "pooled": pooled, "guidance": guidance}
    if "out_channels" in extra:
        x, cond["concat"] = x[:, :4], x[:, 4:]
    expected = reference(packed(torch.cat([x, cond.get("concat", x[:, :0])], 1)), context, pooled, t / 1000, ids,
                         torch.zeros(5, 3), guidance if reference.config.guidance_embeds else None).sample
    assert_close(packed(net(x, t, cond)), expected)
    assert_round_trip(DIFFUSERS, net, config.to_json(), state)
    again = type(reference).from_config(DIFFUSERS.foreign_config(config.to_json()))
    assert shapes(again.state_dict()) == shapes(state)
    assert {k: again.config[k] for k in FLUX} == {k: reference.config[k] for k in FLUX}


@pytest.mark.parametrize("cls, options", [("SD3Transformer2DModel", SD3 | {"qk_norm": "rms_norm"}),
                                          ("FluxTransformer2DModel", FLUX | {"guidance_embeds": True})])
def test_sharded_folders_there_and_back(diffusers, tmp_path, cls, options):
    reference = random_model(getattr(diffusers, cls), options)
    reference.save_pretrained(tmp_path / "in", max_shard_size="300KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    report = convert(tmp_path / "in", tmp_path / "native")
    assert report.layout == "mmdit/diffusers" and not report.problems and not report.assumed
    assert checkpoint.load(str(tmp_path / "native"), device="cpu").config.net.kind == cls[:-18].lower()
    convert(tmp_path / "native", tmp_path / "out", to="diffusers")
    back, state = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors"), reference.state_dict()
    assert back.keys() == state.keys() and all(torch.equal(back[k], state[k]) for k in state)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["_class_name"] == cls
    getattr(diffusers, cls).from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("change, message", [({"_class_name": "FluxTransformer2DModel"}, "weights are those of sd3"),
                                             ({"qk_norm": "layer_norm"}, "qk_norm")])
def test_folders_of_another_kind_are_refused(diffusers, change, message):
    reference = diffusers.SD3Transformer2DModel(**SD3)
    with pytest.raises(ModelError, match=message):
        DIFFUSERS.config(shapes(reference.state_dict()), dict(reference.config) | change)


@pytest.mark.parametrize("name", ["sd3-medium", "sd35-medium", "sd35-large", "flux-dev", "flux-schnell"])
def test_published_sizes_map_both_ways_on_meta(name):
    preset = MMDiTConfig.preset(name)
    with torch.device("meta"):
        stored = {"stored_positions": True} if preset.net.kind == "sd3" else {}
        config = MMDiTConfig.parse(preset.to_json() | {"net": preset.to_json()["net"] | stored, "codec": None})
        net = config.net.build()
    data = config.to_json()
    for layout in LAYOUTS:
        foreign = to_foreign(layout.table(data), net.state_dict())
        said = layout.foreign_config and layout.foreign_config(data)
        assert MMDiTConfig.parse(layout.config(shapes(foreign), said)) == config
        assert shapes(to_native(layout.table(data), foreign)) == shapes(net.state_dict())


# --- the sampling grids --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("name", ["sd3-medium", "flux-schnell"])
def test_grids_are_diffusers(diffusers, name, steps):
    path = MMDiTConfig.preset(name).path
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=path.shift)
    given = {} if name == "sd3-medium" else {"sigmas": torch.linspace(1, 1 / steps, steps).tolist()}   # as FluxPipeline
    scheduler.set_timesteps(steps, **given)
    points = grid(path, path.times(steps, shape=(16, 128, 128)))
    assert (points.sigma - scheduler.sigmas).abs().max() <= 1e-6
    assert (path.network_time(points.t[:-1]) - scheduler.timesteps).abs().max() <= 1e-3


@pytest.mark.parametrize("steps", [1, 4, 28, 50])
@pytest.mark.parametrize("height, width", [(32, 32), (128, 128), (96, 168), (16, 24)])
def test_the_dynamic_grid_is_diffusers(diffusers, steps, height, width):
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    path = MMDiTConfig.preset("flux-dev").path
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, base_shift=0.5,
                                                          max_shift=1.15)
    mu = calculate_shift(height // 2 * (width // 2), 256, 4096, 0.5, 1.15)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    points = grid(path, path.times(steps, shape=(16, height, width)))
    assert (points.sigma - scheduler.sigmas).abs().max() <= 1e-6
