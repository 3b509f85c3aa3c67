"""Making pictures and sounds: jobs to files, one after the other, each whole and recorded before the next."""

import hashlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nexus.atomic import append_line, clean_temporary, read_records, write_bytes
from nexus.errors import BusyError, InputError, NexusError, OutputError, PartialError, StoppedError
from nexus.naming import Template, render
from nexus_cli.batch import FILE_LISTS, PATH_KEYS
from nexus_cli.jobs import Job, short_name
from nexus_cli.media import PICTURES, Kind, Style
from nexus_cli.output import Output, PipeClosedError, strict_json

GRID_LIMIT = 1024
NAMES = ("model", "control", "guide_model", *PATH_KEYS)     # what a record tells without the folders above it


class Engine(NamedTuple):
    """How items are computed: the arguments of api.load and api.sample that are the same for all jobs."""

    system: str
    model: str | None
    device: str
    dtype: str
    batch_size: int
    offload: bool = False
    tile: str = "auto"


class Ways(NamedTuple):
    """What happens to finished items. manifest: where each one is recorded, or None. skip: files that are there stay.

    beside: the names of pictures (spectrograms) that are written beside them.
    """

    manifest: Path | None = None
    metadata: bool = True
    overwrite: bool = False
    skip: bool = False
    batch: bool = False
    stop_on_error: bool = False
    grid: tuple[int, int] | str | None = None
    preview: Path | None = None
    preview_every: int = 1
    show: bool = False
    max_time: float | None = None
    kind: Kind = PICTURES
    style: Style = Style()
    beside: Template | None = None


class Interrupts:
    """Ctrl-C, SIGTERM or SIGUSR1 once: finish the current item. Twice: stop now. asked: the signal that came, or 0."""

    def __init__(self, out: Output, noun: str = "picture"):
        self.asked, self._out, self._before, self._noun = 0, out, {}, noun

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)):
            self._before.setdefault(number, signal.signal(number, self._handle))
        return self

    def __exit__(self, *error):
        for number, before in self._before.items():
            signal.signal(number, before)

    def _handle(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.asked = number
        again = "Ctrl-C again" if number == signal.SIGINT else "another signal"
        self._out.note(f"finishing the current {self._noun}; {again} stops at once")


def done_before(manifest: Path | None, *, verify: bool = False) -> Callable[[Job], bool]:
    """Whether a job is recorded as done and its file is there with the recorded size (and hash, with `verify`)."""
    latest = {record.get("id"): record for record in read_records(manifest)} if manifest else {}

    def done(job: Job) -> bool:
        record = latest.get(job.id)
        if not record or record.get("status") != "ok" or job.path is None:
            return False
        try:
            if os.path.getsize(job.path) != record.get("bytes"):
                return False
            return not verify or hashlib.sha256(job.path.read_bytes()).hexdigest() == record.get("sha256")
        except OSError:
            return False
    return done


def make(jobs: list[Job], engine: Engine, ways: Ways, out: Output) -> None:
    """Make all jobs; PartialError when a batch has failures, else the first error as it is."""
    attempts: dict[str, int] = {}
    for record in read_records(ways.manifest) if ways.manifest else []:
        attempts[str(record.get("id"))] = attempts.get(str(record.get("id")), 0) + (record.get("status") != "skipped")
    for folder in {job.path.parent for job in jobs if job.path}:
        clean_temporary(folder)
    work = _Work(engine, ways, out, attempts, len(jobs))
    with Interrupts(out, ways.kind.noun) as interrupts, out.guard(), \
            out.tracker(len(jobs), ways.kind.nouns) as tracker:
        work.tracker, work.interrupts = tracker, interrupts
        for key, group in itertools.groupby(jobs, key=together):
            if key is None:
                for job in group:
                    work.not_made(job)
            else:
                work.group(list(group))
    work.finish()


class _Work:
    """The state of one `make`: what is loaded, counted and kept for the sheet."""

    tracker: Any
    interrupts: Interrupts
    told = ""                                           # the last that was said of how a prompt is understood

    def __init__(self, engine: Engine, ways: Ways, out: Output, attempts: dict[str, int], total: int):
        self.engine, self.ways, self.out, self.attempts, self.total = engine, ways, out, attempts, total
        self.started = self.last = self.loaded = time.monotonic()
        self.done = self.failed = 0
        self.seconds = 0.0                              # of sound
        self.system = None
        self.kept: list[tuple[Job, Any]] = []

    def group(self, jobs: list[Job]) -> None:
        """Jobs that differ in their seed alone; after a failure the rest of them goes on."""
        while jobs := self._missing(jobs):
            made = 0
            try:
                for job, item in zip(jobs, self._items(jobs), strict=True):
                    self._keep_or_skip(job, item)
                    made += 1
                    self._may_go_on()
                return
            except (PipeClosedError, StoppedError, OutputError, BusyError):
                raise
            except Exception as error:
                if not self.ways.batch or self.ways.stop_on_error or self.system is None:
                    raise
                if not isinstance(error, NexusError) and self.out.verbose > 1:
                    traceback.print_exc(file=sys.stderr)
                self.not_made(jobs[made]._replace(error=_known(error)))
                jobs = jobs[made + 1:]

    def _keep_or_skip(self, job: Job, item) -> None:
        if self._missing([job]):
            try:
                self._keep(job, item)
            except OutputError:                         # made by another process at this very moment?
                if self._missing([job]):
                    raise

    def _missing(self, jobs: list[Job]) -> list[Job]:
        """The jobs whose files another process has not made since this one planned, where those are to be skipped."""
        if not self.ways.skip:
            return jobs
        there = [job for job in jobs if job.path and os.path.lexists(job.path)]
        for job in there:
            self.not_made(adopted(job._replace(skip="exists"), self.ways.kind))
        return [job for job in jobs if job not in there]

    def _items(self, jobs: list[Job]) -> Iterator:
        from nexus import api
        from nexus.nn.precision import has_bfloat16
        from nexus.requests import SampleRequest
        request, engine = SampleRequest.parse(jobs[0].settings), self.engine
        model = engine.model or api.default_model(engine.system)
        if self.system is None:
            if not self.ways.batch:                     # what is wrong is told before a model is loaded for it
                self.ways.kind.check(request)
                api.check(outlined(engine, request), request)
            self.system = api.load(model, device=engine.device, dtype=engine.dtype, system=engine.system,
                                   student=bool(request.lora), offload=engine.offload, tile=engine.tile)
            self.loaded = time.monotonic()
            if engine.dtype == "bfloat16" and not has_bfloat16(next(self.system.parameters()).device):
                self.out.note("this device only emulates bfloat16, which takes many times longer than float32")
        return api.sample(self.system, request, seeds=[job.seed for job in jobs], batch_size=engine.batch_size,
                          model=model, progress=self._watch(len(jobs), request.duration),
                          preview_every=self.ways.preview_every, preview=self._preview if self.ways.preview else None)

    def _watch(self, count: int, seconds: float | None) -> Callable[[int, int], None]:
        """seconds: of each item, if they have a length; then what is made of it is told and not the steps."""
        begun = self.done

        def watch(done: int, total: int) -> None:
            made = begun + count * done / max(total, 1)
            text = f"step {done}/{total}" if seconds is None else self._pace(seconds * (made - self.done))
            self.tracker.update(self.done, failed=self.failed, within=max(made - self.done, 0.0), text=text)
        return watch

    def _pace(self, more: float = 0.0) -> str:
        """How much sound is made by now, and how fast; more: seconds of what is not written yet."""
        made = self.seconds + max(more, 0.0)
        return f"{made:.1f} s made, {made / max(time.monotonic() - self.loaded, 1e-3):.2f} a second" if made else ""

    def _preview(self, media) -> None:
        """An intermediate guess, written whole so that a viewer can watch the file."""
        from nexus import api, images
        pictures = [api.to_uint8(picture) for picture in media.data]
        sheet = images.contact_sheet(pictures, _columns(len(pictures))) if len(pictures) > 1 else pictures[0]
        images.write_image(self.ways.preview, sheet, exists="overwrite")

    def _keep(self, job: Job, item) -> None:
        """Write, record and announce one item."""
        kind, style = self.ways.kind, self.ways.style
        record = {**item.record, **({"id": job.id} if self.ways.batch else {}),
                  **({} if style.loudness is None else {"loudness": style.loudness})}
        record |= {key: short_name(str(record[key])) for key in NAMES if record.get(key)}
        record |= {key: [short_name(entry) for entry in record[key]] for key in FILE_LISTS if record.get(key)}
        self._tell(record)
        data = kind.encode(item, job.path, record if self.ways.metadata else None, style)
        seen = kind.look(item) if self.ways.grid or self.ways.show or self.ways.beside else None
        if job.path is None:
            self.out.media(data)
        else:
            write_bytes(job.path, data, exists="overwrite" if self.ways.overwrite else "error")
        if self.ways.beside:
            self._beside(seen, beside(job, self.ways.beside), record)
        now = time.monotonic()
        line = {"id": job.id, "status": "ok", "path": self._relative(job), "sha256": hashlib.sha256(data).hexdigest(),
                "bytes": len(data), "seconds": round(now - self.last, 3), "seed": job.seed,
                "settings": record if self.ways.metadata else {}}
        self.last = now
        self._record(job, line)
        self.done += 1
        self.seconds += item.data.shape[-1] / item.rate if item.rate else 0.0
        self.tracker.update(self.done, failed=self.failed, text=self._pace())
        if self.ways.grid:
            self.kept.append((job, seen))
        if self.ways.show:
            self._show(seen)

    def _tell(self, record: dict) -> None:
        """How the model understands a prompt, once; in a batch only where that may surprise."""
        said = ""
        if record.get("cut"):
            said = f"the model does not read the end of the prompt: {record['cut']}"
        elif record.get("prompt") and record.get("class") and not (record.get("exact") and self.ways.batch):
            nearest = "" if record.get("exact") else f", the nearest to '{record['prompt']:.80}'"
            style = f" in the style {record['style']}" if record.get("style") else ""
            said = f"class '{record['class']}'{style}{nearest}"
        if said and said != self.told:
            self.told = said
            self.out.note(said)

    def _beside(self, picture, path: Path, record: dict) -> None:
        from nexus import images
        images.write_image(path, picture, record, metadata=self.ways.metadata,
                           exists="overwrite" if self.ways.overwrite else "error")

    def not_made(self, job: Job) -> None:
        """Record and count a job that is skipped or has failed."""
        line = {"id": job.id, "status": "failed" if job.error else "skipped", "path": self._relative(job),
                "seed": job.seed}
        if job.skip == "adopted":
            self.done += 1
            data = job.path.read_bytes()
            line |= {"status": "ok", "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        elif job.error:
            self.failed += 1
            line["error"] = {"code": job.error.code, "message": str(job.error)}
            self.out.note(f"failed: {told(job)}")
        else:
            self.done += 1
            line["reason"] = job.skip
        if job.skip == "done":
            self.out.result(str(job.path), line)        # it exists, as asked for; the manifest has it already
        else:
            self._record(job, line)
        self.tracker.update(self.done + self.failed, failed=self.failed)

    def _record(self, job: Job, line: dict) -> None:
        line["attempt"] = self.attempts.get(job.id, 0) + 1
        if self.ways.manifest:
            append_line(self.ways.manifest, strict_json(line))
        shown = {**line, "path": str(job.path) if job.path else None}
        self.out.result(str(job.path) if job.path and line["status"] != "failed" else None, shown)

    def _relative(self, job: Job) -> str | None:
        if job.path is None or self.ways.manifest is None:
            return str(job.path) if job.path else None
        return os.path.relpath(job.path, self.ways.manifest.parent)

    def _may_go_on(self) -> None:
        number, limit = self.interrupts.asked, self.ways.max_time
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        late = limit and time.monotonic() - self.started > limit
        if (number or late) and self.done + self.failed < self.total:
            why = signal.Signals(number).name if number else "--max-time"
            raise StoppedError(f"stopped after {self.done} of {self.total} {self.ways.kind.nouns} ({why})",
                               hint="run the same command again to go on")

    def _show(self, image) -> None:
        from nexus import images
        width = min(self.out.console.width, 80)
        if self.out.console.is_terminal:
            sys.stderr.write(images.half_blocks(image, width, color=not self.out.console.no_color) + "\n")

    def finish(self) -> None:
        """The contact sheet, and the verdict on failures."""
        if self.seconds:
            self.out.note(self._pace(), level=1)
        if self.ways.grid and self.kept:
            self._sheet()
        if self.failed:
            where = f"; {self.ways.manifest} says why" if self.ways.manifest else ""
            raise PartialError(f"{self.failed} of {self.total} items failed{where}",
                               hint="correct what was said and run the same command again: only those are made")

    def _sheet(self) -> None:
        from nexus import images
        columns = _columns(len(self.kept)) if self.ways.grid == "auto" else self.ways.grid[0]
        first = self.kept[0][0].path
        path = first.with_name(f"{first.stem}-grid{first.suffix if self.ways.kind is PICTURES else '.png'}")
        pictures, seeds = [image for _, image in self.kept], [str(job.seed) for job, _ in self.kept]
        sheet = images.contact_sheet(pictures, columns, seeds)
        images.write_image(path, sheet, {"seeds": [job.seed for job, _ in self.kept]}, metadata=self.ways.metadata,
                           exists="overwrite" if self.ways.overwrite else "error")
        self.out.result(str(path), {"status": "ok", "path": str(path), "grid": True})


def adopted(job: Job, kind: Kind) -> Job:
    """A file that was finished just before a kill carries its own identity: it is recorded, not made again."""
    if job.skip != "exists":
        return job
    try:
        record = kind.record(job.path)
    except InputError:
        return job
    return job._replace(skip="adopted") if record and record.get("id") == job.id else job


def beside(job: Job, template: Template) -> Path:
    """The file of the picture beside a job's own."""
    return Path(render(template, {"n": job.n, "seed": job.seed, "id": job.id,
                                  "prompt": job.settings.get("prompt") or ""}))


def together(job: Job) -> str | None:
    """Neighbours of one key are made by one request; None: there is nothing to make."""
    return None if job.skip or job.error else json.dumps(job.settings, sort_keys=True, default=str)


def _columns(count: int) -> int:
    return next(columns for columns in itertools.count(1) if columns * columns >= count)


def outlined(engine: Engine, request, *, whole: bool = False) -> Any:
    """The engine's system without weights, as `api.check` needs it. whole: see `api.outline`."""
    from nexus import api
    return api.outline(engine.model or api.default_model(engine.system), system=engine.system,
                       student=bool(request.lora), whole=whole)


def told(job: Job) -> str:
    """A job's error, with the line of the batch file that it comes from."""
    said = str(job.error)
    return said if not job.line or said.startswith(f"{job.line}:") else f"{job.line}: {said}"


def _known(error: Exception) -> NexusError:
    if isinstance(error, NexusError):
        return error
    return NexusError(f"{type(error).__name__}: {error}")


def check_grid(grid: tuple[int, int] | str | None, count: int) -> None:
    """InputError if the pictures do not fit on the sheet."""
    room = GRID_LIMIT if grid in (None, "auto") else grid[0] * grid[1]
    if grid and count > room:
        raise InputError(f"a sheet of {room} places cannot hold {count} pictures", hint="a larger --grid, or none")
