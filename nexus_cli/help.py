"""nexus help TOPIC: what belongs to no single command."""

from typing import Annotated

import typer

from nexus.errors import UsageError

CODES = """\
0    everything asked for exists now (also when all of it was done before)
1    internal error, a bug; the path of the log is printed
2    bad flag or value
3    bad input: prompt, batch line, picture, sound, data set, settings file
4    model or checkpoint missing, damaged, of the wrong kind, or refused as unsafe
5    device missing, or out of memory after the automatic retry
6    output problem: disk full, no permission, or it exists already
7    a batch finished with some items failed; the same command again runs only those
8    another nexus process holds this run folder
9    training diverged; the last good checkpoint is kept
75   stopped on request after saving; the same command again continues
130  Ctrl-C
141  the reader of standard output went away
143  terminated before a save was possible"""

OUTPUT_NAMES = """\
-o FILE      one item; its ending chooses the format: .png .jpg .webp .gif, or .wav .flac .ogg .mp3
-o FOLDER/   items with automatic names
-o TEMPLATE  fields: {n} {n:04d} {seed} {model} {prompt} {id} {hash} {date} {ext}; %03d is {n:03d}; {{ }} are literal
-o -         the bytes of one item on standard output"""

BATCH = """\
A batch file has one item a line: JSON objects (.jsonl), a table with a header (.csv, .tsv), or prompts (.txt).
Keys: prompt negative_prompt steps guidance guidance_rescale guidance_interval sampler schedule eta width height
image strength mask initial_noise, of music duration temperature top_k top_p melody continue, and seed num id
output; and every other flag of a setting, with _ for -. Flags are the defaults, the row wins.
In a table's cell the entries of a list (lora, embedding, apg, perturb_layers) are separated by commas.
Paths are relative to the batch file; `output` is relative to the output folder and cannot leave it.
The same command again makes only what is missing (manifest.jsonl in the output folder)."""

TOPICS = {"exit-codes": CODES, "output-names": OUTPUT_NAMES, "batch": BATCH}


def explain(topic: Annotated[str | None, typer.Argument(metavar="[TOPIC]", show_default=False,
                                                        help="exit-codes, output-names or batch.")] = None) -> None:
    """Explain exit codes, output names or batch files."""
    if topic is None:
        typer.echo("topics: " + ", ".join(TOPICS))
    elif topic in TOPICS:
        typer.echo(TOPICS[topic])
    else:
        raise UsageError(f"there is no help on '{topic}'", hint="topics: " + ", ".join(TOPICS))
