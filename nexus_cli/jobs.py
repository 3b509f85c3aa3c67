"""From what is asked to a list of jobs: one item each, with its seed, its identity and its file name."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from nexus.atomic import check_target
from nexus.errors import InputError, NexusError, UsageError
from nexus.naming import DEFAULT, Template, fields_of, inside, parse_template, render, slug
from nexus_cli.batch import PATH_KEYS, Row
from nexus_cli.media import PICTURES, Kind

MANY = 1_000_000


class Job(NamedTuple):
    """One item: `settings` are the request's fields, `path` is None for standard output, `line` is FILE:LINE."""

    id: str
    settings: dict
    seed: int
    n: int
    path: Path | None
    skip: str = ""              # why it is not made ("exists", "done")
    error: NexusError | None = None
    line: str = ""


class Asked(NamedTuple):
    """What the flags say: defaults of every job. `name` is the word for {model}, `ext` the one for {ext}.

    words: what every prompt ends with.
    """

    system: str
    name: str
    settings: dict
    seeds: list[int] | None
    seed: int | None
    num: int
    output: str | None
    exists: str | None
    kind: Kind = PICTURES
    ext: str = "png"
    words: tuple[str, ...] = ()


class Place(NamedTuple):
    """Where items go: a template, the folder that holds them all, and whether one exact file was named."""

    template: Template
    root: Path
    exact: bool


def place(output: str | None, default: str = DEFAULT, kind: Kind = PICTURES) -> Place:
    """What -o means: nothing, a folder, a file or a template; UsageError for an unknown field or ending."""
    folder, name = os.path.split(default)
    if output is None:
        return Place(parse_template(default), Path(folder), False)
    if output == "" or "\0" in output:
        raise UsageError(f"--output {output!r} is not a file name")
    if output.endswith("/") or os.path.isdir(output):
        folder = output.rstrip("/") + "/" if output.strip("/") else "/"
        return Place((folder, *parse_template(name)), Path(output), False)
    template = parse_template(output)
    tail = template[-1]
    if not (isinstance(tail, str) and kind.ends(tail)) and getattr(tail, "name", "") != "ext":
        raise UsageError(f"--output '{output}' does not end in a {kind.noun}'s ending",
                         hint="one of " + " ".join(kind.endings) + ", or a folder with / at its end")
    first = template[0] if isinstance(template[0], str) else ""
    return Place(template, Path(os.path.dirname(first) or "."), not fields_of(template) - {"ext"})


def short_name(model: str) -> str:
    """A model as it may be shown to others: a name, or a path below here; of any other path its end only."""
    path = os.path.normpath(model)
    if not os.path.isabs(path) and not path.startswith(".."):
        return path
    below = os.path.relpath(path)
    if not below.startswith(".."):
        return below
    parts = Path(path).parts
    return "/".join(parts[-2:] if parts[-1].startswith("step-") or parts[-1] == "model.safetensors" else parts[-1:])


def digest(system: str, name: str, settings: dict) -> str:
    """The settings' hash, 16 hex digits: with a seed it says which item."""
    text = json.dumps([system, name, settings], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def worded(settings: dict, words: tuple[str, ...]) -> dict:
    """Settings whose prompt has these words at its end."""
    parts = [part for part in (settings.get("prompt"), *words) if part]
    return settings | {"prompt": ", ".join(parts)} if words else settings


def _with_row(settings: dict, k: int) -> dict:
    """The settings of item k, which takes row k of the noise that is given, whichever others are made beside it."""
    if not settings.get("initial_noise") or not k:
        return settings
    return settings | {"noise_row": settings.get("noise_row", 0) + k}


def of_flags(asked: Asked) -> tuple[list[Job], Place]:
    """The jobs of a command without a batch file; item k has seed + k."""
    where = place(asked.output, kind=asked.kind)
    seeds = asked.seeds or [(asked.seed + k) % 2**63 for k in range(asked.num)]
    if where.exact and len(seeds) > 1:
        raise UsageError(f"--output '{asked.output}' is one file, but {len(seeds)} {asked.kind.nouns} are asked for",
                         hint="put {n} or {seed} into the name, or name a folder with / at its end")
    mark, date = digest(asked.system, asked.name, asked.settings), time.strftime("%Y%m%d-%H%M%S")
    jobs = []
    for n, seed in enumerate(seeds, 1):
        values = {"n": n, "seed": seed, "model": asked.name, "prompt": asked.settings.get("prompt") or "",
                  "id": f"{mark}-{seed}", "hash": mark[:8], "date": date, "ext": asked.ext}
        jobs.append(Job(f"{mark}-{seed}", _with_row(asked.settings, n - 1), seed, n,
                        Path(render(where.template, values))))
    policy = asked.exists or ("error" if where.exact else "rename")
    return settle(jobs, policy), where


def of_rows(asked: Asked, rows: list[Row], source: tuple[str, str], *, keep_bad: bool) -> tuple[list[Job], Place]:
    """The jobs of a batch file (source: its path and its name); InputError for a bad row, unless those are kept."""
    path, name = source
    where = place(asked.output, f"outputs/{name}/{{id}}.{{ext}}", asked.kind)
    if where.exact:
        raise UsageError(f"--output '{asked.output}' is one file, but a batch makes many",
                         hint="name a folder with / at its end, or put {id} or {n} into the name")
    jobs: list[Job] = []
    twins: dict[str, int] = {}
    for row in rows:
        try:
            jobs.extend(job._replace(line=f"{path}:{row.line}")
                        for job in _of_row(asked, row, where, len(jobs), twins))
        except NexusError as error:
            located = error if error is row.error else InputError(f"{path}:{row.line}: {error}", hint=error.hint)
            if not keep_bad:
                raise located from None
            jobs.append(Job(f"line-{row.line}", {}, 0, len(jobs) + 1, None, error=located))
        if len(jobs) > MANY:
            raise InputError(f"{path}: over {MANY:,} {asked.kind.nouns}", hint="split the file")
    return _distinct(jobs, rows), where


def _of_row(asked: Asked, row: Row, where: Place, before: int, twins: dict[str, int]) -> list[Job]:
    """A row's identity is its id, or else all that it asks for: lines may move without being made again."""
    if row.error:
        raise row.error
    settings = worded({**asked.settings, **row.settings}, asked.words)
    mark = digest(asked.system, asked.name, {**settings, **row.own})
    twins[mark] = twins.get(mark, 0) + 1
    if twins[mark] > 1 and "id" not in row.own:
        mark = digest(asked.system, asked.name, {**settings, **row.own, "twin": twins[mark]})
    prompt = settings.get("prompt") or ""
    word = row.own.get("id") or (f"{slug(prompt, 60)}-{mark[:12]}" if prompt else mark[:12])
    base = row.own.get("seed", asked.seed if asked.seed is not None else int(mark[:8], 16))
    number = row.own.get("num", asked.num)
    seeds = asked.seeds if asked.seeds and "seed" not in row.own else [(base + k) % 2**63 for k in range(number)]
    jobs = []
    for k, seed in enumerate(seeds):
        key = word if len(seeds) == 1 else f"{word}-{k}"
        values = {"n": before + k + 1, "seed": seed, "model": asked.name, "prompt": prompt, "id": key,
                  "hash": mark[:8], "date": time.strftime("%Y%m%d"), "ext": asked.ext}
        jobs.append(Job(key if "id" in row.own else f"{mark}-{seed}", _with_row(settings, k), seed, before + k + 1,
                        _row_path(row, where, k, len(seeds), values, asked.kind)))
    return jobs


def _row_path(row: Row, where: Place, k: int, count: int, values: dict, kind: Kind) -> Path:
    if "output" not in row.own:
        return Path(render(where.template, values))
    path = inside(where.root, row.own["output"])
    if not kind.ends(path):
        raise InputError(f"output '{row.own['output']}' has no {kind.noun}'s ending",
                         hint="one of " + " ".join(kind.endings))
    return path if count == 1 else path.with_stem(f"{path.stem}-{k}")


def _distinct(jobs: list[Job], rows: list[Row]) -> list[Job]:
    """Refuse two jobs of one identity or one file, and outputs that are inputs."""
    inputs = {os.path.realpath(row.settings[key]) for row in rows for key in PATH_KEYS if key in row.settings}
    for what, keys in (("id", [job.id for job in jobs]), ("output", [str(job.path) for job in jobs if job.path])):
        seen: set[str] = set()
        for key in keys:
            if key in seen:
                raise InputError(f"two items have the same {what} '{key:.200}'", hint=f"make each {what} different")
            seen.add(key)
    for job in jobs:
        if job.path and inputs and os.path.realpath(job.path) in inputs:
            raise InputError(f"output '{job.path}' is an input of the same batch", hint="choose another name")
    return jobs


def settle(jobs: list[Job], policy: str) -> list[Job]:
    """Apply --exists to every job before anything heavy is imported; OutputError or UsageError at the first problem."""
    taken: set[Path] = set()
    settled = []
    for job in jobs:
        if job.path is None or job.error:
            settled.append(job)
            continue
        path = _free(job.path, taken) if policy == "rename" else job.path
        if path in taken:
            raise UsageError(f"two items would both be '{path}'", hint="put {n} or {seed} into --output")
        taken.add(path)
        there = os.path.lexists(path)
        check_target(path, exists="overwrite" if policy in ("overwrite", "skip") else "error")
        settled.append(job._replace(path=path, skip="exists" if there and policy == "skip" else ""))
    return settled


def _free(path: Path, taken: Iterable[Path]) -> Path:
    candidate, number = path, 0
    while candidate in taken or os.path.lexists(candidate):
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def shard(jobs: list[Job], part: tuple[int, int] | None, limit: int | None, todo: Callable[[Job], bool]) -> list[Job]:
    """The jobs of one shard (every N-th), of which at most `limit` are still to be done."""
    mine = jobs if part is None else jobs[part[0]::part[1]]
    if limit is None:
        return mine
    kept, left = [], limit
    for job in mine:
        if todo(job):
            if left == 0:
                break
            left -= 1
        kept.append(job)
    return kept
