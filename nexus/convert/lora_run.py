"""LoRA runs: what a branch is trained on, and the model that a run's checkpoint and its base are together."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from nexus import catalog, checkpoint
from nexus.config import Config
from nexus.convert.lora import adapt
from nexus.errors import InputError, ModelError, UsageError
from nexus.nn.lora import LoRAConfig, bake
from nexus.nn.outline import outlining
from nexus.stored import ZOO

# What a student of another system takes over from its base (LCM-LoRA: Luo et al. 2023, arXiv:2311.05556).
SHARED = ("net", "codec", "conditioner", "prediction", "path", "learned_variance", "size", "concat")
VISITED = ("spacing", "offset", "open_end", "ends_at_first")    # the times a student visits are its own


def base_of(system: str, given: str | None) -> dict:
    """{"model", "digest"} of the model that a LoRA is for: the given one, or the system's embedded one.

    Of a run folder its newest checkpoint is named, so that further training there changes nothing here. Raises
    UsageError when there is none.
    """
    name = given or catalog.entry(system).default
    if not given and name not in checkpoint.zoo_names():
        raise UsageError(f"--lora changes a model, and '{system}' has no embedded one", hint="add --init MODEL")
    found = checkpoint.find(name)
    return {"model": name if found.parent == ZOO else str(found), "digest": digest(found)}


def digest(path: Path) -> str:
    """The sha256 of a model's tensors on disk."""
    total = hashlib.sha256()
    for file in checkpoint.weight_files(path, "ema") or checkpoint.weight_files(path):
        with open(file, "rb") as stream:
            hashlib.file_digest(stream, lambda: total)
    return total.hexdigest()


def base_config(system: str, base: dict) -> dict:
    """The configuration of a LoRA's system: its base's; or, for a student (LCM), what both share, without a target.

    Raises InputError and ModelError for a base that this system cannot be.
    """
    described = checkpoint.read_description(checkpoint.find(base["model"]))
    if described.get("lora"):
        raise ModelError(f"{base['model']} is a LoRA run", hint="merge it first: nexus convert RUN OUT")
    if described["system"] == system:
        return described["config"]
    cls = catalog.config_class(system)
    if "teacher" not in cls.model_fields:
        raise ModelError(f"{base['model']} is a checkpoint of '{described['system']}', not of '{system}'",
                         hint=f"nexus train {described['system']} --lora ...")
    return {**_taken_over(cls, described["config"]), "teacher": base["model"]}


def as_student(system: str, described: dict) -> dict:
    """A model's description as that of its student: a Stable Diffusion, with an LCM-LoRA, is sampled as an `lcm`.

    As it is where the system has no teachers.
    """
    cls = catalog.config_class(system)
    if "teacher" not in cls.model_fields or described.get("lora"):
        return described
    config = cls.parse(_taken_over(cls, described["config"]))
    return {**described, "system": system, "config": config.to_json()}


def _taken_over(cls: type[Config], theirs: dict) -> dict:
    """Of a model's configuration what a student shares, without a target network of its own."""
    shared = {k: v for k, v in theirs.items() if k in SHARED and k in cls.model_fields}
    path = {k: v for k, v in theirs["path"].items() if k not in VISITED}
    return {**shared, "path": path, **({"mu": 0.0} if "mu" in cls.model_fields else {})}


def like_base(config: Config) -> Config:
    """A configuration with what it shares with the model it names as its `base`, if it names one (ControlNet)."""
    if not getattr(config, "base", None):
        return config
    theirs, ours = checkpoint.read_description(checkpoint.find(config.base))["config"], config.to_json()
    shared = {k: theirs[k] for k in SHARED if k in theirs and k in ours}
    return type(config).parse(ours | shared | {"net": ours["net"] | theirs["net"] | config.fitting(theirs)})


def dressed(built: nn.Module, described: dict) -> nn.Module:
    """The system with the branches that a LoRA run's description tells of; as it is when it tells of none."""
    if described.get("lora"):
        spec = {k: v for k, v in described["lora"].items() if k in LoRAConfig.model_fields}
        adapt(built, described["system"], LoRAConfig.parse(spec))
    return built


def fill_base(built: nn.Module, base: dict, run: str) -> None:
    """Fill a system that has no branches yet with its base's weights. Raises ModelError when they are not the same."""
    path = checkpoint.find(base["model"])
    if digest(path) != base["digest"]:
        raise InputError(f"{base['model']} is not what {run} was begun with", hint="restore it, or start another run")
    with outlining():
        described = checkpoint.read_description(path)
        source = catalog.config_class(described["system"]).parse(described["config"]).build()
    have, wanted = checkpoint.read_weights(path, source), checkpoint.released_state(built)
    if missing := sorted(n for n, t in wanted.items() if n not in have or have[n].shape != t.shape):
        raise ModelError(f"{base['model']} is no base for {run}: it has no {missing[0]} of the same shape")
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(have[name])
    checkpoint.place(built, path)


def rebuild(built: nn.Module, described: dict, path: Path) -> None:
    """The model of a LoRA run: its base with the branches merged."""
    fill_base(built, described["lora"]["base"], str(path))
    dressed(built, described)
    checkpoint.fill(built, checkpoint.read_weights(path, built), str(path))
    bake(built.net)
    built.adapter = None
    built.requires_grad_(False)
