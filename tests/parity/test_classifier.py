"""OpenAI's classifiers of noisy pictures: names, published sizes, and what the pooling computes.

guided-diffusion is in no package registry; the counts are those of its own `create_classifier`.
"""

import math

import pytest
import torch
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.classifier import LAYOUTS
from nexus.errors import ModelError
from nexus.models.diffusion.conditional_diffusion import ClassifierNetConfig, ConditionalConfig
from tests.parity.whole import randomise, shapes

LAYOUT, = LAYOUTS
PUBLISHED = {64: ((1, 2, 3, 4), 4, 65_438_568), 128: ((1, 1, 2, 3, 4), 2, 42_568_040),
             256: ((1, 1, 2, 2, 4, 4), 2, 54_096_360), 512: ((0.5, 1, 1, 2, 2, 4, 4), 2, 54_448_360)}
TINY = {"kind": "classifier", "channels": 32, "mult": (1, 2, 4), "blocks": 2, "attention": (1, 2), "num_classes": 7,
        "size": 16}


def written(net: ClassifierNetConfig, state: dict) -> dict:
    return to_foreign(LAYOUT.table({"net": net.to_json()}), state)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes(size):
    mult, blocks, count = PUBLISHED[size]
    net = ClassifierNetConfig(kind="classifier", mult=mult, blocks=blocks, size=size,
                              attention=tuple(range(len(mult) - 3, len(mult))))
    with torch.device("meta"):
        state = net.build().state_dict()
    assert sum(t.numel() for t in state.values()) == count
    foreign = written(net, state)
    assert LAYOUT.matches(shapes(foreign), None)
    read = LAYOUT.config(shapes(foreign), None)
    assert ClassifierNetConfig.parse(read["net"]) == net and read["size"] == size
    assert ConditionalConfig.parse(read).path.beta_schedule == ("cosine" if size == 64 else "linear")
    assert shapes(to_native(LAYOUT.table(read), foreign)) == shapes(state)


def test_names():
    net = ClassifierNetConfig.parse(TINY)
    keys = shapes(written(net, net.build().state_dict()))
    assert keys["input_blocks.3.0.in_layers.2.weight"] == (32, 32, 3, 3)            # the block that halves
    assert keys["input_blocks.4.1.qkv.weight"] == (192, 64, 1)
    assert keys["middle_block.1.proj_out.weight"] == (128, 128, 1)
    assert keys["out.0.weight"] == (128,)
    assert keys["out.2.positional_embedding"] == (128, 17) and keys["out.2.qkv_proj.weight"] == (384, 128, 1)
    assert keys["out.2.c_proj.weight"] == (7, 128, 1)


def test_the_pooling_asks_with_the_mean():
    """What the last layers make of the body's output, written out for one head after another."""
    net = randomise(ClassifierNetConfig.parse(TINY).build()).eval()
    seen = {}
    net.norm_out.register_forward_hook(lambda module, args, out: seen.update(body=out))
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        found = net(x, t)
        h = torch.nn.functional.silu(seen["body"]).flatten(2)                       # [B, C, HW]
        tokens = torch.cat([h.mean(-1, keepdim=True), h], -1) + net.positions
        q, k, v = (net.qkv.weight @ tokens + net.qkv.bias[:, None]).chunk(3, 1)
        heads = []
        for at in range(0, 128, 64):
            share = (q[:, at:at + 64, :1].transpose(1, 2) @ k[:, at:at + 64] / math.sqrt(64)).softmax(-1)
            heads.append((v[:, at:at + 64] @ share.transpose(1, 2))[..., 0])
        sought = torch.cat(heads, 1) @ net.out.weight.T + net.out.bias
    torch.testing.assert_close(found, sought, atol=1e-5, rtol=1e-5)


def test_a_file_becomes_a_classifier_and_comes_back(tmp_path):
    net = ClassifierNetConfig.parse(TINY)
    foreign = written(net, randomise(net.build()).state_dict())
    torch.save(foreign, tmp_path / "classifier.pt")
    report = convert(tmp_path / "classifier.pt", tmp_path / "native")
    assert report.layout == "conditional/openai-classifier"
    guide = checkpoint.load(str(tmp_path / "native"), device="cpu")
    assert guide.log_prob(torch.zeros(2, 3, 16, 16), torch.tensor(0.5), torch.tensor([0, 6])).shape == (2,)
    convert(tmp_path / "native", tmp_path / "back.safetensors", to="openai-classifier")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == foreign.keys() and all(torch.equal(back[key], foreign[key]) for key in foreign)


def test_what_does_not_tell_its_levels_is_refused():
    net = ClassifierNetConfig.parse(TINY | {"attention": (1,)})
    with pytest.raises(ModelError, match="smallest level"):
        LAYOUT.config(shapes(written(net, net.build().state_dict())), None)
