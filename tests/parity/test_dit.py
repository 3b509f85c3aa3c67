"""DiT against the paper's code (saved numbers) and diffusers (built tiny and random), and back to their files."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.dit import LAYOUTS
from nexus.models.diffusion.dit import DiT, DiTNetConfig

ORIGINAL, DIFFUSERS = LAYOUTS
CASE = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity")) / "dit-original"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"no parity case at {CASE}; set NEXUS_PARITY")


def shapes(state):
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def loaded(layout, state, foreign=None, **said) -> tuple[DiT, dict]:
    assert [one.name for one in LAYOUTS if one.matches(shapes(state), foreign)] == [layout.name]
    config = layout.config(shapes(state), foreign)
    config["net"] |= said
    rest = {key: tensor for key, tensor in state.items() if key not in layout.constants(config)}
    net = DiTNetConfig.parse(config["net"]).build().eval()
    net.load_state_dict(to_native(layout.table(config), rest))
    return net, config


def assert_round_trip(layout, net, config, state):
    back = to_foreign(layout.table(config), net.state_dict(), copies=layout.copies(config)) | layout.constants(config)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def assert_close(ours, reference):
    assert (ours - reference).abs().max() <= 1e-4 * max(1.0, reference.abs().max())


@pytest.fixture(scope="module")
def case():
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)
    net, config = loaded(ORIGINAL, state, heads=6)
    return net, config, state, load_file(CASE / "tensors.safetensors")


@needs_case
def test_original_output(case):
    net, config, state, saved = case
    assert sum(p.numel() for p in net.parameters()) + state["pos_embed"].numel() == 566_528
    with torch.no_grad():
        assert_close(net(saved["x"], saved["t"].float(), {"label": saved["y"]}), saved["output"])
    assert_round_trip(ORIGINAL, net, config, state)


@needs_case
def test_original_guidance_on_three_channels(case):
    """The paper's code guides eps of the first three channels only, and leaves the rest of the answer alone."""
    net, _, _, saved = case
    x, t = saved["x"][:2].repeat(2, 1, 1, 1), torch.full((4,), 500.0)
    with torch.no_grad():
        with_label, without = net(x, t, {"label": torch.tensor([1, 2, 10, 10])}).chunk(2)
    eps = without[:, :3] + 4.0 * (with_label[:, :3] - without[:, :3])
    ours = torch.cat([torch.cat([eps, rest[:, 3:]], 1) for rest in (with_label, without)])
    assert_close(ours, saved["output_cfg"])


@needs_case
def test_original_heads_are_asked_for_when_the_width_is_unknown(case):
    _, _, state, _ = case
    assert ORIGINAL.config(shapes(state), None)["net"]["heads"] is None
    assert ORIGINAL.unsaid(shapes(state), None) == ("net.heads",)


def test_diffusers_output_and_round_trip():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        num_embeds_ada_norm=7, norm_eps=1e-6).eval()
    for block in reference.transformer_blocks:
        for name, module in block.norm1.emb.named_children():
            module.load_state_dict(reference.transformer_blocks[0].norm1.emb.get_submodule(name).state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0           # the paper's sinusoid: see layouts/dit.py
    state = reference.state_dict()
    net, config = loaded(DIFFUSERS, state, dict(reference.config))
    x, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 6, 7])
    with torch.no_grad():
        assert_close(net(x, t.float(), {"label": label}), reference(x, t, class_labels=label).sample)
    assert_round_trip(DIFFUSERS, net, config, state)
    again = diffusers.DiTTransformer2DModel.from_config(DIFFUSERS.foreign_config(config))
    assert shapes(again.state_dict()) == shapes(state)


def test_the_published_xl_maps_both_ways_on_meta():
    with torch.device("meta"):
        net = DiTNetConfig.preset("XL/2").build()
    config = {"net": net.config.to_json()}
    for layout in LAYOUTS:
        foreign = to_foreign(layout.table(config), net.state_dict(), copies=layout.copies(config))
        said = layout.foreign_config and layout.foreign_config(config)
        assert layout.config(shapes(foreign | layout.constants(config)), said) == config | {
            "net": {key: value for key, value in config["net"].items() if key not in ("null_class", "num_styles")}}
        assert shapes(to_native(layout.table(config), foreign)) == shapes(net.state_dict())
