"""Training low-rank updates alone: a LoRA run's settings, its base model, and the system it trains."""

from pathlib import Path

import torch

from nexus import catalog, checkpoint
from nexus.config import Config, layered
from nexus.convert.lora_run import base_config, base_of, dressed, fill_base
from nexus.errors import UsageError
from nexus.nn.lora import LoRAConfig
from nexus.train.args import TrainArgs, overridden

RECIPE = {"steps": 1000, "batch_size": 4, "lr": 1e-4, "ema": 0.0}


def settle(run: Path, system: str, spec: LoRAConfig | None, init: str | None) -> dict | None:
    """What a run's description says of its LoRA: the settings and the base model; None = it trains the whole system.

    Raises UsageError for a run that was begun with others, and when there is no base.
    """
    if not (run / "config.json").exists():
        return spec and {**spec.to_json(), "base": base_of(system, init)}
    stored = checkpoint.read_description(run).get("lora")
    if spec and (not stored or any(stored[k] != v for k, v in spec.to_json().items())):
        raise UsageError(f"{run} was started with another value of lora",
                         hint="leave it out to go on as before, or choose another --run")
    return stored


def settings(system: str, lora: dict, preset: str | None, file: dict | None, overrides: list[str],
             flags: dict) -> tuple[Config, TrainArgs]:
    """The base model's configuration, and arguments: RECIPE, then the preset's recipe, then file, --set and flags."""
    cls = catalog.config_class(system)
    if preset:
        cls.preset(preset)
    file = file or {}
    recipe = RECIPE | (cls.recipes.get(preset, {}) if preset else {})
    args = TrainArgs.parse(recipe | file.get("train", {}))
    fields = layered(base_config(system, lora["base"]), file.get("config", {}))
    return overridden(cls.parse(fields), args, overrides, flags)


def check(built: torch.nn.Module, system: str, lora: dict, sharding: str) -> None:
    """UsageError where a system, or how it is trained, is nothing for a LoRA; `built` is an outline to be thrown away.

    Some systems take a copy of their network as they are asked for their phases: one that is trained has its branches
    by then.
    """
    if sharding != "ddp":
        raise UsageError("a LoRA is trained whole on every device", hint="--set train.sharding=ddp")
    if len(built.phases()) > 1:
        raise UsageError(f"'{system}' trains more than one network, and a LoRA is of one",
                         hint="train it without --lora")
    dressed(built, {"system": system, "lora": lora})


def begin(built: torch.nn.Module, system: str, lora: dict, run: Path) -> str:
    """Fill a new system, of which `check` had nothing to say, with its base's weights and give it branches.

    Returns a line that says so.
    """
    fill_base(built, lora["base"], str(run))
    dressed(built, {"system": system, "lora": lora})
    count = sum(t.numel() for t in checkpoint.own_state(built).values())
    return f"{count:,} numbers are trained, on the weights of {lora['base']['model']}"
