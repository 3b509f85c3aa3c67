"""The options that several commands share, each defined once."""

from pathlib import Path
from typing import Annotated

import typer

from nexus_cli import parse

DEVICES = "auto, cpu, cuda, cuda:N or mps"
WHAT, HOW, FILES, MANY, SCREEN = "What to make", "How to sample", "Files", "Batches", "Screen and machine"


def complete_system(incomplete: str) -> list[tuple[str, str]]:
    """Shell completion of system names; imports only the catalog's strings."""
    from nexus.catalog import CATALOG
    return [(name, entry.summary) for name, entry in CATALOG.items() if name.startswith(incomplete)]


def device(text: str) -> str:
    """auto, cpu, cuda, cuda:N or mps."""
    head, colon, index = text.partition(":")
    if head not in ("auto", "cpu", "cuda", "mps") or (colon and (head != "cuda" or not index.isascii()
                                                                 or not index.isdecimal())):
        raise typer.BadParameter(f"'{text}' is not one of {DEVICES}")
    return text


def option(*names: str, help: str, parser=None, metavar: str | None = None, panel: str | None = None, **more):
    """A typer option whose values are parsed by `parser` and shown as `metavar`."""
    return typer.Option(*names, help=help, parser=parser, metavar=metavar, rich_help_panel=panel, **more)


SystemArg = Annotated[str, typer.Argument(metavar="SYSTEM", autocompletion=complete_system, show_default=False,
                                          help="What to use; 'nexus models' lists the systems.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only results, warnings and errors.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, show_default=False, metavar="",
                                      help="Say more; -vv shows tracebacks.")]
Progress = Annotated[str, option("--progress", parser=parse.one_of("auto", "bar", "plain", "json", "none"),
                                 metavar="MODE", help="auto, bar, plain, json or none.")]
Color = Annotated[str, option("--color", parser=parse.one_of("auto", "always", "never"), metavar="WHEN",
                              help="auto, always or never.")]
Device = Annotated[str, option("--device", parser=device, metavar="DEVICE", help=f"{DEVICES}.")]
DType = Annotated[str, option("--dtype", parser=parse.one_of("auto", "float32", "bfloat16", "float16"),
                              metavar="DTYPE", help="auto, float32, bfloat16 or float16.")]
Model = Annotated[str | None, typer.Option("--model", "-m", metavar="NAME|PATH", show_default=False,
                                           help="A named model, a run folder, a checkpoint folder or a file.")]
Offload = Annotated[bool, typer.Option("--offload", help="Text encoders, network and codec take turns in memory.")]
Tile = Annotated[str, option("--tile", parser=parse.one_of("auto", "on", "off"), metavar="WHEN",
                             help="Pictures go through the codec in stripes; auto: above 768x768.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, make nothing.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="A.B=C", show_default=False,
                                               help="Change one setting of the configuration; repeatable.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace what exists (--exists overwrite).")]
OutFile = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", show_default=False,
                                              help="Also write the result to this JSON file.")]
BatchSize = Annotated[int | None, option("--batch-size", parser=parse.whole(1, 1_000_000), metavar="N",
                                         show_default=False,
                                         help="How many at once; pictures on the CPU are made one by one.")]
Prompt = Annotated[str | None, option("--prompt", "-p", metavar="TEXT", panel=WHAT, show_default=False,
                                      help="What to make; - reads standard input.")]
PromptFile = Annotated[str | None, option("--prompt-file", metavar="FILE", panel=WHAT, show_default=False,
                                          help="Read the prompt from a file.")]
NegativePrompt = Annotated[str | None, option("--negative-prompt", "-n", metavar="TEXT", panel=WHAT,
                                              show_default=False, help="What to steer away from.")]
Num = Annotated[int, option("--num", "-N", parser=parse.whole(1, 1_000_000), metavar="N", panel=WHAT,
                            help="How many per prompt; item k has the seed + k.")]
Seed = Annotated[int | None, option("--seed", "-s", parser=parse.seed, metavar="N|random", panel=WHAT,
                                    show_default=False, help="Default: random, and shown.")]
Seeds = Annotated[object, option("--seeds", parser=parse.seeds, metavar="0-9,42", panel=WHAT, show_default=False,
                                 help="One item for each seed.")]
Guidance = Annotated[float | None, option("--guidance", "-g", "--cfg-scale", "--guidance-scale",
                                          parser=parse.number(0, 1000), metavar="SCALE", panel=HOW,
                                          show_default=False, help="How strongly to follow the prompt.")]
Output = Annotated[str | None, option("--output", "-o", metavar="WHERE", panel=FILES, show_default=False,
                                      help="A file, folder/, template, or - ('nexus help output-names').")]
Exists = Annotated[str | None, option("--exists", parser=parse.one_of("skip", "error", "rename", "overwrite"),
                                      metavar="WHAT", panel=FILES, show_default=False,
                                      help="skip, error, rename or overwrite what is there.")]
Like = Annotated[str | None, option("--like", metavar="FILE", panel=FILES, show_default=False,
                                    help="The settings stored in this file; flags change them.")]
NoMetadata = Annotated[bool, typer.Option("--no-metadata", rich_help_panel=FILES,
                                          help="Store no prompt and settings in the files.")]
Batch = Annotated[str | None, option("--batch", "-b", metavar="FILE", panel=MANY, show_default=False,
                                     help=".jsonl, .csv, .tsv, .txt or - ('nexus help batch').")]
OnError = Annotated[str | None, option("--on-error", parser=parse.one_of("continue", "stop"), metavar="WHAT",
                                       panel=MANY, show_default=False,
                                       help="continue even past bad lines, or stop at the first failure.")]
Shard = Annotated[object, option("--shard", parser=parse.shard, metavar="I/N", panel=MANY, show_default=False,
                                 help="Only part I (from 0) of N.")]
Limit = Annotated[int | None, option("--limit", parser=parse.whole(1, 1_000_000), metavar="N", panel=MANY,
                                     show_default=False, help="At most so many now.")]
Verify = Annotated[bool, typer.Option("--verify", rich_help_panel=MANY,
                                      help="Check the hashes of what is done before skipping it.")]
MaxTime = Annotated[float | None, option("--max-time", parser=parse.duration, metavar="TIME", panel=MANY,
                                         show_default=False, help="Stop after 90s, 15m, 3h with code 75.")]
Show = Annotated[bool, typer.Option("--show", rich_help_panel=SCREEN, help="Show them in the terminal.")]
EXIT_CODES = "Exit codes: 'nexus help exit-codes'."
