"""Schedules, the split between Muon and AdamW, optimiser state as named tensors, the moving average."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nexus.checkpoint import own_state
from nexus.errors import ModelError
from nexus.train.args import TrainArgs
from nexus.train.ema import EMA, swap
from nexus.train.muon import Muon, orthogonalised
from nexus.train.optim import build_optimizers, load_optimizer_tensors, lr_scale, optimizer_tensors, set_lr
from nexus.train.state import parameter_names

OPTIMIZERS = ("adamw", "muon", "adam", "rmsprop")


def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(20, 32), nn.SiLU(), nn.Linear(32, 16), nn.LayerNorm(16), nn.Conv2d(1, 4, 3))
    made.table = nn.Embedding(30, 16)
    made.unused = nn.Parameter(torch.zeros(2))
    return made


def step(module, optimizers, x):
    out = module[3](module[2](module[1](module[0](x)))) + module.table(torch.arange(len(x)))
    loss = out.square().mean() + module[4](x[None, None, :, :]).square().mean()
    for p in module.parameters():
        p.grad = None
    loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()


# --- the rate ------------------------------------------------------------------------------------------------------

@given(warmup=st.integers(0, 50), more=st.integers(1, 200), final=st.floats(0, 1),
       schedule=st.sampled_from(["constant", "cosine", "linear"]))
@settings(max_examples=60, deadline=None)
def test_the_rate_rises_to_one_and_never_again(warmup, more, final, schedule):
    args = TrainArgs(steps=warmup + more, warmup=warmup, final_lr=final, schedule=schedule)
    rates = [lr_scale(i, args) for i in range(args.steps)]
    assert all(0 < r <= 1 + 1e-12 for r in rates) or final == 0
    assert rates[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert rates[warmup] == 1
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1:], strict=False))


def test_schedules_at_half_way_and_at_the_end():
    of = lambda schedule, at: lr_scale(at, TrainArgs(steps=100, schedule=schedule, final_lr=0.1))   # noqa: E731
    assert of("cosine", 50) == pytest.approx(0.55) and of("linear", 50) == pytest.approx(0.55)
    assert of("cosine", 25) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert of("constant", 99) == 1 and of("cosine", 100) == pytest.approx(0.1)


def test_rates_are_scaled_from_where_they_began():
    args = TrainArgs(optimizer="muon", lr=0.01, muon_lr=0.5)
    optimizers = build_optimizers(net(), args)
    for scale in (0.5, 0.25, 1.0):
        for optimizer in optimizers.values():
            set_lr(optimizer, scale)
    assert optimizers["adamw"].param_groups[0]["lr"] == 0.01 and optimizers["muon"].param_groups[0]["lr"] == 0.5


# --- optimisers ----------------------------------------------------------------------------------------------------

def test_muon_takes_hidden_matrices_and_nothing_else():
    module = net()
    names = parameter_names(module)
    found = {kind: {names[id(p)] for p in o.param_groups[0]["params"]}
             for kind, o in build_optimizers(module, TrainArgs(optimizer="muon")).items()}
    assert found["muon"] == {"0.weight", "2.weight"}
    assert found["muon"] | found["adamw"] == set(names.values()) and not found["muon"] & found["adamw"]


def test_muon_moves_along_an_orthogonal_matrix():
    module = net()
    before = module[0].weight.detach().clone()
    step(module, build_optimizers(module, TrainArgs(optimizer="muon", muon_lr=1.0)), torch.randn(8, 20))
    moved = torch.linalg.svdvals(before - module[0].weight.detach())
    grads = torch.linalg.svdvals(module[0].weight.grad)
    assert grads[0] / grads[7] > 4                              # 8 rows of data: the gradient has rank 8
    assert 0.5 < moved[7] / moved[0] <= 1                       # Newton-Schulz brings all of them near one size


def test_muon_is_torchs_to_the_rounding_of_bfloat16():
    """Theirs computes in bfloat16 everywhere; ours in float32 where the processor has no bfloat16."""
    rng = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=rng) for shape in ((32, 20), (16, 32), (32, 20))]
    ours, theirs = ([nn.Parameter(w.clone()) for w in starts] for _ in range(2))
    pair = (Muon(ours, lr=0.1, weight_decay=0.2),
            torch.optim.Muon(theirs, lr=0.1, weight_decay=0.2, adjust_lr_fn="original"))
    for _ in range(5):
        before = [w.detach().clone() for w in ours]
        with torch.no_grad():
            for a, b in zip(ours, theirs, strict=True):
                b.copy_(a)
                a.grad = torch.randn(a.shape, generator=rng)
                b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
        for old, a, b in zip(before, ours, theirs, strict=True):
            assert ((a - old) - (b - old)).norm() < 0.03 * (b - old).norm()
            assert torch.equal(pair[0].state[a]["momentum_buffer"], pair[1].state[b]["momentum_buffer"])


def test_a_stack_of_matrices_is_orthogonalised_as_each_alone():
    for shape in ((3, 24, 40), (2, 40, 24), (1, 16, 16)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        made = orthogonalised(x)
        assert torch.allclose(made, torch.cat([orthogonalised(one[None]) for one in x]), atol=1e-5)
        sizes = torch.linalg.svdvals(made)
        assert (sizes > 0.5).all() and (sizes < 1.3).all()
        polar = torch.linalg.svd(x, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(made.flatten(1), (polar.U @ polar.Vh).flatten(1)).min() > 0.97
    assert not orthogonalised(torch.zeros(1, 4, 4)).any()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_goes_out_and_comes_back_bit_for_bit(optimizer):
    args, data = TrainArgs(optimizer=optimizer, lr=1e-2), torch.randn(6, 8, 20)
    a, b = net(), net()
    first, second = build_optimizers(a, args), build_optimizers(b, args)
    for x in data[:3]:
        step(a, first, x)
    b.load_state_dict(a.state_dict())
    for kind, o in first.items():
        tensors = optimizer_tensors(o, parameter_names(a))
        assert tensors and all(isinstance(t, torch.Tensor) for t in tensors.values())
        load_optimizer_tensors(second[kind], parameter_names(b), {n: t.clone() for n, t in tensors.items()})
    for x in data[3:]:
        step(a, first, x)
        step(b, second, x)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def test_state_that_does_not_fit_is_refused():
    module = net()
    made = build_optimizers(module, TrainArgs())
    step(module, made, torch.randn(8, 20))
    tensors = optimizer_tensors(made["adamw"], parameter_names(module))
    fresh = build_optimizers(module, TrainArgs())["adamw"]
    with pytest.raises(ModelError, match="unknown"):
        load_optimizer_tensors(fresh, parameter_names(module), tensors | {"exp_avg.other": torch.ones(1)})
    fresh = build_optimizers(module, TrainArgs())["adamw"]
    with pytest.raises(ModelError, match="exp_avg_sq"):
        load_optimizer_tensors(fresh, parameter_names(module),
                               {n: t for n, t in tensors.items() if n != "exp_avg_sq.0.weight"})


# --- the average ---------------------------------------------------------------------------------------------------

def test_the_average_is_the_weighted_sum_of_all_values():
    values, decay = torch.randn(20, dtype=torch.float32), 0.8
    ema = EMA({"w": values[:1].clone()}, decay, warmup=False)
    for i in range(1, 20):
        ema.update({"w": values[i:i + 1]}, i)
    weights = torch.tensor([decay ** (19 - i) * (1 if i == 0 else 1 - decay) for i in range(20)])
    torch.testing.assert_close(ema.average["w"][0], (weights * values).sum(), rtol=1e-5, atol=1e-6)


def test_warm_up_forgets_the_start():
    cold, warm = (EMA({"w": torch.zeros(1)}, 0.9999, warmup=w) for w in (False, True))
    for i in range(1, 101):
        cold.update({"w": torch.ones(1)}, i)
        warm.update({"w": torch.ones(1)}, i)
    assert cold.average["w"] < 0.02 and warm.average["w"] > 0.999


def test_whole_numbers_are_copied():
    ema = EMA({"n": torch.tensor(3), "w": torch.zeros(1)}, 0.9)
    ema.update({"n": torch.tensor(9), "w": torch.ones(1)}, 1)
    assert ema.average["n"] == 9


def test_swapping_twice_restores_both():
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    average = {n: torch.randn_like(t) if t.is_floating_point() else t + 1 for n, t in own_state_of(module).items()}
    before, kept = ({n: t.clone() for n, t in s.items()} for s in (module.state_dict(), average))
    swap(module, average)
    assert all(torch.equal(t, kept[n]) for n, t in module.state_dict().items())
    swap(module, average)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert all(torch.equal(t, kept[n]) for n, t in average.items())


def own_state_of(module):
    module.external = {}
    return {n: t.clone() for n, t in own_state(module).items()}
