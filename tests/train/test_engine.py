"""The loop: gradients over parts, turns of phases, the finite check, stopping."""

import json
import math
import os
import signal

import pytest
import torch
import toys

from nexus.checkpoint import own_state, read_tensors
from nexus.errors import DivergedError, NexusError, StoppedError
from nexus.train import run as runs
from nexus.train.args import TrainArgs
from nexus.train.engine import MAX_SKIPPED, Hooks, fit, stop_on_signals
from nexus.train.state import new_state, restore

PLAIN = {"noise": 0.0, "dropout": 0.0}


def batch_at(position, size, rng):
    """`size` pictures that follow those of the positions before."""
    rows = torch.arange(position * size, (position + 1) * size, dtype=torch.float32)
    return {"image": torch.sin(rows[:, None] * torch.linspace(0.1, 3, toys.PIXELS)).view(size, 3, 8, 8)}


def poisoned(*positions, value=float("nan")):
    """The same pictures, with a value that is not finite at some positions."""
    def batch(position, size, rng):
        made = batch_at(position, size, rng)
        if position in positions:
            made["image"][0, 0, 0, 0] = value
        return made
    return batch


def fresh(args=None, config=None, name="toy"):
    """A new state of a toy, the same every time."""
    torch.manual_seed(3)
    cls = {"toy": toys.ToyConfig, "toy-gan": toys.ToyGANConfig}[name]
    return new_state(name, cls(**config or {}).build(), TrainArgs(**{"steps": 3, "batch_size": 6, "lr": 1e-2,
                                                                     "log_every": 1} | (args or {})))


def weights(state):
    return {n: t.clone() for n, t in own_state(state.system).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_a_small_set_falls(tmp_path):
    state = fresh({"steps": 80})
    assert fit(state, tmp_path, Hooks(lambda p, size, rng: batch_at(0, size, rng)), facts={}) == 80
    losses = [r["loss"] for r in rows_of(tmp_path)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize("parts", [2, 3, 6])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(tmp_path, parts):
    whole, cut = fresh(config=PLAIN), fresh({"accumulate": parts}, PLAIN)
    fit(whole, tmp_path / "a", Hooks(batch_at), facts={})
    fit(cut, tmp_path / "b", Hooks(batch_at), facts={})
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, rtol=1e-4, atol=1e-5)
    for a, b in zip(rows_of(tmp_path / "a"), rows_of(tmp_path / "b"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_one_step_of_adam_moves_every_weight_by_the_rate_against_its_gradient(tmp_path):
    state = fresh({"steps": 1, "optimizer": "adam", "clip": 0.0, "lr": 1e-3}, PLAIN)
    before = weights(state)
    fit(state, tmp_path, Hooks(batch_at), facts={})
    for name, p in state.system.named_parameters():
        if p.grad is not None:
            moved = before[name] - p.detach()
            expected = 1e-3 * p.grad / (p.grad.abs() + 1e-8)      # bias-corrected: m / sqrt(v) = g / |g| at first
            torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-7)


def test_clipping_scales_the_gradient_to_its_largest_norm(tmp_path):
    state = fresh({"steps": 1, "clip": 0.01})
    fit(state, tmp_path, Hooks(batch_at), facts={})
    grads = [p.grad for p in state.system.net.parameters() if p.grad is not None]
    assert rows_of(tmp_path)[0]["grad_norm"] > 0.01
    assert torch.stack([g.norm() for g in grads]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_phases_take_their_turns_and_see_other_batches_each_time(tmp_path):
    seen = []

    def watched(position, size, rng):
        seen.append(position)
        return batch_at(position, size, rng)
    state = fresh({"steps": 2}, name="toy-gan")
    fit(state, tmp_path, Hooks(watched), facts={})
    assert seen == list(range(12))                              # (5 + 1) turns a step, none twice
    assert {"critic.loss", "critic.grad_norm", "net.loss", "net.grad_norm", "lr", "step"} == set(rows_of(tmp_path)[0])
    assert state.optimizers[("critic", "adamw")].state[state.system.critic[0].weight]["step"] == 10
    assert state.optimizers[("net", "adamw")].state[state.system.net[0].weight]["step"] == 2


def test_a_phase_leaves_the_weights_of_the_other_alone(tmp_path):
    state = fresh({"steps": 1}, {"repeat": 1}, "toy-gan")
    before = weights(state)
    with pytest.raises(DivergedError):          # the second turn's batch is broken only in what the first phase reads
        fit(state, tmp_path, Hooks(poisoned(0)), facts={})
    assert same(before, weights(state))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [0, 1, 4, 5])
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, value, step):
    clean, bad = fresh({"steps": step}) if step else fresh(), fresh({"steps": 9, "save_every": 2})
    if step:
        fit(clean, tmp_path / "a", Hooks(batch_at), facts={})
    with pytest.raises(DivergedError) as caught:
        fit(bad, tmp_path / "b", Hooks(poisoned(step, value=value)), facts={})
    assert caught.value.code == 9 and f"step {step + 1}" in str(caught.value)
    assert same({n: p.detach() for n, p in clean.system.named_parameters()},
                {n: p.detach() for n, p in bad.system.named_parameters()})
    assert runs.checkpoints(tmp_path / "b") == list(range(2, step + 1, 2))
    for saved in runs.checkpoints(tmp_path / "b"):
        for file in ("model", "ema", "train/denoise.adamw"):
            tensors = read_tensors(runs.step_folder(tmp_path / "b", saved) / f"{file}.safetensors")
            assert tensors and all(t.isfinite().all() for t in tensors.values())


def test_skip_leaves_the_bad_step_out_and_goes_on(tmp_path):
    state, said = fresh({"steps": 6, "on_nan": "skip"}, PLAIN), []
    fit(state, tmp_path, Hooks(poisoned(2), report=said.append), facts={})
    assert state.step == 6 and state.skip == {2} and "step 3" in said[0]
    assert [r["step"] for r in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert rows_of(tmp_path)[2].get("left_out") and all(t.isfinite().all() for t in weights(state).values())


def test_rollback_gives_what_a_run_without_the_bad_step_gives(tmp_path):
    args = {"steps": 6, "save_every": 2}
    rolled, skipped = fresh(args | {"on_nan": "rollback"}), fresh(args | {"on_nan": "skip"})
    fit(rolled, tmp_path / "a", Hooks(poisoned(3)), facts={})
    skipped.skip = {3}
    fit(skipped, tmp_path / "b", Hooks(batch_at), facts={})
    assert same(weights(rolled), weights(skipped))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_too_many_bad_steps_end_the_run(tmp_path):
    with pytest.raises(DivergedError, match=str(MAX_SKIPPED)):
        fit(fresh({"steps": 99, "on_nan": "skip"}), tmp_path, Hooks(poisoned(*range(99))), facts={})


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75),
                                          (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", [1, 3])
def test_a_signal_stops_with_a_checkpoint_of_that_very_step(tmp_path, number, code, at):
    def progress(row):
        if row["step"] == at:
            os.kill(os.getpid(), number)
    uncut, stopped = fresh({"steps": 5}), fresh({"steps": 5})
    fit(uncut, tmp_path / "a", Hooks(batch_at), facts={})
    with pytest.raises(StoppedError) as caught:
        fit(stopped, tmp_path / "b", Hooks(batch_at, progress), facts={})
    assert caught.value.code == code and runs.checkpoints(tmp_path / "b") == [at]
    again = fresh({"steps": 5})
    restore(again, tmp_path / "b", at)
    fit(again, tmp_path / "b", Hooks(batch_at), facts={})
    assert same(weights(uncut), weights(again))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_a_second_signal_ends_at_once():
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as flag:
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_get_their_old_meaning_back():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_time_limit_saves_and_stops(tmp_path):
    with pytest.raises(StoppedError) as caught:
        fit(fresh(), tmp_path, Hooks(batch_at), facts={}, max_time=1e-9)
    assert isinstance(caught.value, NexusError) and caught.value.code == 75 and runs.checkpoints(tmp_path) == [1]


def test_a_stop_at_the_last_step_is_a_finished_run(tmp_path):
    assert fit(fresh({"steps": 1}), tmp_path, Hooks(batch_at), facts={}, max_time=1e-9) == 1


def test_pictures_and_pages_are_made_when_asked_and_with_the_last_checkpoint(tmp_path):
    shown, pages = [], []
    state = fresh({"steps": 7, "sample_every": 3, "save_every": 2})
    fit(state, tmp_path, Hooks(batch_at, sample=lambda s: shown.append(s.step), page=lambda: pages.append(1)), facts={})
    assert shown == [3, 6, 7] and len(pages) == 5               # after 2, 3, 4, 6, 7


def test_only_the_newest_checkpoints_stay(tmp_path):
    fit(fresh({"steps": 7, "save_every": 1, "keep": 2}), tmp_path, Hooks(batch_at), facts={})
    assert runs.checkpoints(tmp_path) == [6, 7]


def test_logged_rates_are_those_of_the_schedule(tmp_path):
    fit(fresh({"steps": 8, "warmup": 4, "schedule": "cosine"}), tmp_path, Hooks(batch_at), facts={})
    rates = [r["lr"] for r in rows_of(tmp_path)]
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:] == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


def test_bfloat16_keeps_float32_weights(tmp_path):
    state = fresh({"precision": "bfloat16"})
    fit(state, tmp_path, Hooks(batch_at), facts={})
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in state.system.parameters())
