"""nexus sample SYSTEM: pictures from a model."""

import os
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nexus.errors import InputError, PartialError, UsageError
from nexus_cli import batch as batches
from nexus_cli import jobs as planning
from nexus_cli import options, parse
from nexus_cli.making import Engine, Ways, check_grid, done_before, make
from nexus_cli.needs import needed
from nexus_cli.options import option
from nexus_cli.output import Output, strict_json

WHAT, HOW, GUIDE, START = "What to make", "How to sample", "Kinds of guidance", "Starting from a picture"
FILES, MANY, SCREEN = "Files", "Batches", "Screen and machine"
PASSED = ("steps", "guidance", "guidance_rescale", "guidance_interval", "guidance_kind", "guide_model",
          "perturb_layers", "perturb_scale", "apg", "zero_init", "dynamic_threshold", "sampler", "schedule", "eta",
          "width", "height", "image", "image_noise", "strength", "mask", "outpaint", "initial_noise",
          "truncation", "interpolate", "direction",
          "negative_prompt", "control", "control_image", "control_scale")     # fields of the request as they are
SIZES = ("size", "width", "height")
TAUGHT = "What the model is taught"
PICTURE_LIMIT = 256 * 2**20
PROMPT_BYTES = 2**20


def sample(
    system: options.SystemArg,
    prompt: Annotated[str | None, option("--prompt", "-p", metavar="TEXT", panel=WHAT, show_default=False,
                                         help="What to show; - reads standard input.")] = None,
    prompt_file: Annotated[str | None, option("--prompt-file", metavar="FILE", panel=WHAT, show_default=False,
                                              help="Read the prompt from a file.")] = None,
    negative_prompt: Annotated[str | None, option("--negative-prompt", "-n", metavar="TEXT", panel=WHAT,
                                                  show_default=False, help="What to steer away from.")] = None,
    num: Annotated[int, option("--num", "-N", parser=parse.whole(1, 1_000_000), metavar="N", panel=WHAT,
                               help="Pictures per prompt; picture k has the seed + k.")] = 1,
    seed: Annotated[int | None, option("--seed", "-s", parser=parse.seed, metavar="N|random", panel=WHAT,
                                       show_default=False, help="Default: random, and shown.")] = None,
    seeds: Annotated[object, option("--seeds", parser=parse.seeds, metavar="0-9,42", panel=WHAT,
                                         show_default=False, help="One picture for each seed.")] = None,
    width: Annotated[int | None, option("--width", "-W", parser=parse.whole(1, 65_536), metavar="PX", panel=WHAT,
                                        show_default=False, help="Width in pixels.")] = None,
    height: Annotated[int | None, option("--height", "-H", parser=parse.whole(1, 65_536), metavar="PX", panel=WHAT,
                                         show_default=False, help="Height in pixels.")] = None,
    size: Annotated[object, option("--size", parser=parse.size, metavar="WxH", panel=WHAT, show_default=False,
                                         help="Width and height at once.")] = None,
    model: options.Model = None,
    steps: Annotated[int | None, option("--steps", "--num-inference-steps", parser=parse.whole(1, 100_000),
                                        metavar="N", panel=HOW, show_default=False, help="Sampling steps.")] = None,
    guidance: Annotated[float | None, option("--guidance", "-g", "--cfg-scale", "--guidance-scale",
                                             parser=parse.number(0, 1000), metavar="SCALE", panel=HOW,
                                             show_default=False, help="How strongly to follow the prompt.")] = None,
    guidance_rescale: Annotated[float | None, option("--guidance-rescale", parser=parse.number(0, 1), metavar="SHARE",
                                                     panel=HOW, show_default=False,
                                                     help="Against over-exposure: 0 to 1.")] = None,
    guidance_interval: Annotated[object, option("--guidance-interval", parser=parse.interval, metavar="A-B",
                                                      panel=HOW, show_default=False,
                                                      help="The share of the run that is guided, as 0.1-0.9.")] = None,
    guidance_kind: Annotated[str | None, option("--guidance-kind", parser=parse.named("GUIDANCE_KINDS"), metavar="KIND",
                                                panel=GUIDE, show_default=False,
                                                help="cfg, cfg-zero, apg, pag, slg, autoguidance, classifier.")] = None,
    guide_model: Annotated[str | None, option("--guide-model", metavar="NAME|PATH", panel=GUIDE, show_default=False,
                                              help="A weaker model (autoguidance), or a classifier.")] = None,
    perturb_layers: Annotated[object, option("--perturb-layers", parser=parse.layers, metavar="I,J,...", panel=GUIDE,
                                             show_default=False,
                                             help="Layers that pag or slg weakens; default: the middle one.")] = None,
    perturb_scale: Annotated[float | None, option("--perturb-scale", parser=parse.number(0, 1000), metavar="SCALE",
                                                  panel=GUIDE, show_default=False,
                                                  help="How strongly pag or slg steers; default 2.8.")] = None,
    apg: Annotated[object, option("--apg", parser=parse.numbers(3, "0,15,-0.5"), metavar="ETA,NORM,MOMENTUM",
                                  panel=GUIDE, show_default=False, help="Of apg; default 0,15,-0.5.")] = None,
    zero_init: Annotated[int | None, option("--zero-init", parser=parse.whole(0, 100_000), metavar="N", panel=GUIDE,
                                            show_default=False,
                                            help="First steps of a flow that cfg-zero leaves out; default 1.")] = None,
    dynamic_threshold: Annotated[float | None, option("--dynamic-threshold", parser=parse.number(0, 1, above=True),
                                                      metavar="SHARE", panel=GUIDE, show_default=False,
                                                      help="Pixels beyond this quantile are clipped: 0.995.")] = None,
    sampler: Annotated[str | None, option("--sampler", parser=parse.named("SAMPLERS"), metavar="NAME", panel=HOW,
                                          show_default=False, help="ddim, euler, heun, dpmpp-2m, ...")] = None,
    schedule: Annotated[str | None, option("--schedule", parser=parse.named("SCHEDULES"), metavar="NAME", panel=HOW,
                                           show_default=False, help="native, karras, log-snr, ...")] = None,
    eta: Annotated[float | None, option("--eta", parser=parse.number(0, 1), metavar="SHARE", panel=HOW,
                                        show_default=False, help="Fresh noise a step: 0 to 1.")] = None,
    initial_noise: Annotated[str | None, option("--initial-noise", metavar="FILE", panel=HOW, show_default=False,
                                                help="Safetensors with the key noise [N, C, H, W].")] = None,
    truncation: Annotated[float | None, option("--truncation", parser=parse.number(0, 10, above=True), metavar="LIMIT",
                                               panel=HOW, show_default=False,
                                               help="Of GANs: codes within this limit; 0.7 = tamer.")] = None,
    interpolate: Annotated[int | None, option("--interpolate", parser=parse.whole(2, 1024), metavar="K", panel=HOW,
                                              show_default=False,
                                              help="Of GANs: K pictures from each seed's to the next's; a sheet or "
                                                   ".mp4.")] = None,
    lora: Annotated[list[str] | None, option("--lora", metavar="FILE[:WEIGHT]", panel=TAUGHT, show_default=False,
                                             help="Low-rank updates to merge; repeatable.")] = None,
    control: Annotated[str | None, option("--control", metavar="NAME|PATH", panel=TAUGHT, show_default=False,
                                          help="A ControlNet, like --model.")] = None,
    control_image: Annotated[str | None, option("--control-image", metavar="FILE", panel=TAUGHT, show_default=False,
                                                help="What the ControlNet is shown, as it is.")] = None,
    control_scale: Annotated[float | None, option("--control-scale", parser=parse.number(0, 10), metavar="SCALE",
                                                  panel=TAUGHT, show_default=False,
                                                  help="How strongly it steers; default 1.")] = None,
    embedding: Annotated[list[str] | None, option("--embedding", metavar="FILE[:WORD]", panel=TAUGHT,
                                                  show_default=False,
                                                  help="A word that prompts may use; repeatable.")] = None,
    image: Annotated[str | None, option("--image", "-i", metavar="FILE", panel=START, show_default=False,
                                        help="Start from this picture, or from each in a folder; - is stdin.")] = None,
    direction: Annotated[str | None, option("--direction", parser=parse.one_of("ab", "ba"), metavar="ab|ba",
                                            panel=START, show_default=False,
                                            help="Of models that translate: which way; default ab.")] = None,
    strength: Annotated[float | None, option("--strength", parser=parse.number(0, 1), metavar="SHARE", panel=START,
                                             show_default=False, help="How much of it to redo: 0 to 1.")] = None,
    mask: Annotated[str | None, option("--mask", metavar="FILE", panel=START, show_default=False,
                                       help="White is painted anew.")] = None,
    outpaint: Annotated[str | None, option("--outpaint", parser=parse.margins, metavar="L,T,R,B", panel=START,
                                           show_default=False,
                                           help="Paint around it: left, top, right, bottom; px or %.")] = None,
    image_noise: Annotated[float | None, option("--image-noise", parser=parse.number(0, 1), metavar="SHARE",
                                                panel=START, show_default=False,
                                                help="Of models that enlarge: how much to doubt it.")] = None,
    output: Annotated[str | None, option("--output", "-o", metavar="WHERE", panel=FILES, show_default=False,
                                         help="A file, folder/, template, or - ('nexus help output-names').")] = None,
    exists: Annotated[str | None, option("--exists", parser=parse.one_of("skip", "error", "rename", "overwrite"),
                                         metavar="WHAT", panel=FILES, show_default=False,
                                         help="skip, error, rename or overwrite what is there.")] = None,
    force: options.Force = False,
    grid: Annotated[object, option("--grid", parser=parse.grid, metavar="[COLSxROWS]", panel=FILES,
                                   show_default=False, help="Also one sheet of all pictures.")] = None,
    preview: Annotated[Path | None, option("--preview", metavar="FILE", panel=FILES, show_default=False,
                                           help="Keep the picture in the making in this file.")] = None,
    preview_every: Annotated[int, option("--preview-every", parser=parse.whole(1, 100_000), metavar="K", panel=FILES,
                                         help="Renew it every K steps.")] = 5,
    like: Annotated[str | None, option("--like", metavar="FILE", panel=FILES, show_default=False,
                                       help="The settings stored in this picture; flags change them.")] = None,
    no_metadata: Annotated[bool, typer.Option("--no-metadata", rich_help_panel=FILES,
                                              help="Store no prompt and settings in the files.")] = False,
    batch: Annotated[str | None, option("--batch", "-b", metavar="FILE", panel=MANY, show_default=False,
                                        help=".jsonl, .csv, .tsv, .txt or - ('nexus help batch').")] = None,
    on_error: Annotated[str | None, option("--on-error", parser=parse.one_of("continue", "stop"), metavar="WHAT",
                                           panel=MANY, show_default=False,
                                           help="continue even past bad lines, or stop at the first failure.")] = None,
    shard: Annotated[object, option("--shard", parser=parse.shard, metavar="I/N", panel=MANY,
                                          show_default=False, help="Only part I (from 0) of N.")] = None,
    limit: Annotated[int | None, option("--limit", parser=parse.whole(1, 1_000_000), metavar="N", panel=MANY,
                                        show_default=False, help="At most so many now.")] = None,
    verify: Annotated[bool, typer.Option("--verify", rich_help_panel=MANY,
                                         help="Check the hashes of what is done before skipping it.")] = False,
    max_time: Annotated[float | None, option("--max-time", parser=parse.duration, metavar="TIME", panel=MANY,
                                             show_default=False, help="Stop after 90s, 15m, 3h with code 75.")] = None,
    batch_size: options.BatchSize = None,
    show: Annotated[bool, typer.Option("--show", rich_help_panel=SCREEN, help="Show them in the terminal.")] = False,
    json_lines: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    progress: options.Progress = "auto",
    color: options.Color = "auto",
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    offload: options.Offload = False,
    tile: options.Tile = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Make pictures. Picture k of a prompt has the seed + k and is the same whatever the batch size."""
    from nexus.catalog import entry
    flags = _folder_as_batch(dict(locals()))
    entry(system)
    raw = output == "-"
    out = Output(json_lines=json_lines, raw=raw, quiet=quiet, verbose=verbose, progress=progress, color=color)
    _check_combinations(flags)
    with ExitStack() as stack:
        settings, model, seed = _settings(flags, out, stack)
        engine = Engine(system, model, device, dtype, batch_size or 8, offload, tile)
        ways = Ways(metadata=not no_metadata, overwrite=force or exists == "overwrite",
                    batch=flags["batch"] is not None, stop_on_error=on_error == "stop", grid=grid, preview=preview,
                    preview_every=preview_every, show=show, max_time=max_time)
        asked = planning.Asked(system, planning.short_name(model) if model else system, settings, seeds, seed, num,
                               None if raw else output,
                               "overwrite" if force else exists)
        if flags["batch"] is None:
            jobs, ways = _of_flags(asked, ways, raw, out)
        else:
            jobs, ways = _of_batch(asked, ways, flags)
        check_grid(grid, len(jobs))
        if dry_run:
            return _plan(jobs, engine, out)
        make(jobs, engine, ways, out)


def _folder_as_batch(flags: dict) -> dict:
    """--image FOLDER is a batch of its pictures."""
    if flags["image"] is None or not os.path.isdir(flags["image"]):
        return flags
    if flags["batch"] is not None:
        raise UsageError("--image FOLDER and --batch cannot be given together", hint="name pictures in the batch file")
    return flags | {"batch": flags["image"], "image": None}


def _check_combinations(flags: dict) -> None:
    """Flags that contradict each other, or that ask for one stdin or stdout twice."""
    for one, other in (("prompt", "prompt_file"), ("seed", "seeds"), ("size", "width"), ("size", "height"),
                       ("force", "exists"), ("quiet", "show"), ("batch", "show"), *(("outpaint", n) for n in SIZES)):
        if flags[one] not in (None, False) and flags[other] not in (None, False):
            raise UsageError(f"--{one.replace('_', '-')} and --{other.replace('_', '-')} cannot be given together",
                             hint="leave one of them out")
    for wanted, by in (("image", "strength"), ("image", "mask"), ("image", "outpaint"), ("batch", "shard"),
                       ("batch", "limit"), ("batch", "on_error")):
        if flags[by] is not None and flags[wanted] is None and not (wanted == "image" and flags["batch"]):
            raise UsageError(f"--{by.replace('_', '-')} needs --{wanted}", hint=f"add --{wanted} FILE")
    if sum(flags[name] == "-" for name in ("prompt", "prompt_file", "image", "batch")) > 1:
        raise UsageError("only one of --prompt, --prompt-file, --image and --batch can be -",
                         hint="standard input can be read once")
    if flags["seeds"] and flags["num"] != 1:
        raise UsageError("--seeds and --num cannot be given together", hint="one picture is made for each seed")
    if flags["output"] == "-":
        _check_stdout(flags)
    if str(flags["output"]).lower().endswith(planning.FILM) and flags["interpolate"] is None:
        raise UsageError(f"--output '{flags['output']}': one picture makes no film",
                         hint="--interpolate 24, or another ending")
    if flags["preview"] is not None and flags["preview"].suffix.lower() not in planning.ENDINGS:
        raise UsageError(f"--preview '{flags['preview']}' has no picture's ending",
                         hint="one of " + " ".join(planning.ENDINGS))


def _check_stdout(flags: dict) -> None:
    if flags["json_lines"] or flags["batch"] is not None or flags["grid"] or flags["num"] > 1 \
            or len(flags["seeds"] or [0]) > 1:
        raise UsageError("-o - writes one picture: not with --json, --batch, --grid or several seeds",
                         hint="name a folder with / at its end")
    if sys.stdout is None or sys.stdout.isatty():
        raise UsageError("-o - would write a picture's bytes to the terminal", hint="nexus sample ... -o - > a.png")


def _settings(flags: dict, out: Output, stack: ExitStack) -> tuple[dict, str | None, int | None]:
    """The request's fields from --like and the flags, the model and the seed; every input file is there."""
    from nexus.naming import clean_text
    from nexus.requests import check_guidance
    stored, model, seed = _like(flags["like"], out) if flags["like"] else ({}, None, None)
    prompt = flags["prompt"]
    if prompt == "-" or flags["prompt_file"]:
        source = flags["prompt_file"] or "-"
        prompt = batches.read_text_file(source, "the prompt", PROMPT_BYTES)
    given = {key: list(flags[key]) if isinstance(flags[key], tuple) else flags[key] for key in PASSED}
    given["prompt"] = prompt
    if flags["size"]:
        given["width"], given["height"] = flags["size"]
    settings = {**stored, **{key: value for key, value in given.items() if value is not None}}
    for key in ("prompt", "negative_prompt"):
        if settings.get(key) is not None:
            settings[key] = clean_text(settings[key])
    if settings.get("image") == "-":
        settings["image"] = _stdin_picture(stack)
    for key in batches.PATH_KEYS:
        if key in settings and ("\0" in settings[key] or not os.path.isfile(settings[key])):
            raise InputError(f"--{key.replace('_', '-')}: there is no file '{settings[key]}'", hint="check the path")
    for key in batches.FILE_LISTS:
        if flags[key]:
            settings[key] = list(flags[key])
            batches.check_files(key, settings[key])
    if flags["batch"] is None:                      # the rows of a batch may complete it
        check_guidance(settings)
    _model(settings.get("guide_model"))
    _model(settings.get("control"))
    if flags["seed"] is not None or flags["seeds"] is not None:
        seed = flags["seed"]
    return settings, _model(flags["model"] or model), seed


def _model(name: str | None) -> str | None:
    """A model that looks like a path must be there; names are looked up later."""
    if name is not None and ("/" in name or name.endswith(".safetensors")) and not os.path.exists(name):
        from nexus.errors import ModelError
        raise ModelError(f"there is no model '{name}'", hint="a run folder, a checkpoint folder or a .safetensors file")
    return name


def _stdin_picture(stack: ExitStack) -> str:
    data = batches.read_stdin("the picture", PICTURE_LIMIT)
    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="nexus-", suffix=".picture"))
    file.write(data)
    file.flush()
    return file.name


def _like(path: str, out: Output) -> tuple[dict, str | None, int | None]:
    """Settings, model and seed of the record in a picture: from outside, so only known fields of legal value."""
    from nexus.images import read_record
    from nexus.requests import SampleRequest
    record = read_record(path)
    if record is None:
        raise InputError(f"{path} holds no settings of nexus", hint="nexus info shows what a file holds")
    known = {key: record[key] for key in SampleRequest.model_fields if record.get(key) is not None}
    if left := [key for key in (*batches.PATH_KEYS, *batches.FILE_LISTS) if known.pop(key, None) is not None]:
        out.warn(f"{path} was made from other files; give them again: " + ", ".join(f"--{k}" for k in left))
    parsed = SampleRequest.parse(known).to_json()
    seed, model = record.get("seed"), record.get("model")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= parse.SEED_MAX:
        seed = None
    return {key: parsed[key] for key in known}, model if isinstance(model, str) else None, seed


def _of_flags(asked: planning.Asked, ways: Ways, raw: bool, out: Output) -> tuple[list, Ways]:
    drawn = asked.seed is None and asked.seeds is None
    if drawn:
        asked = asked._replace(seed=parse.seed("random"))
    if raw:
        mark, seed = planning.digest(asked.system, asked.name, asked.settings), (asked.seeds or [asked.seed])[0]
        jobs = [planning.Job(f"{mark}-{seed}", asked.settings, seed, 1, None)]
    else:
        jobs, where = planning.of_flags(asked)
        ways = ways._replace(manifest=None if where.exact else where.root / "manifest.jsonl")
    if drawn:
        out.note(f"seed {asked.seed}")
    return jobs, ways


def _of_batch(asked: planning.Asked, ways: Ways, flags: dict) -> tuple[list, Ways]:
    """Rows to jobs; what the manifest and the files say is done is skipped."""
    from nexus.naming import slug
    rows = batches.read_rows(flags["batch"])
    name = slug(Path(flags["batch"]).stem) if flags["batch"] != "-" else "batch"
    jobs, where = planning.of_rows(asked, rows, (flags["batch"], name), keep_bad=flags["on_error"] == "continue")
    manifest = where.root / "manifest.jsonl"
    done = done_before(manifest, verify=flags["verify"]) if not ways.overwrite else lambda job: False
    jobs = planning.shard(jobs, flags["shard"], flags["limit"], lambda job: not done(job))
    ready = [job._replace(skip="done") if done(job) else job for job in jobs]
    rest = planning.settle([job for job in ready if not job.skip], asked.exists or "skip")
    settled = iter(rest)
    jobs = [job if job.skip else next(settled) for job in ready]
    return [_adopt(job) for job in jobs], ways._replace(manifest=manifest)


def _adopt(job):
    """A file that was finished just before a kill carries its own identity: it is recorded, not made again."""
    if job.skip != "exists":
        return job
    from nexus.images import read_record
    try:
        record = read_record(job.path)
    except InputError:
        return job
    return job._replace(skip="adopted") if record and record.get("id") == job.id else job


def _plan(jobs: list, engine: Engine, out: Output) -> None:
    """What a run would do, as lines like those of a run, and the memory it needs."""
    memory, short = needed([job for job in jobs if not job.skip and not job.error], engine, out)
    for job in jobs:
        status = "failed" if job.error else "skipped" if job.skip else "planned"
        record = {"id": job.id, "status": status, "path": str(job.path) if job.path else None, "seed": job.seed,
                  "settings": job.settings, **({"error": str(job.error)} if job.error else {}),
                  **({"memory": memory} if status == "planned" else {})}
        out.line(strict_json(record)) if out.json_lines else out.line(f"{status}  {job.path or '-'}")
    made, bad = sum(not job.skip and not job.error for job in jobs), sum(bool(job.error) for job in jobs)
    out.note(f"{made} to make, {len(jobs) - made - bad} there already, {bad} bad")
    if bad:
        raise PartialError(f"{bad} of {len(jobs)} items are bad", hint="correct their lines")
    if short:
        raise short
