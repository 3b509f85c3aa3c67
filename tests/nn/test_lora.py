"""Low-rank branches: what they add, how they start, and that merging and its undoing are exact."""

import copy
import re

import pytest
import torch
from torch import nn

from nexus.errors import UsageError
from nexus.nn import lora
from nexus.nn.lora import Branch, LoRAConfig

LAYERS = {
    "linear": (lambda: nn.Linear(6, 12), (5, 6)),
    "no bias": (lambda: nn.Linear(6, 12, bias=False), (2, 3, 6)),
    "conv": (lambda: nn.Conv2d(6, 12, 3, 1, 1), (2, 6, 7, 5)),
    "strided": (lambda: nn.Conv2d(6, 12, 3, 2, 0), (2, 6, 8, 8)),
    "1x1": (lambda: nn.Conv2d(6, 12, 1), (2, 6, 4, 4)),
}
PARTS = {"whole": ((0, 12),), "thirds": ((0, 4), (4, 8), (8, 12)), "ratio": ((0, 3), (3, 12)),
         "first and last": ((0, 4), (8, 12)), "middle": ((4, 8),)}


def adapted(make, parts, rank=2, scale=0.5):
    torch.manual_seed(0)
    net = nn.Sequential(make())
    lora.attach(net, {"0": parts}, rank, scale)
    with torch.no_grad():
        net[0].lora.up.normal_()
    return net


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("parts", PARTS)
def test_a_branch_is_the_update_of_the_weight(kind, parts):
    make, shape = LAYERS[kind]
    net, x = adapted(make, PARTS[parts]), torch.randn(shape)
    with_branch = net(x)
    plain = copy.deepcopy(net)
    lora.bake(plain)
    assert not lora.branches(plain) and not plain[0]._forward_hooks
    assert (plain(x) - with_branch).abs().max() <= 1e-5
    delta = net[0].lora.delta()
    outside = [i for i in range(12) if not any(a <= i < b for a, b in PARTS[parts])]
    assert not delta[outside].any() and delta.flatten(1).abs().sum(1).count_nonzero() == 12 - len(outside)
    for start, stop in PARTS[parts]:
        assert torch.linalg.matrix_rank(delta[start:stop].flatten(1)) == min(2, stop - start)


def test_a_new_branch_changes_nothing_and_has_a_gradient():
    net = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    before = net(x)
    lora.attach(net, {"0": ((0, 4),)}, 2)
    assert torch.equal(net(x), before)
    net(x).sum().backward()
    assert net[0].lora.up.grad.any() and net[0].weight.grad is not None


def test_keys_and_classes_of_the_layer_stay():
    net = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(2, 2, 1))
    keys, kinds = set(net.state_dict()), [type(m) for m in net]
    lora.attach(net, {"0": ((0, 4),), "1": ((0, 2),)}, 2)
    assert [type(m) for m in net] == kinds and net[0].in_features == 4
    assert set(net.state_dict()) - keys == {f"{i}.lora.{s}" for i in (0, 1) for s in ("down", "up")}
    assert all(lora.MARK in f".{name}" for name in set(net.state_dict()) - keys)
    lora.detach(net)
    assert set(net.state_dict()) == keys and not lora.branches(net)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_unmerging_is_exact(dtype):
    net = nn.Sequential(nn.Linear(64, 64), nn.Conv2d(8, 8, 3)).to(dtype)
    before = copy.deepcopy(net.state_dict())
    kept = lora.merge(net, [("0", torch.randn(64, 64)), ("1", torch.randn(8, 8, 3, 3))])
    assert not torch.equal(net[0].weight, before["0.weight"]) and net[0].weight.dtype == dtype
    lora.unmerge(net, kept)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_copies_of_a_network_have_their_own_branches():
    net = adapted(LAYERS["linear"][0], PARTS["thirds"])
    twin = copy.deepcopy(net)
    x = torch.randn(2, 6)
    assert torch.equal(twin(x), net(x))
    with torch.no_grad():
        twin[0].lora.up.zero_()
    assert not torch.equal(twin(x), net(x))


def test_half_precision_layers_take_float32_branches():
    net = nn.Sequential(nn.Linear(6, 12).to(torch.bfloat16))
    lora.attach(net, {"0": ((0, 12),)}, 2)
    assert net(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with torch.device("meta"):
        assert Branch(nn.Linear(6, 12), ((0, 12),), 2, 1.0).down.is_meta


def test_settings_are_read_and_refused():
    assert LoRAConfig.read("rank=4") == LoRAConfig(rank=4)
    assert LoRAConfig.read("rank=4, alpha=2,targets=all").scale == 0.5
    for text, said in (("4", "'4' is not NAME=VALUE"), ("rank", "'rank' is not NAME=VALUE"), ("", "NAME=VALUE"),
                       ("rank=4,depth=2", "there is no setting 'depth'"), ("rank=x", "(got 'x')"),
                       ("rank=0", "rank"), ("alpha=0", "alpha"), ("targets=some", "targets")):
        with pytest.raises(UsageError, match=re.escape(f"--lora '{text}': ") + f".*{re.escape(said)}"):
            LoRAConfig.read(text)
    with pytest.raises(UsageError, match="LayerNorm"):
        lora.attach(nn.Sequential(nn.LayerNorm(4)), {"0": ((0, 4),)}, 2)
