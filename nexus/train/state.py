"""Everything a run must remember between steps, and its way to disk and back."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nexus.atomic import write_bytes
from nexus.checkpoint import fill, is_finite, own_state, read_tensors, released_state, save_model, tensor_bytes
from nexus.errors import DivergedError, ModelError
from nexus.nn.ranks import of_other_ranks
from nexus.phase import Phase
from nexus.train.args import TrainArgs
from nexus.train.ema import EMA, profiles, snapshot_file
from nexus.train.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors
from nexus.train.run import step_folder

OptimizerKey = tuple[str, str]          # (phase, optimiser)


@dataclass
class TrainState:
    """One run in memory: the system, its optimisers, its average, the number of finished steps, steps to leave out."""

    name: str
    system: nn.Module
    phases: tuple[Phase, ...]
    args: TrainArgs
    optimizers: dict[OptimizerKey, torch.optim.Optimizer]
    ema: EMA | None
    profiles: dict[str, EMA] = field(default_factory=dict)
    step: int = 0
    skip: set[int] = field(default_factory=set)


def whole(t: Tensor) -> Tensor:
    """A tensor that FSDP2 has cut over the ranks, in one piece; any other tensor as it is."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def new_state(name: str, system: nn.Module, args: TrainArgs) -> TrainState:
    """The state before the first step."""
    phases = system.phases()
    optimizers = {(p.name, kind): o for p in phases for kind, o in build_optimizers(p.module, args, p.rate).items()}
    ema = EMA(released_state(system), args.ema, warmup=args.ema_warmup) if args.ema else None
    return TrainState(name, system, phases, args, optimizers, ema, profiles(released_state(system), args.ema_profiles))


def parameter_names(module: nn.Module) -> dict[int, str]:
    """id(parameter) -> its name."""
    return {id(p): n for n, p in module.named_parameters()}


def save(state: TrainState, run: Path, facts: dict, *, write: bool) -> None:
    """Write the checkpoint folder of the current step; ranks with write=False only help to gather shards.

    DivergedError, on all ranks, where a weight or a running statistic is no longer finite.
    """
    names = parameter_names(state.system)
    model = {n: whole(t) for n, t in own_state(state.system).items()}
    average = {n: whole(t) for n, t in state.ema.average.items()} if state.ema else None
    optim = {key: {n: whole(t) for n, t in optimizer_tensors(o, names).items()} for key, o in state.optimizers.items()}
    kept = {k: {n: whole(t) for n, t in p.average.items()} for k, p in state.profiles.items()}
    others = of_other_ranks(_buffers(state.system))
    if bad := next((name for name, tensor in (model | (average or {})).items() if not is_finite(tensor)), None):
        raise DivergedError(f"{bad} is not finite after step {state.step}",
                            hint="lower train.lr; the last checkpoint is intact")
    if not write:
        return
    extra = {f"train/{phase}.{kind}.safetensors": tensor_bytes(t) for (phase, kind), t in optim.items()}
    extra["train/state.json"] = json.dumps({"step": state.step, "skip": sorted(state.skip)}).encode()
    if average is not None:
        extra["ema.safetensors"] = tensor_bytes(average)
    extra |= {f"train/profile-{key}.safetensors": tensor_bytes(t) for key, t in kept.items()}
    extra |= {f"train/rank-{rank}.safetensors": tensor_bytes(t) for rank, t in others.items()}
    if adapter := getattr(state.system, "adapter", None):
        extra["adapter.safetensors"] = adapter.file(average or model)
    if state.step % state.args.save_every == 0 or state.step == state.args.steps:   # a run that was stopped keeps no
        _snapshots(kept, run, state.step)                                           # more of them than one that was not
    save_model(step_folder(run, state.step), state.name, state.system.config.to_json(), model, facts=facts,
               extra=extra, exists="overwrite")


def _snapshots(kept: dict[str, dict[str, Tensor]], run: Path, step: int) -> None:
    """The profiles again, where no checkpoint's end takes them away."""
    for key, tensors in kept.items():
        file = snapshot_file(run, key, step)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, tensor_bytes(tensors), exists="overwrite")


def _buffers(system: nn.Module) -> dict[str, Tensor]:
    """What layers of the system's own keep besides weights: running statistics, codebooks, pools of pictures."""
    own = own_state(system)
    return {name: own[name] for name, _ in system.named_buffers() if name in own}


def restore(state: TrainState, run: Path, step: int, rank: int = 0) -> None:
    """Fill the state from the (verified) checkpoint of `step`; a rank that was not there takes the first one's."""
    folder = step_folder(run, step)
    _fill(state.system, read_tensors(folder / "model.safetensors"), folder)
    if (folder / f"train/rank-{rank}.safetensors").exists():
        buffers = _buffers(state.system)
        for name, value in read_tensors(folder / f"train/rank-{rank}.safetensors").items():
            buffers[name].copy_(value)
    if state.ema is not None:
        _restore_average(state.ema, folder / "ema.safetensors")
    for key, profile in state.profiles.items():
        _restore_average(profile, folder / f"train/profile-{key}.safetensors")
    names = parameter_names(state.system)
    for (phase, kind), optimizer in state.optimizers.items():
        optimizer.state.clear()
        tensors = read_tensors(folder / f"train/{phase}.{kind}.safetensors")
        own = {n: p for p, n in ((p, names[id(p)]) for g in optimizer.param_groups for p in g["params"])}
        shaped = {k: _like(v, own[k.partition(".")[2]]) if v.ndim else v for k, v in tensors.items()}
        load_optimizer_tensors(optimizer, names, shaped)
    try:
        stored = json.loads((folder / "train/state.json").read_text())
        state.step, state.skip = int(stored["step"]), {int(s) for s in stored["skip"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}/train/state.json is damaged: {error}") from None


def _restore_average(ema: EMA, file: Path) -> None:
    stored = read_tensors(file)
    if stored.keys() != ema.average.keys():
        raise ModelError(f"{file} is of another model", hint="start anew with another --run")
    for name, value in stored.items():
        ema.average[name].copy_(_like(value, ema.average[name]))


def _fill(system: nn.Module, tensors: dict[str, Tensor], folder: Path) -> None:
    own = own_state(system)
    if any(isinstance(t, DTensor) for t in own.values()) and own.keys() == tensors.keys():
        with torch.no_grad():
            for name, value in tensors.items():
                own[name].copy_(_like(value, own[name]))
        return
    fill(system, tensors, f"{folder}/model.safetensors")


def _like(value: Tensor, target: Tensor) -> Tensor:
    if isinstance(target, DTensor):
        return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    return value.to(target.device)
