"""Optimisers, learning-rate schedules, and optimiser state as plain named tensors."""

import math

import torch
from torch import Tensor, nn

from nexus.errors import ModelError
from nexus.train.args import TrainArgs
from nexus.train.distributed import apart
from nexus.train.muon import Muon


def build_optimizers(module: nn.Module, args: TrainArgs, rate: float = 1.0) -> dict[str, torch.optim.Optimizer]:
    """One optimiser, or two for Muon: it takes the hidden matrices, AdamW takes embeddings, gains and biases.

    rate: times the learning rates of args.
    """
    args = args.model_copy(update={"lr": rate * args.lr, "muon_lr": rate * args.muon_lr})
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if args.optimizer == "muon":
        hidden = [p for n, p in named if _is_hidden_matrix(module, n, p)]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in chosen]
        found = {"adamw": _adamw(rest, args)} if rest else {}
        if hidden:                      # thin matrices, such as those of a LoRA, are none
            found = {"muon": Muon(_groups(hidden), lr=args.muon_lr, weight_decay=args.weight_decay), **found}
        return found
    params = [p for _, p in named]
    if args.optimizer == "adam":
        return {"adam": torch.optim.Adam(_groups(params), lr=args.lr, betas=args.betas, foreach=True)}
    if args.optimizer == "rmsprop":
        return {"rmsprop": torch.optim.RMSprop(_groups(params), lr=args.lr, foreach=True)}
    return {"adamw": _adamw(params, args)}


def _groups(params: list[nn.Parameter]) -> list[dict]:
    return [{"params": kind} for kind in apart(params)]


def _adamw(params: list[nn.Parameter], args: TrainArgs) -> torch.optim.AdamW:
    return torch.optim.AdamW(_groups(params), lr=args.lr, betas=args.betas, weight_decay=args.weight_decay,
                             foreach=True)


def _is_hidden_matrix(module: nn.Module, name: str, p: nn.Parameter) -> bool:
    owner = module.get_submodule(name.rpartition(".")[0])
    return p.ndim == 2 and not isinstance(owner, nn.Embedding) and min(p.shape) >= 16


def lr_scale(step: int, args: TrainArgs) -> float:
    """The share of the learning rate that step (counted from 0) is taken with."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    if args.schedule == "constant":
        return 1.0
    done = (step - args.warmup) / max(1, args.steps - args.warmup)
    if args.schedule == "constant-linear":
        done = max(0.0, 2 * done - 1)
    left = 0.5 * (1 + math.cos(math.pi * done)) if args.schedule == "cosine" else 1 - done
    return args.final_lr + (1 - args.final_lr) * left


def set_lr(optimizer: torch.optim.Optimizer, scale: float) -> None:
    """Every group's rate becomes its initial rate times `scale`."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * scale


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """State as {"exp_avg.<parameter name>": tensor}; names maps id(parameter) to its name."""
    return {f"{key}.{names[id(p)]}": torch.as_tensor(value).detach()
            for p, state in optimizer.state.items() for key, value in state.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: dict[int, str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; an incomplete or surplus one is a ModelError."""
    params = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for full, value in tensors.items():
        key, _, name = full.partition(".")
        if name not in params:
            raise ModelError(f"optimiser state for an unknown parameter {name}")
        p = params[name]
        optimizer.state[p][key] = value.clone() if key == "step" else value.to(p.device)
    kinds = {frozenset(state) for state in optimizer.state.values()}       # a parameter without a gradient has none
    if len(kinds) > 1:
        raise ModelError(f"optimiser state lacks {min(max(kinds, key=len) - min(kinds, key=len))} of some parameter")
