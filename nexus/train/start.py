"""From a command to a running loop: settings, data, system, resume."""

import json
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nexus import __version__, catalog, checkpoint
from nexus.atomic import write_text
from nexus.config import Config, layered
from nexus.convert.lora_run import like_base
from nexus.data.domains import open_for
from nexus.data.images import ImageSet
from nexus.data.kept import Shelf, unkept
from nexus.data.latents import CodeSet, Keep, LatentSet
from nexus.data.order import indices
from nexus.errors import InputError, ModelError, UsageError
from nexus.nn.lora import LoRAConfig
from nexus.nn.outline import outlining
from nexus.nn.precision import has_bfloat16
from nexus.process.pairs import fingerprint
from nexus.train import lora as loras
from nexus.train import run as runs
from nexus.train.args import TrainArgs, overridden
from nexus.train.distributed import World, barrier, join, leave
from nexus.train.engine import Hooks, autocast, fit, shows
from nexus.train.pictures import sheet, write_report, write_samples
from nexus.train.sharding import shard
from nexus.train.state import TrainState, new_state, restore

DESCRIBED = {"system", "data", "data_digest", "format", "nexus", "trained_steps", "init", "environment", "lora", "on"}
MAY_CHANGE = {"steps", "log_every", "save_every", "sample_every", "samples", "keep", "on_nan"}


def resolve(system: str, *, preset: str | None = None, file: dict | None = None, overrides: list[str] = (),
            flags: dict[str, Any] | None = None) -> tuple[Config, TrainArgs]:
    """The system's Config and the TrainArgs: defaults, then preset, then file, then --set, then flags.

    file: {"config": {...}, "train": {...}}, which changes no more than it names; where it is the description of a
    model, which says everything, and no preset is named, the default preset has no say. Overrides are
    "train.KEY=VALUE" or "KEY.KEY=VALUE" of the system.
    """
    cls = catalog.config_class(system)
    name = preset or cls.default_preset
    file = file or {}
    if surplus := file.keys() - {"config", "train", *DESCRIBED}:
        raise InputError(f"the settings file has an unknown section '{min(surplus)}'", hint="sections: config, train")
    whole = preset is None and "format" in file
    fields = layered({} if whole else cls.preset(name).to_json(), file.get("config", {}))
    args = TrainArgs.parse(({} if whole else cls.recipes.get(name, {})) | file.get("train", {}))
    if whole and args.precision == "bfloat16":          # that of the machine it was trained on
        args = args.model_copy(update={"precision": "auto"})
    return overridden(cls.parse(fields), args, overrides, flags)


def _resumed(run: Path, system: str, data: str, preset: str | None, file: dict, overrides: list[str],
             flags: dict) -> tuple[Config, TrainArgs]:
    """The settings that a run was started with, changed by what is asked this time; see `_check_same`."""
    stored = checkpoint.read_description(run)
    if not {"train", "data"} <= stored.keys():
        raise UsageError(f"{run} is a model, not a run", hint="choose another --run; --init starts from a model")
    if stored["system"] != system or stored["data"] != data:
        raise UsageError(f"{run} trains '{stored['system']}' on '{stored['data']}', not '{system}' on '{data}'",
                         hint="choose another --run")
    cls = catalog.config_class(system)
    base = cls.preset(preset).to_json() if preset else stored["config"]
    args = TrainArgs.parse(stored["train"] | file.get("train", {}))
    return overridden(cls.parse(layered(base, file.get("config", {}))), args, overrides, flags)


def _check_same(run: Path, config: Config, args: TrainArgs, init: str | None, digest: str) -> str | None:
    """Refuse to go on with other data, or with another value of anything that shapes the weights; -> the run's init.

    A run without a checkpoint, whose first steps failed, has learnt nothing yet: there, values may change.
    """
    stored = checkpoint.read_description(run)
    if stored.get("data_digest") != digest:
        raise InputError(f"the data of {run} has changed since the run began",
                         hint="restore it, or start anew with another --run")
    if not runs.has_learnt(run):
        return init or stored.get("init")
    old = stored["config"] | TrainArgs.parse(stored["train"]).to_json() | {"init": stored.get("init")}
    new = config.to_json() | args.to_json() | ({"init": init} if init else {})
    if changed := [k for k in new if old.get(k) != new[k] and k not in MAY_CHANGE]:
        raise UsageError(f"{run} was started with another value of {changed[0]}",
                         hint="leave it out to go on as before, or choose another --run")
    return old["init"]


class Plan(NamedTuple):
    """What a command trains: settings, data, what its LoRA is of (None = it has none), and what it starts from."""

    config: Config
    args: TrainArgs
    images: ImageSet
    lora: dict | None
    init: str | None


def planned(system: str, data: str, run: Path, *, preset: str | None = None, file: dict | None = None,
            overrides: list[str] = (), flags: dict[str, Any] | None = None, lora: LoRAConfig | None = None,
            init: str | None = None, device: str = "auto") -> Plan:
    """The training that a command begins, or goes on with where there is a run; nothing is written.

    Raises UsageError or InputError for what cannot be trained, or not gone on with.
    """
    file, overrides, flags = file or {}, list(overrides), flags or {}
    begun = (run / "config.json").exists()
    low = loras.settle(run, system, lora, init)
    config, args = (_resumed(run, system, data, None if low else preset, file, overrides, flags) if begun else
                    loras.settings(system, low, preset, file, overrides, flags) if low else
                    resolve(system, preset=preset, file=file, overrides=overrides, flags=flags))
    args = _with_precision(args, run if begun else None, device)
    images = open_for(config, data, load=args.load)
    config = config if low else (config if begun else like_base(config)).adapt(images.facts)
    if begun:
        init = _check_same(run, config, args, init, images.facts.digest)
    else:
        init = init or getattr(config, "teacher", None) or getattr(config, "base", None)    # a student starts as it
        if init is None and getattr(config, "goes_on", False):
            raise UsageError("these settings go on with a trained model, and none is named", hint="--init MODEL")
    built = _check_parts(config, None if low or runs.checkpoints(run) else init)
    with outlining():                                   # what cannot be trained says so when it is asked for its phases
        if low:
            loras.check(built, system, low, args.sharding)
        else:
            built.phases()
    return Plan(config, args, images, low, init)


def _check_parts(config: Config, init: str | None) -> torch.nn.Module:
    """The system's outline; ModelError for models that training needs which are not there or do not fit.

    None of them is loaded for it.
    """
    with outlining():
        built = config.build()
    for part, reference in built.external.items():
        other = checkpoint.skeleton(checkpoint.find(reference))
        if hasattr(built, "admit"):
            built.admit(part, other)
    if init:
        _common(checkpoint.released_state(checkpoint.skeleton(checkpoint.find(init))), built, init)
    return built


def say_skipped(images: ImageSet, report: Callable[[str], None]) -> None:
    """What of the data is not used, and why."""
    for name, reason in images.skipped[:20]:
        report(f"skipped {name}: {reason}")
    if images.skipped:
        report(f"{len(images.skipped)} files were skipped, {len(images)} are used")


def _with_precision(args: TrainArgs, begun: Path | None, device: str) -> TrainArgs:
    """Precision "auto" as the device has it; a run that has begun goes on in its own, wherever it does."""
    if args.precision != "auto":
        return args
    kept = begun and TrainArgs.parse(checkpoint.read_description(begun)["train"]).precision
    fast = "bfloat16" if has_bfloat16(checkpoint.pick_device(device)) else "float32"
    return args.model_copy(update={"precision": kept or fast})


def _environment(device: torch.device, ranks: int) -> dict[str, str]:
    """Where a run began, for its report; no names of hosts or people."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "ranks": str(ranks), "torch": torch.__version__,
            "python": platform.python_version(), "system": platform.system()}


def train(system: str, *, data: str, run: Path, preset: str | None = None, config: dict | None = None,
          overrides: list[str] = (), flags: dict[str, Any] | None = None, device: str = "auto",
          init: str | None = None, resume: str = "auto", max_time: float | None = None,
          lora: LoRAConfig | None = None, progress: Callable[[dict], None] = lambda row: None,
          report: Callable[[str], None] = lambda line: None) -> dict:
    """Train a system in a run folder, or go on with the run that is there. Returns {"step", "run", "resumed"}.

    flags: TrainArgs fields given explicitly. init: a model whose weights of equal name and shape are taken over.
    lora: train low-rank branches of the model `init` (default: the embedded one), and nothing else.
    resume: "auto", or "never" (an existing run is then an error). Raises StoppedError after a signal or max_time.
    """
    catalog.entry(system)
    run, target = Path(run), checkpoint.pick_device(device)
    world, new = join(target), not run.exists()
    held = runs.lock(run) if world.is_main else None
    try:
        return _train(system, data, run, target, world, preset, config, list(overrides), flags or {}, init, resume,
                      max_time, lora, progress, report)
    finally:
        leave(world)
        if held:
            if new:
                runs.leave_unbegun(run)
            held.release()


def _train(system, data, run, device, world, preset, file, overrides, flags, init, resume, max_time, lora,
           progress, report) -> dict:
    begun = (run / "config.json").exists()
    if begun and resume == "never":
        raise UsageError(f"{run} holds a run already", hint="--resume auto goes on with it")
    barrier(world)
    plan = planned(system, data, run, preset=preset, file=file, overrides=overrides, flags=flags, lora=lora, init=init,
                   device=str(device))
    config, args, images, lora, init = plan
    _check_split(args, world.size)
    say_skipped(images, report)
    if args.precision == "bfloat16" and not has_bfloat16(device):
        report("this device only emulates bfloat16, which takes many times longer: begin with --precision float32")
    built = _built(system, config, args, run, init, lora, report)
    built = shard(built.to(device), args, world, device)
    facts = {"train": args.to_json(), "data": data, "data_digest": images.facts.digest, "nexus": __version__,
             **({"lora": lora} if lora else {})}
    if world.is_main and not (begun and runs.has_learnt(run)):
        described = {"format": "nexus/1", "system": system, "config": config.to_json(), **facts,
                     "init": init, "environment": _environment(device, world.size)}
        write_text(run / "config.json", json.dumps(described, indent=1, sort_keys=True, ensure_ascii=False) + "\n",
                   exists="overwrite")
    state = new_state(system, built, args)
    step = _resume(state, run, world, report)
    if step >= args.steps:
        report(f"nothing is left to train: the run has {step} steps, and {args.steps} are asked for")
    hooks = Hooks(_batches(images, built, args, run, world, device, progress), progress,
                  lambda state: write_samples(state, run, device, images), report, lambda: write_report(run))
    if world.is_main and shows(args, step) and not sheet(run, step).exists():
        hooks.sample(state)                         # the run was killed between a checkpoint and its pictures
    fit(state, run, hooks, facts=facts, world=world, device=device, max_time=max_time)
    if world.is_main:
        hooks.page()
    return {"run": str(run), "step": state.step, "resumed": step}


def _built(system: str, config: Config, args: TrainArgs, run: Path, init: str | None, lora: dict | None,
           report) -> torch.nn.Module:
    """The system before its first step; the branches of a LoRA on the weights of their base."""
    torch.manual_seed(args.seed)                    # the initial weights are a function of the seed
    built = checkpoint.build(system, config.to_json())
    if lora:
        report(loras.begin(built, system, lora, run))
    elif init and not runs.checkpoints(run):
        report(_warm_start(built, init))
    return built


def _check_split(args: TrainArgs, ranks: int) -> None:
    if args.batch_size % (args.accumulate * ranks):
        raise UsageError(f"batch size {args.batch_size} does not divide into {args.accumulate} parts on {ranks} ranks",
                         hint=f"a multiple of {args.accumulate * ranks}")


def _resume(state: TrainState, run: Path, world, report) -> int:
    """Restore the newest good checkpoint on every rank; returns its step, 0 for a new run."""
    step = 0
    if world.is_main:
        runs.clean(run)
        step = runs.newest_good(run, report) or 0
    if world.size > 1:
        step = _shared(step)
    if step:
        restore(state, run, step, world.rank)
        report(f"resumed from step {step}")
    if world.is_main:
        runs.truncate_metrics(run, step)
    barrier(world)
    return step


def _shared(step: int) -> int:
    value = torch.tensor(step)
    torch.distributed.broadcast(value, 0)
    return int(value)


def _warm_start(system: torch.nn.Module, name: str) -> str:
    """Take over every tensor of equal name and shape, of a run those of its critic too."""
    source = checkpoint.load(name, device="cpu")
    kept = checkpoint.read_training_parts(checkpoint.find(name), system)
    have, own = checkpoint.own_state(source) | kept, checkpoint.own_state(system)
    taken = _common(have, system, name)
    with torch.no_grad():
        for n in taken:
            own[n].copy_(have[n])
    return f"took {len(taken)} of {len(own)} tensors from {name}"


def _common(have: dict[str, torch.Tensor], system: torch.nn.Module, name: str) -> list[str]:
    """Names of the system's tensors that a model has in the same shape; ModelError where there is none."""
    taken = [n for n, t in checkpoint.own_state(system).items() if n in have and have[n].shape == t.shape]
    if not taken:
        raise ModelError(f"--init {name} has no tensor of this system's names and shapes",
                         hint="a model of this system, with the same --preset; nexus info shows its settings")
    return taken


def _prepared(images: ImageSet, system: torch.nn.Module, args: TrainArgs, run: Path, world, progress):
    """What a system trains on in place of the pictures (pairs that a teacher made), or None."""
    prepare = getattr(system, "prepare_data", None)
    opens = prepare and prepare(images, run, seed=args.seed, draws=args.steps * args.batch_size,
                                part=(world.rank, world.size),
                                watch=lambda done, total: progress({"encoded": done, "of": total}))
    barrier(world)
    return opens() if opens else None


def _shelf(system: torch.nn.Module, facts: dict, run: Path, world: World) -> Keep:
    """Where a run keeps what its codec makes of the data, so that going on does not encode it anew."""
    codec = getattr(system, "codec", None)
    if codec is None:
        return unkept
    return Shelf(run / "encoded", facts | {"codec": fingerprint(codec)}, rank=world.rank, ranks=world.size,
                 meet=partial(barrier, world))


def _batches(images: ImageSet, system: torch.nn.Module, args: TrainArgs, run: Path, world, device, progress):
    """batch_at(position, size, rng): the pictures of one part of one step, on this rank."""
    source, augment = images, {"shift": args.shift, "flip": args.flip}
    prepared = _prepared(images, system, args, run, world, progress)
    if prepared is not None:
        source, augment = prepared, {}
    elif args.cache_latents:
        def encode(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), autocast(args.precision, device):
                return system.encode(x.to(device))

        def watch(done: int, total: int) -> None:
            progress({"encoded": done, "of": total})
        facts = {"data": images.facts.digest, "precision": args.precision, "variants": args.variants, **augment,
                 **({"load": args.load} if args.load else {})}
        keep = _shelf(system, facts, run, world)
        source = CodeSet(images, encode, keep=keep, watch=watch) if images.medium == "audio" else \
            LatentSet(images, encode, **augment, variants=args.variants, keep=keep, watch=watch)
        augment = {}

    def batch_at(position: int, size: int, rng: torch.Generator) -> dict:
        chosen = indices(len(source), seed=args.seed, step=position, batch=size // world.size, rank=world.rank,
                         world=world.size)
        return source.batch(chosen, rng, **augment)
    return batch_at
