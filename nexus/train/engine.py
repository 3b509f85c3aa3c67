"""The training loop: knows phases, steps and checkpoints; knows no system, no modality, no command line."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.checkpoint import released_state
from nexus.errors import DivergedError, StoppedError
from nexus.rng import derive, generator
from nexus.train import run as runs
from nexus.train.args import TrainArgs
from nexus.train.distributed import World, any_rank, average, average_gradients, barrier
from nexus.train.optim import lr_scale, set_lr
from nexus.train.sharding import clip_grads
from nexus.train.state import TrainState, restore, save

MAX_SKIPPED = 10        # non-finite steps left out before --on-nan skip or rollback gives up


class Hooks(NamedTuple):
    """What the loop calls: batches, progress rows, pictures at checkpoints, messages."""

    batch_at: Callable[..., dict]                         # (position, size, rng) -> batch on the CPU
    progress: Callable[[dict], None] = lambda row: None
    sample: Callable[[TrainState], None] = lambda state: None
    report: Callable[[str], None] = lambda line: None
    page: Callable[[], None] = lambda: None               # after every checkpoint and every sheet of pictures


class StopFlag:
    """Set by a signal: 0 = go on, otherwise the signal's number. A second signal ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self, number: int, frame: object) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def stop_on_signals():
    """A StopFlag that SIGINT, SIGTERM, SIGUSR1 and SIGHUP set, while the block runs."""
    flag = StopFlag()
    names = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")          # Windows has the first two
    numbers = [getattr(signal, n) for n in names if hasattr(signal, n)]
    in_main = threading.current_thread() is threading.main_thread()
    old = {n: signal.signal(n, flag) for n in numbers} if in_main else {}
    try:
        yield flag
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def fit(state: TrainState, run: Path, hooks: Hooks, *, facts: dict, world: World = World(),
        device: torch.device = torch.device("cpu"), max_time: float | None = None) -> int:
    """Train to args.steps finished steps, from the newest good checkpoint; returns the number of steps taken.

    Raises StoppedError after a signal or `max_time` seconds (once saved), DivergedError on a non-finite loss or
    gradient with on_nan="stop".
    """
    args, start, deadline = state.args, state.step, time.monotonic() + (max_time or float("inf"))
    with stop_on_signals() as flag:
        while state.step < args.steps:
            begun = time.monotonic()
            row = _step(state, hooks, world, device)
            if row is None:
                _left_out(state, run, world, hooks)
                continue
            state.step += 1
            last = state.step == args.steps
            _log(state, run, row, hooks, world, time.monotonic() - begun)
            stopping = any_rank(flag.signal or int(time.monotonic() > deadline), world)
            saved = last or stopping or state.step % args.save_every == 0
            if saved:
                _save(state, run, hooks, facts, world)
            shown = world.is_main and shows(args, state.step)
            if shown:
                hooks.sample(state)
            if world.is_main and (saved or shown):
                hooks.page()
            if stopping and not last:
                raise _stopped(stopping, state.step, args.steps)
    return state.step - start


def shows(args: TrainArgs, step: int) -> bool:
    """Whether pictures are made after `step` finished steps."""
    return step == args.steps or args.sample_every > 0 and step > 0 and step % args.sample_every == 0


def _stopped(number: int, step: int, steps: int) -> StoppedError:
    error = StoppedError(f"stopped after step {step} of {steps}; everything is saved",
                         hint="run the same command again to go on")
    if number == signal.SIGINT:
        error.code = 130
    return error


def _step(state: TrainState, hooks: Hooks, world: World, device: torch.device) -> dict | None:
    """One step of every phase; None when it was not finite (and no weight was touched by that phase)."""
    args, row = state.args, {"step": state.step + 1}
    if state.step in state.skip:
        return {**row, "left_out": True}
    torch.manual_seed(derive(args.seed, "torch", world.rank, state.step))       # dropout draws from the global stream
    done = 0
    turns = sum(p.repeat for p in state.phases)
    for phase in state.phases:
        for _ in range(phase.repeat):
            values = _turn(state, phase, state.step * turns + done, hooks, world, device)
            done += 1
            if values is None:
                if args.on_nan == "stop":
                    raise DivergedError(f"{phase.name}: the loss or its gradient is not finite, step {state.step + 1}",
                                        hint="lower train.lr, or --on-nan rollback; the last checkpoint is intact")
                return None
        label = "" if len(state.phases) == 1 else f"{phase.name}."
        row |= {label + name: value for name, value in values.items()}
    averages = [*state.profiles.values(), *([state.ema] if state.ema else [])]
    tensors = released_state(state.system) if averages else {}
    for ema in averages:
        ema.update(tensors, state.step + 1)
    return row


def _turn(state: TrainState, phase, turn: int, hooks: Hooks, world: World, device: torch.device) -> dict | None:
    """One optimiser's turn: gradients over all parts of the batch, the finite check, clipping, the update."""
    args = state.args
    size = args.batch_size // args.accumulate
    params = [p for p in phase.module.parameters() if p.requires_grad]
    for p in params:
        p.grad = None
    phase.module.train()
    total: dict[str, Tensor] = {}
    for part in range(args.accumulate):
        rng = generator(args.seed, phase.name, world.rank, turn, part)
        batch = to_device(hooks.batch_at(turn * args.accumulate + part, size, rng), device)
        with autocast(args.precision, device):
            out = phase.loss(batch, rng, state.step)
        values = out if isinstance(out, dict) else {"loss": out}
        (values["loss"] / args.accumulate).backward()
        for name, value in values.items():
            total[name] = total.get(name, 0) + value.detach().float() / args.accumulate
    average_gradients([p for p in params if not hasattr(p, "device_mesh")], world)
    norm = clip_grads(params, args.clip or float("inf"))
    numbers = average(torch.stack([*total.values(), norm.detach().float().to(device)]), world).tolist()
    if not all(n == n and abs(n) != float("inf") for n in (numbers[list(total).index("loss")], numbers[-1])):
        return None
    for (owner, _), optimizer in state.optimizers.items():
        if owner == phase.name:
            set_lr(optimizer, lr_scale(state.step, args))
            optimizer.step()
    if phase.after is not None:
        phase.after(state.step)
    return dict(zip([*total, "grad_norm"], numbers, strict=True))


def autocast(precision: str, device: torch.device):
    """Mixed precision for the forward pass, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def to_device(batch: dict, device: torch.device) -> dict:
    """Every tensor of a batch on the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _left_out(state: TrainState, run: Path, world: World, hooks: Hooks) -> None:
    """--on-nan skip goes on with the next step; rollback first returns to the last checkpoint."""
    bad = state.step
    if len(state.skip) >= MAX_SKIPPED:
        raise DivergedError(f"{MAX_SKIPPED} steps were not finite, the last is step {bad + 1}", hint="lower train.lr")
    skip = state.skip | {bad}
    hooks.report(f"step {bad + 1} is not finite and is left out")
    if state.args.on_nan == "rollback" and runs.checkpoints(run):
        restore(state, run, runs.checkpoints(run)[-1], world.rank)
        if world.is_main:
            runs.truncate_metrics(run, state.step)
    state.skip = state.skip | skip


def _log(state: TrainState, run: Path, row: dict, hooks: Hooks, world: World, seconds: float) -> None:
    args = state.args
    row = {k: round(v, 6) if isinstance(v, float) else v for k, v in row.items()}
    row["lr"] = args.lr * lr_scale(state.step - 1, args)
    if not world.is_main:
        return
    if state.step % args.log_every == 0 or state.step in (1, args.steps) or "left_out" in row:
        runs.append_metrics(run, row)       # no clock in here: a resumed run writes the same bytes
    hooks.progress({**row, "steps": args.steps, "items_per_second": args.batch_size / max(seconds, 1e-9)})


def _save(state: TrainState, run: Path, hooks: Hooks, facts: dict, world: World) -> None:
    save(state, run, facts, write=world.is_main)
    if world.is_main:
        runs.prune(run, state.args.keep)
    barrier(world)
