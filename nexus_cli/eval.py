"""nexus eval WHAT: numbers on how good pictures, sounds or models are."""

import os
from pathlib import Path
from typing import Annotated

import typer

from nexus.atomic import check_target, write_text
from nexus.data.spec import SETS
from nexus.errors import InputError, ModelError
from nexus_cli import options, parse
from nexus_cli.options import option
from nexus_cli.output import Output, strict_json


def evaluate(
    what: Annotated[str, typer.Argument(metavar="WHAT", show_default=False,
                                        help="A system, a model (name, run folder, file), or a folder of pictures or "
                                             "sounds.")],
    data: Annotated[str | None, option("--data", "-d", metavar="DATA", show_default=False,
                                       help="What to compare with; default: what it learnt from.")] = None,
    split: Annotated[str | None, option("--split", parser=parse.one_of("train", "pair", "concept", "all"),
                                        metavar="SPLIT", show_default=False,
                                        help="train, pair (held out, the default), concept or all.")] = None,
    samples: Annotated[Path | None, option("--samples", metavar="FOLDER", show_default=False,
                                           help="Judge these pictures or sounds instead of new ones.")] = None,
    model: options.Model = None,
    num: Annotated[int | None, option("--num", "-N", parser=parse.whole(1, 10**7), metavar="N", show_default=False,
                                      help="How many pictures or sounds.")] = None,
    seed: Annotated[int | None, option("--seed", "-s", parser=parse.whole(0, parse.SEED_MAX), metavar="N",
                                       show_default=False, help="Decides everything random.")] = None,
    steps: Annotated[int | None, option("--steps", parser=parse.whole(1, 100_000), metavar="N", show_default=False,
                                        help="Sampling steps.")] = None,
    guidance: Annotated[float | None, option("--guidance", "-g", parser=parse.number(0, 1000), metavar="SCALE",
                                             show_default=False, help="Guidance scale.")] = None,
    sampler: Annotated[str | None, option("--sampler", parser=parse.named("SAMPLERS"), metavar="NAME",
                                          show_default=False, help="ddim, euler, heun, dpmpp-2m, ...")] = None,
    duration: Annotated[float | None, option("--duration", parser=parse.duration, metavar="TIME", show_default=False,
                                             help="How long sounds are: 10, 90s, 2m.")] = None,
    likelihood: Annotated[bool, option("--likelihood", help="How likely held-out pictures are: bits a dimension under "
                                       "a model on pixels, nats by a Parzen window of a GAN's.")] = False,
    extractor: Annotated[str | None, option("--extractor", metavar="NAME|FILE", show_default=False,
                                            help="What is compared: lite0, inception (pictures), mel, whisper "
                                                 "(sounds).")] = None,
    lpips: Annotated[Path | None, option("--lpips", metavar="FILE", show_default=False,
                                         help="Weights that `nexus convert --to lpips` made: rebuilt pictures are "
                                              "compared by them too.")] = None,
    batch_size: options.BatchSize = None,
    output: options.OutFile = None,
    force: options.Force = False,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    json_lines: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    progress: options.Progress = "auto",
    color: options.Color = "auto",
) -> None:
    """Evaluate a system, a model or a folder of pictures or sounds: numbers with their intervals and protocol."""
    out = Output(json_lines=json_lines, quiet=quiet, verbose=verbose, progress=progress, color=color)
    if samples is not None and not samples.is_dir():
        raise InputError(f"--samples: there is no folder '{samples}'", hint="check the path")
    if data is not None and "/" in data and not os.path.exists(os.path.expanduser(data)):
        raise InputError(f"there is no data '{data}'", hint=SETS)
    if "/" in what and not os.path.exists(what):
        raise ModelError(f"there is no model and no folder '{what}'", hint="'nexus models' lists names")
    if output is not None:
        check_target(output, exists="overwrite" if force else "error")
    given = {"data": data, "split": split, "samples": samples, "model": model, "count": num, "seed": seed,
             "steps": steps, "guidance": guidance, "sampler": sampler, "duration": duration, "extractor": extractor,
             "lpips": lpips and str(lpips), "likelihood": likelihood or None, "batch_size": batch_size,
             "device": device, "dtype": dtype}
    from nexus import api
    with out.guard(), out.tracker(None, "items") as tracker:
        result = api.evaluate(what, progress=lambda done, total: tracker.update(done, text=f"of {total}"),
                              **{key: value for key, value in given.items() if value is not None})
    if output is not None:
        write_text(output, strict_json(result, indent=1, sort_keys=True) + "\n",
                   exists="overwrite" if force else "error")
    if not json_lines:
        for line in table(result):
            out.line(line)
    out.result(None, result)


def table(result: dict) -> list[str]:
    """`name: value [low, high]` for every number, then the protocol."""
    lines = []
    for name, entry in result["numbers"].items():
        value = entry["value"] if isinstance(entry, dict) else entry
        interval = f" [{entry['low']:.4g}, {entry['high']:.4g}]" if isinstance(entry, dict) else ""
        lines.append(f"{name}: {value:.5g}{interval}")
    return lines + [f"{key}: {value}" for key, value in result["protocol"].items()]
