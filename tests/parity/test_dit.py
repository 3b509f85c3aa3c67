"""DiT against the paper's code (saved numbers) and diffusers (built tiny and random), and back to their files."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.dit import LAYOUTS
from nexus.models.diffusion.dit import DiTConfig, DiTNetConfig
from nexus.requests import SampleRequest
from tests.parity.whole import assert_close, assert_round_trip, loaded, shapes

ORIGINAL, DIFFUSERS = LAYOUTS
CASE = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity")) / "dit-original"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"no parity case at {CASE}; set NEXUS_PARITY")


@pytest.fixture(scope="module")
def case():
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)
    net, config = loaded(LAYOUTS, ORIGINAL, state, DiTNetConfig, heads=6)
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
        num_embeds_ada_norm=7).eval()
    for block in reference.transformer_blocks:
        for name, module in block.norm1.emb.named_children():
            module.load_state_dict(reference.transformer_blocks[0].norm1.emb.get_submodule(name).state_dict())
    state = reference.state_dict()
    net, config = loaded(LAYOUTS, DIFFUSERS, state, DiTNetConfig, dict(reference.config))
    x, t, label = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 6, 7])
    with torch.no_grad():
        assert_close(net(x, t.float(), {"label": label}), reference(x, t, class_labels=label).sample)
    assert_round_trip(DIFFUSERS, net, config, state)
    again = diffusers.DiTTransformer2DModel.from_config(DIFFUSERS.foreign_config(config))
    assert shapes(again.state_dict()) == shapes(state)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_classes_go_by_number(layout):
    torch.manual_seed(0)
    random = DiTNetConfig(size=4, hidden=32, depth=2, heads=2, num_classes=3).build()
    for parameter in random.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = {"net": random.config.to_json()}
    state = to_foreign(layout.table(config), random.state_dict(), copies=layout.copies(config))
    state, said = state | layout.constants(config), layout.foreign_config and layout.foreign_config(config)
    net, config = loaded(LAYOUTS, layout, state, DiTNetConfig, said, heads=2)
    assert config["conditioner"]["classes"] == ["0", "1", "2"]
    system = DiTConfig.parse(config | {"size": 4, "steps": 3}).build().eval()
    system.net.load_state_dict(net.state_dict())
    one, two = (system.generate(SampleRequest(prompt=prompt), seeds=[0]) for prompt in ("1", "2"))
    assert [made.notes[0]["class"] for made in (one, two)] == ["1", "2"]
    assert one.data.isfinite().all() and not torch.equal(one.data, two.data)


def test_the_published_xl_maps_both_ways_on_meta():
    with torch.device("meta"):
        net = DiTNetConfig.preset("XL/2").build()
    config = {"net": net.config.to_json()}
    for layout in LAYOUTS:
        foreign = to_foreign(layout.table(config), net.state_dict(), copies=layout.copies(config))
        said = layout.foreign_config and layout.foreign_config(config)
        found = layout.config(shapes(foreign | layout.constants(config)), said)
        assert found["conditioner"]["classes"] == [str(i) for i in range(1000)]
        assert found["learned_variance"] is True and found.keys() == {"net", "conditioner", "learned_variance"}
        theirs = {"freq_shift": 1.0} if layout is DIFFUSERS else {}
        assert DiTNetConfig.parse(found["net"]).to_json() == config["net"] | theirs
        assert shapes(to_native(layout.table(config), foreign)) == shapes(net.state_dict())
