"""nexus train SYSTEM: a model from data."""

import os
from pathlib import Path
from typing import Annotated, Any

from nexus.atomic import check_target
from nexus.data.spec import SETS, SOUND_SETS, is_embedded, split_spec
from nexus.errors import InputError, ModelError, OutputError
from nexus_cli import options, parse
from nexus_cli.media import KINDS
from nexus_cli.options import option
from nexus_cli.output import Output, strict_json

HOW, RUN, SCREEN = "How to train", "The run", "Screen and machine"
SPEED, SHOWN = "items_per_second", 4            # of a line's numbers: the first, and how many others


def train(
    system: options.SystemArg,
    data: Annotated[str, option("--data", "-d", metavar="DATA", show_default=False,
                                help=f"{SETS}; A,B of two kinds; of sound: {SOUND_SETS}.")],
    run: Annotated[Path, option("--run", "-r", metavar="FOLDER", show_default=False,
                                help="The folder of this run; if it holds one, that goes on.")],
    preset: Annotated[str | None, option("--preset", metavar="NAME", show_default=False,
                                         help="A named size and recipe; every system has tiny.")] = None,
    config: Annotated[Path | None, option("--config", metavar="FILE", show_default=False,
                                          help="Settings from a .toml or .json file.")] = None,
    overrides: options.Set = None,
    init: Annotated[str | None, option("--init", metavar="MODEL", show_default=False,
                                       help="Start from a model's weights, of a run with its critic.")] = None,
    lora: Annotated[str | None, option("--lora", metavar="rank=8,...", show_default=False,
                                       help="Train low-rank updates of --init alone: rank, alpha, targets.")] = None,
    seed: Annotated[int | None, option("--seed", "-s", parser=parse.whole(0, parse.SEED_MAX), metavar="N",
                                       show_default=False, help="Decides everything random.")] = None,
    steps: Annotated[int | None, option("--steps", parser=parse.whole(1, 10**9), metavar="N", panel=HOW,
                                        show_default=False, help="Train so many steps in all.")] = None,
    batch_size: Annotated[int | None, option("--batch-size", parser=parse.whole(1, 1_000_000), metavar="N", panel=HOW,
                                             show_default=False, help="Items a step, over all devices.")] = None,
    accumulate: Annotated[int | None, option("--accumulate", parser=parse.whole(1, 1_000_000), metavar="N", panel=HOW,
                                             show_default=False, help="Cut each batch into N parts.")] = None,
    lr: Annotated[float | None, option("--lr", parser=parse.number(0, 100, above=True), metavar="RATE", panel=HOW,
                                       show_default=False, help="Learning rate.")] = None,
    ema: Annotated[float | None, option("--ema", parser=parse.number(0, 0.9999999), metavar="DECAY", panel=HOW,
                                        show_default=False, help="Moving average of the weights; 0 = none.")] = None,
    precision: Annotated[str | None, option("--precision", parser=parse.one_of("auto", "float32", "bfloat16"),
                                            metavar="DTYPE", panel=HOW, show_default=False,
                                            help="auto, float32 or bfloat16.")] = None,
    on_nan: Annotated[str | None, option("--on-nan", parser=parse.one_of("stop", "skip", "rollback"), metavar="WHAT",
                                         panel=HOW, show_default=False,
                                         help="stop, skip or rollback at a non-finite loss.")] = None,
    save_every: Annotated[int | None, option("--save-every", parser=parse.whole(1, 10**9), metavar="N", panel=RUN,
                                             show_default=False, help="A checkpoint every N steps.")] = None,
    sample_every: Annotated[int | None, option("--sample-every", parser=parse.whole(0, 10**9), metavar="N", panel=RUN,
                                               show_default=False, help="Samples every N steps; 0: at end.")] = None,
    keep: Annotated[int | None, option("--keep", parser=parse.whole(1, 1_000_000), metavar="K", panel=RUN,
                                       show_default=False, help="Keep the K newest checkpoints.")] = None,
    max_time: Annotated[float | None, option("--max-time", parser=parse.duration, metavar="TIME", panel=RUN,
                                             show_default=False, help="Save and stop after 15m, 3h (code 75).")] = None,
    resume: Annotated[str, option("--resume", parser=parse.one_of("auto", "never"), metavar="HOW", panel=RUN,
                                  help="auto, or never: then a run that is there is an error.")] = "auto",
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    json_lines: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    progress: options.Progress = "auto",
    color: options.Color = "auto",
) -> None:
    """Train a model. To resume, run the same command again.

    SIGTERM, SIGUSR1 and --max-time save and end with code 75.
    """
    from nexus.catalog import entry
    kind = entry(system).kind
    out = Output(json_lines=json_lines and _speaks(), quiet=quiet or not _speaks(), verbose=verbose,
                 progress=progress, color=color)
    _check_files(data, SOUND_SETS if kind == "audio" else SETS, run, config, init)
    given = {"steps": steps, "seed": seed, "batch_size": batch_size, "accumulate": accumulate, "lr": lr, "ema": ema,
             "precision": precision, "on_nan": on_nan, "save_every": save_every, "sample_every": sample_every,
             "keep": keep}
    flags = {key: value for key, value in given.items() if value is not None}
    from nexus import api
    spec = _low_rank(lora)
    settings = {"preset": preset, "overrides": overrides or [], "flags": flags}
    file = api.read_config_file(config) if config else None
    if dry_run:
        return _plan(system, data, run, {**settings, "file": file, "device": device}, (spec, init), out)
    with out.guard():
        watch = _Watch(out)
        try:
            result = api.train(system, data=data, run=run, config=file, device=device, init=init, resume=resume,
                               lora=spec,
                               max_time=max_time, progress=watch, report=out.note, **settings)
        finally:
            watch.close()
    if _speaks():
        out.result(str(run), {"status": "ok", **result})


def _speaks() -> bool:
    """Whether this is the one process of a torchrun group that talks to the user."""
    return os.environ.get("RANK", "0") == "0"


def _check_files(data: str, sets: str, run: Path, config: Path | None, init: str | None) -> None:
    """Every path is there, or can be written, before torch is imported."""
    for part in split_spec(data):
        if not is_embedded(part) and not os.path.exists(os.path.expanduser(part)) and not set(part) & set("*?["):
            raise InputError(f"there is no data '{part}'", hint=sets)
    if config is not None and not config.is_file():
        raise InputError(f"there is no settings file '{config}'", hint="a .toml or .json file")
    if init is not None and "/" in init and not os.path.exists(init):
        raise ModelError(f"there is no model '{init}'", hint="a run folder, a checkpoint folder or a file")
    if os.path.lexists(run) and not run.is_dir():
        raise OutputError(f"--run '{run}' is a file, not a folder", hint="choose another --run")
    check_target(run / "config.json", exists="overwrite")


def _low_rank(text: str | None):
    """--lora as a LoRAConfig, or None."""
    if text is None:
        return None
    from nexus.nn.lora import LoRAConfig
    return LoRAConfig.read(text)


def _plan(system: str, data: str, run: Path, settings: dict, lora: tuple, out: Output) -> None:
    """The resolved settings as JSON on stdout, and what the run would do."""
    from nexus.train.start import planned, say_skipped
    part, init = lora
    found = planned(system, data, run, **settings, lora=part, init=init)
    say_skipped(found.images, out.note)
    plan = {"system": system, "config": found.config.to_json(), "train": found.args.to_json(), "data": data,
            **({"lora": found.lora} if found.lora else {}), "init": found.init,
            KINDS[found.images.medium].nouns: len(found.images), "run": str(run),
            "resumes": (run / "config.json").exists()}
    out.line(strict_json(plan, indent=None if out.json_lines else 1, sort_keys=True))


class _Watch:
    """What the training loop reports, as a bar or plain lines, and as JSON lines with --json."""

    def __init__(self, out: Output):
        self._out = out
        self._trackers: list[Any] = []
        self._kind: str | None = None

    def __call__(self, row: dict) -> None:
        if self._out.json_lines:
            self._out.line(strict_json(row))
        encoding = "encoded" in row
        total, done = (row.get("of"), row["encoded"]) if encoding else (row.get("steps"), row.get("step"))
        if done is None:
            return
        speed = [f"{row[SPEED]:.1f} items/s"] if SPEED in row else []
        shown = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float) and key != SPEED]
        self._tracker("encoded" if encoding else "steps", total).update(done, text="  ".join(speed + shown[:SHOWN]))

    def _tracker(self, kind: str, total: int | None):
        if kind != self._kind:
            self.close()
            self._kind, context = kind, self._out.tracker(total, kind)
            self._trackers = [context, context.__enter__()]
        return self._trackers[1]

    def close(self) -> None:
        """End the display."""
        if self._trackers:
            self._trackers[0].__exit__(None, None, None)
        self._trackers, self._kind = [], None
