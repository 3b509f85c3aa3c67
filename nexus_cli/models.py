"""nexus models: the systems, the embedded checkpoints, and whether they are whole."""

from typing import Annotated

import typer

from nexus.errors import ModelError
from nexus_cli import options
from nexus_cli.options import EXIT_CODES
from nexus_cli.output import Output, strict_json

app = typer.Typer(help="List, describe and verify models.", epilog=EXIT_CODES)


@app.callback(invoke_without_command=True)
def root(ctx: typer.Context, json_lines: options.Json = False) -> None:
    """List, describe and verify models."""
    if ctx.invoked_subcommand is None:
        list_models(json_lines)


@app.command("list", epilog=EXIT_CODES)
def list_models(json_lines: options.Json = False) -> None:
    """List the systems and their embedded checkpoints."""
    out = Output(json_lines=json_lines)
    from nexus.catalog import listing
    rows = listing()
    wide = max(len(row["system"]) for row in rows)
    for row in rows:
        model = row["default"] or "no checkpoint"
        out.result(f"{row['system']:{wide}}  {row['kind']:5}  {model:16}  {row['summary']}", row)


@app.command("info", epilog=EXIT_CODES)
def model_info(name: Annotated[str, typer.Argument(metavar="NAME|PATH", show_default=False)],
               json_lines: options.Json = False) -> None:
    """Describe one model without loading its weights."""
    from nexus import api
    out = Output(json_lines=json_lines)
    facts = api.model_info(name)
    out.result("\n".join(f"{key}: {_shown(value)}" for key, value in facts.items()), facts)


@app.command("verify", epilog=EXIT_CODES)
def verify_models(names: Annotated[list[str] | None, typer.Argument(metavar="[NAME|PATH]...",
                                                                    show_default=False)] = None,
                  json_lines: options.Json = False) -> None:
    """Check every byte of models against their manifests; of all embedded ones without a name."""
    from nexus import api
    out = Output(json_lines=json_lines)
    bad = []
    with out.guard():
        for row in api.verify(names or None):
            problems = row["problems"]
            bad += [row["name"]] if problems else []
            out.result(f"{row['name']}: {'; '.join(map(str, problems)) or 'whole'}", row)
    if bad:
        raise ModelError(f"damaged: {', '.join(bad)}", hint="fetch or train them again")


def _shown(value) -> str:
    return strict_json(value, sort_keys=True) if isinstance(value, dict | list) else str(value)
