"""nexus convert SRC DST: models between Nexus and other layouts."""

import os
from pathlib import Path
from typing import Annotated

import typer

from nexus.atomic import check_target
from nexus.errors import ModelError, UsageError
from nexus_cli import options
from nexus_cli.options import option
from nexus_cli.output import Output, strict_json


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", show_default=False,
                                           help="A file or folder of weights, or an embedded model's name.")],
    target: Annotated[Path | None, typer.Argument(metavar="DST", show_default=False,
                                                  help="The folder or file to write (not with --check).")] = None,
    to: Annotated[str | None, option("--to", metavar="LAYOUT", show_default=False,
                                     help="nexus (the default), diffusers, another layout; lpips or efficientnet: a "
                                          "network that trainings look through.")] = None,
    read_as: Annotated[str | None, option("--from", metavar="LAYOUT", show_default=False,
                                          help="The layout of SRC, if its keys do not tell: openai-thirds.")] = None,
    lora: Annotated[list[str] | None, option("--lora", metavar="FILE[:WEIGHT]", show_default=False,
                                             help="Merge low-rank updates into the weights; repeatable.")] = None,
    ema: Annotated[float | None, option("--ema", metavar="WIDTH", show_default=False, min=0.0,
                                        help="SRC is a run with EMA profiles: write the average of this length "
                                             "(a share of the run, 0.05 for instance).")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only report how the keys would map; write nothing.")] = False,
    overrides: options.Set = None,
    force: options.Force = False,
    json_lines: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    color: options.Color = "auto",
) -> None:
    """Convert a model; every key is used exactly once, and the report says how."""
    out = Output(json_lines=json_lines, quiet=quiet, verbose=verbose, color=color)
    exists = "overwrite" if force else "error"
    if not os.path.exists(source):
        from nexus.catalog import listing
        embedded = sorted({row["default"] for row in listing() if row["default"]})
        if str(source) not in embedded:
            raise ModelError(f"there is no model '{source}'", hint="a path, or one of: " + ", ".join(embedded))
    if target is None and not check:
        raise UsageError("there is no DST to write to", hint="name one, or give --check")
    if target is not None and not check:
        folder = target.suffix not in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
        check_target(target, exists=exists, folder=folder)
        from nexus.convert.convert import check_places
        check_places(source, target, exists)
    settings = {"to": to, "read_as": read_as, "check": check, "overrides": overrides or [], "exists": exists}
    if ema is not None:
        if to or read_as or lora or check or overrides:
            raise UsageError("--ema writes a model in Nexus's own layout and goes with --force alone",
                             hint="convert what it has written")
        _averaged(source, target, ema, settings["exists"], out)
        return
    if lora:
        from nexus_cli.batch import check_files
        check_files("lora", lora)
    with out.guard():
        report = _converted(source, target or Path(os.devnull), lora, settings)
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in report._asdict().items()}
    if not json_lines:
        for key, value in facts.items():
            if key != "notes":
                out.note(f"{key}: {_shown(value)}")
    for line in report.notes:
        out.note(line)
    out.result(None if check else str(target), {"status": "bad" if report.problems else "ok", **facts})
    if report.problems:
        raise ModelError(f"{source} does not fit: {report.problems[0]}", hint=f"{len(report.problems)} problems in all")


def _averaged(source: Path, target: Path, ema: float, exists: str, out: Output) -> None:
    """A run's weights under an EMA profile that is chosen now (EDM2)."""
    with out.guard():
        from nexus.train.ema import write_reconstruction
        write_reconstruction(source, target, ema, exists=exists)
    out.result(str(target), {"status": "ok", "ema": ema})


def _converted(source: Path, target: Path, lora: list[str] | None, settings: dict):
    """The report of what was done: a conversion, a merge, or a LoRA run in a public layout."""
    from nexus.convert import convert as converting
    from nexus.convert import lora_merge
    run = lora_merge.run_of(source)
    if run is not None and not lora and settings["to"] not in (None, "nexus"):
        if settings["overrides"] or settings["read_as"]:
            raise UsageError("--set and --from are for foreign checkpoints, and this is a LoRA run of nexus",
                             hint="leave them out")
        return lora_merge.write_run(run, target, settings["to"], exists=settings["exists"], check=settings["check"])
    if lora or run is not None:
        return lora_merge.merged(source, target, lora or [], **settings)
    return converting.convert(source, target, **settings)


def _shown(value) -> str:
    """Long lists are cut; --json shows all."""
    if isinstance(value, tuple):
        head = "; ".join(str(each) for each in value[:5])
        return f"{len(value)}" + (f" ({head}{'; ...' if len(value) > 5 else ''})" if value else "")
    return strict_json(value, sort_keys=True) if isinstance(value, dict) else str(value)
