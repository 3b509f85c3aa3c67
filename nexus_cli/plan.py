"""From flags to files: what the commands that make something have in common."""

import os
import sys
import tempfile
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from pathlib import Path

from nexus.atomic import check_target
from nexus.errors import InputError, ModelError, NexusError, PartialError, UsageError
from nexus.naming import flag_of
from nexus_cli import batch as batches
from nexus_cli import jobs as planning
from nexus_cli import parse
from nexus_cli.making import Engine, Ways, adopted, beside, check_grid, done_before, make, outlined, together, told
from nexus_cli.media import PICTURES, Kind
from nexus_cli.needs import needed
from nexus_cli.output import Output, strict_json

PROMPT_BYTES = 2**20
CLASHES = (("prompt", "prompt_file"), ("seed", "seeds"), ("force", "exists"), ("quiet", "show"), ("batch", "show"))
NEEDS = (("batch", "shard"), ("batch", "limit"), ("batch", "on_error"))


def check_flags(flags: dict, kind: Kind, *, clashes: Iterable[tuple[str, str]] = (),
                needs: Iterable[tuple[str, str]] = (), streams: Collection[str] = ()) -> None:
    """UsageError for flags that contradict each other, or that ask for one stdin or stdout twice.

    needs: (wanted, by); streams: flags whose files may be "-", besides those of every command.
    """
    for one, other in (*CLASHES, *clashes):
        if flags[one] not in (None, False) and flags[other] not in (None, False):
            raise UsageError(f"{flag_of(one)} and {flag_of(other)} cannot be given together",
                             hint="leave one of them out")
    for wanted, by in (*needs, *NEEDS):
        if flags[by] is not None and flags[wanted] is None and (wanted == "batch" or not flags["batch"]):
            raise UsageError(f"{flag_of(by)} needs {flag_of(wanted)}", hint=f"add {flag_of(wanted)} FILE")
    names = ("prompt", "prompt_file", *streams, "batch")
    if sum(flags[name] == "-" for name in names) > 1:
        *most, last = map(flag_of, names)
        raise UsageError(f"only one of {', '.join(most)} and {last} can be -", hint="standard input can be read once")
    if flags["seeds"] and flags["num"] != 1:
        raise UsageError("--seeds and --num cannot be given together", hint=f"one {kind.noun} is made for each seed")
    if flags["output"] == "-":
        _check_stdout(flags, kind)


def _check_stdout(flags: dict, kind: Kind) -> None:
    if flags["json_lines"] or flags["batch"] is not None or flags.get("grid") or flags["num"] > 1 \
            or len(flags["seeds"] or [0]) > 1:
        raise UsageError(f"-o - writes one {kind.noun}: not with --json, --batch, --grid or several seeds",
                         hint="name a folder with / at its end")
    if sys.stdout is None or sys.stdout.isatty():
        raise UsageError(f"-o - would write a {kind.noun}'s bytes to the terminal",
                         hint=f"nexus ... -o - > a{kind.endings[0]}")


def gathered(flags: dict, passed: Iterable[str], stored: dict) -> dict:
    """The request's settings: those stored in a file (see `like`), over which those of the flags go; prompts clean."""
    from nexus.naming import clean_text
    from nexus.requests import COMPANIONS
    prompt = flags["prompt"]
    if prompt == "-" or flags["prompt_file"]:
        prompt = batches.read_text_file(flags["prompt_file"] or "-", "the prompt", PROMPT_BYTES)
    given = {key: list(flags[key]) if isinstance(flags[key], tuple) else flags[key] for key in passed}
    given["prompt"] = prompt
    told = {key: value for key, value in given.items() if value is not None}
    alone = {key for key, other in COMPANIONS.items()       # what is said of a file that is not given again goes too
             if other in batches.PATH_KEYS and other not in told}
    settings = {**{key: value for key, value in stored.items() if key not in alone}, **told}
    for key in ("prompt", "negative_prompt"):
        if settings.get(key) is not None:
            settings[key] = clean_text(settings[key])
    return settings


def check_paths(settings: dict) -> None:
    """InputError for a setting that names a file which is not there."""
    for key in batches.PATH_KEYS:
        if key in settings and ("\0" in settings[key] or not os.path.isfile(settings[key])):
            raise InputError(f"{flag_of(key)}: there is no file '{settings[key]}'", hint="check the path")


def stdin_file(what: str, limit: int, stack: ExitStack) -> str:
    """A file with all of standard input, which is there as long as the stack."""
    data = batches.read_stdin(what, limit)
    file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="nexus-", suffix=".input"))
    file.write(data)
    file.flush()
    return file.name


def model_there(name: str | None) -> str | None:
    """A model that looks like a path must be there; names are looked up later."""
    if name is not None and ("/" in name or name.endswith(".safetensors")) and not os.path.exists(name):
        raise ModelError(f"there is no model '{name}'", hint="a run folder, a checkpoint folder or a .safetensors file")
    return name


def like(path: str, kind: Kind, out: Output) -> tuple[dict, str | None, int | None]:
    """Settings, model and seed of the record in a file: from outside, so only known fields of legal value."""
    from nexus.requests import SampleRequest
    record = kind.record(path)
    if record is None:
        raise InputError(f"{path} holds no settings of nexus", hint="nexus info shows what a file holds")
    known = {key: record[key] for key in SampleRequest.model_fields if record.get(key) is not None}
    if left := [key for key in (*batches.PATH_KEYS, *batches.FILE_LISTS) if known.pop(key, None) is not None]:
        out.warn(f"{path} was made from other files; give them again: " + ", ".join(map(flag_of, left)))
    parsed = SampleRequest.parse(known).to_json()
    seed, model = record.get("seed"), record.get("model")
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= parse.SEED_MAX:
        seed = None
    return {key: parsed[key] for key in known}, model if isinstance(model, str) else None, seed


def asked_for(system: str, model: str | None, settings: dict, seed: int | None, flags: dict, kind: Kind,
              ext: str = "", words: tuple[str, ...] = ()) -> planning.Asked:
    """What the flags ask for. model: None = the system's own; ext: what {ext} is, "" = the kind's usual one.

    words: what every prompt of a batch ends with.
    """
    return planning.Asked(system, planning.short_name(model) if model else system, settings, flags["seeds"], seed,
                          flags["num"], None if flags["output"] == "-" else flags["output"],
                          "overwrite" if flags["force"] else flags["exists"], kind, ext or kind.endings[0][1:], words)


def ways_of(flags: dict, kind: Kind, **more) -> Ways:
    """What becomes of what is made; more: other fields of Ways."""
    return Ways(metadata=not flags["no_metadata"], overwrite=flags["force"] or flags["exists"] == "overwrite",
                batch=flags["batch"] is not None, stop_on_error=flags["on_error"] == "stop", show=flags["show"],
                max_time=flags["max_time"], kind=kind, **more)


def output_of(flags: dict) -> Output:
    """The streams, as the flags want them."""
    return Output(raw=flags["output"] == "-", **{name: flags[name] for name in
                                                 ("json_lines", "quiet", "verbose", "progress", "color")})


def carry_out(asked: planning.Asked, engine: Engine, ways: Ways, flags: dict, out: Output) -> None:
    """Plan all jobs, then make them; with --dry-run only show them."""
    jobs, ways = _of_flags(asked, ways, out) if flags["batch"] is None else _of_batch(asked, ways, flags)
    check_grid(ways.grid, len(jobs))
    _check_beside(jobs, ways)
    if flags["dry_run"]:
        return _show(jobs, engine, ways, out)
    make(jobs, engine, ways, out)


def _of_flags(asked: planning.Asked, ways: Ways, out: Output) -> tuple[list, Ways]:
    drawn = asked.seed is None and asked.seeds is None
    if drawn:
        asked = asked._replace(seed=parse.seed("random"))
    if out.raw:
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
    return [adopted(job, ways.kind) for job in jobs], ways._replace(
        manifest=manifest, skip=(asked.exists or "skip") == "skip")


def _check_beside(jobs: list, ways: Ways) -> None:
    """The pictures beside what is made can be written, each to a place of its own."""
    if ways.beside is None:
        return
    paths = [beside(job, ways.beside) for job in jobs if not job.skip and not job.error]
    if len(set(paths)) < len(paths):
        raise UsageError(f"several {ways.kind.nouns} would have the spectrogram '{paths[0]}'",
                         hint="put {n}, {seed} or {id} into its name")
    for path in paths:
        check_target(path, exists="overwrite" if ways.overwrite else "error")


def _refused(jobs: list, engine: Engine, ways: Ways) -> list:
    """The jobs, those of a batch that the model would refuse with their error; a single one's is raised."""
    from nexus import api
    from nexus.requests import SampleRequest
    systems, found = {}, {}
    for job in jobs:
        key = together(job)
        if key is None or key in found:
            continue
        request = SampleRequest.parse(job.settings)
        student = bool(request.lora)
        if student not in systems:                      # a model that is damaged ends the run, not an item of it
            systems[student] = outlined(engine, request, whole=True)
        try:
            found[key] = None
            ways.kind.check(request)
            api.check(systems[student], request)
        except NexusError as error:
            if not ways.batch or ways.stop_on_error:
                raise
            found[key] = error
    return [job._replace(error=found.get(together(job))) if not job.error else job for job in jobs]


def _show(jobs: list, engine: Engine, ways: Ways, out: Output) -> None:
    """What a run would do, as lines like those of a run, and the memory that pictures need.

    What it would refuse is raised here, or told of a batch's items as the run would.
    """
    jobs = _refused(jobs, engine, ways)
    ready = [job for job in jobs if not job.skip and not job.error]
    memory, short = needed(ready, engine, out) if ways.kind is PICTURES else ({}, None)
    for job in jobs:
        status = "failed" if job.error else "skipped" if job.skip else "planned"
        record = {"id": job.id, "status": status, "path": str(job.path) if job.path else None, "seed": job.seed,
                  "settings": job.settings, **({"error": str(job.error)} if job.error else {}),
                  **({"memory": memory} if memory and status == "planned" else {})}
        out.line(strict_json(record)) if out.json_lines else out.line(f"{status}  {job.path or '-'}")
        if job.error:
            out.note(f"failed: {told(job)}")
    bad = sum(bool(job.error) for job in jobs)
    out.note(f"{len(ready)} to make, {len(jobs) - len(ready) - bad} there already, {bad} bad")
    if bad:
        raise PartialError(f"{bad} of {len(jobs)} items are bad", hint="correct their lines")
    if short:
        raise short
