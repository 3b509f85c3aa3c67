"""nexus convert SRC DST: models between Nexus and other layouts."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from nexus.atomic import check_target
from nexus.errors import ModelError, UsageError
from nexus_cli import options
from nexus_cli.options import option
from nexus_cli.output import Output


def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", show_default=False, help="A file or folder of weights.")],
    target: Annotated[Path | None, typer.Argument(metavar="DST", show_default=False,
                                                  help="The folder or file to write (not with --check).")] = None,
    to: Annotated[str | None, option("--to", metavar="LAYOUT", show_default=False,
                                     help="nexus (the default), diffusers, or another layout.")] = None,
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
    if not os.path.exists(source):
        raise ModelError(f"there is no model '{source}'", hint="check the path")
    if target is None and not check:
        raise UsageError("there is no DST to write to", hint="name one, or give --check")
    if target is not None and not check:
        folder = target.suffix not in (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
        check_target(target, exists="overwrite" if force else "error", folder=folder)
    from nexus.convert import convert as converting
    with out.guard():
        report = converting.convert(source, target or Path(os.devnull), to=to, check=check, overrides=overrides or [],
                                    exists="overwrite" if force else "error")
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in report._asdict().items()}
    if not json_lines:
        for key, value in facts.items():
            out.note(f"{key}: {_shown(value)}")
    out.result(None if check else str(target), {"status": "bad" if report.problems else "ok", **facts})
    if report.problems:
        raise ModelError(f"{source} does not fit: {report.problems[0]}", hint=f"{len(report.problems)} problems in all")


def _shown(value) -> str:
    """Long lists are cut; --json shows all."""
    if isinstance(value, tuple):
        head = "; ".join(str(each) for each in value[:5])
        return f"{len(value)}" + (f" ({head}{'; ...' if len(value) > 5 else ''})" if value else "")
    return json.dumps(value, sort_keys=True, default=str) if isinstance(value, dict) else str(value)
