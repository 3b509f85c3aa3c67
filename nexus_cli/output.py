"""The streams: results to stdout, everything else to stderr; bars only on a terminal."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator

from nexus.errors import NexusError, OutputError

PLAIN_SECONDS = 10.0


def strict_json(value, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON as the standard has it, in ASCII: a number that is not finite is null, and what is no JSON is its text."""
    return json.dumps(_finite(value), allow_nan=False, default=str, indent=indent, sort_keys=sort_keys)


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class PipeClosedError(NexusError):
    """`| head` has read enough: end quietly, as a shell's own tools do (128 + SIGPIPE)."""

    code = 141


class Output:
    """What a command says. `json_lines`: results as JSON objects, not paths; `raw`: stdout carries media bytes."""

    def __init__(self, *, json_lines: bool = False, raw: bool = False, quiet: bool = False, verbose: int = 0,
                 progress: str = "auto", color: str = "auto"):
        self.json_lines, self.raw, self.quiet, self.verbose = json_lines, raw, quiet, verbose
        self.progress = "none" if quiet and progress == "auto" else progress
        self.stdout = sys.stdout
        self.console = stderr_console(color)

    def result(self, path: str | None, record: dict) -> None:
        """One finished thing: its path, or its record with --json."""
        if self.raw:
            return
        if self.json_lines:
            self.line(strict_json(record))
        elif path is not None:
            self.line(path)

    def line(self, text: str) -> None:
        """One line of stdout, flushed so that a pipe's reader sees it at once."""
        if self.stdout is not None:
            with _stdout_explained():
                self.stdout.write(text + "\n")
                self.stdout.flush()

    def media(self, data: bytes) -> None:
        """The bytes of an item on stdout."""
        with _stdout_explained():
            self.stdout.buffer.write(data)
            self.stdout.buffer.flush()

    def note(self, text: str, *, level: int = 0) -> None:
        """A remark on stderr; silent with -q, and below its level of -v."""
        if not self.quiet and self.verbose >= level:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A warning on stderr, shown even with -q."""
        self.console.print(f"warning: {text}", style="" if self.console.no_color else "yellow", markup=False,
                           highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Send stray prints of libraries to stderr, so that stdout stays clean."""
        with contextlib.redirect_stdout(sys.stderr):
            yield

    @contextlib.contextmanager
    def tracker(self, total: int | None, unit: str) -> Iterator["Tracker"]:
        """Progress over `total` units, in the way that --progress asks for."""
        mode = self.progress
        if mode == "auto":
            seen = sys.stderr is not None and sys.stderr.isatty() and not self.console.is_dumb_terminal
            mode = "bar" if seen else "plain"
        tracker = (_Bar if mode == "bar" else Tracker)(self.console, mode, total, unit)
        try:
            yield tracker
        finally:
            tracker.close()


class Tracker:
    """Progress as one plain or JSON line now and then, or silence."""

    def __init__(self, console, mode: str, total: int | None, unit: str):
        self.console, self.mode, self.total, self.unit = console, mode, total, unit
        self.started = self.shown = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, *, failed: int | None = None, text: str = "", within: float = 0.0) -> None:
        """`done` units are finished; within: the share of the current one; text: what else to show."""
        now = time.monotonic()
        if self.first is None:
            self.first = done
        last = self.total is not None and done >= self.total
        due = now - self.shown >= PLAIN_SECONDS or (last and (self.total or 0) > 1)
        if self.mode not in ("plain", "json") or not due:
            return
        self.shown = now
        each = (now - self.started) / max(done - self.first, 1)
        left = each * (self.total - done) if self.total is not None and done > self.first else None
        if self.mode == "json":
            line = strict_json({"done": done, "total": self.total, "failed": failed or 0, "unit": self.unit,
                                "seconds_each": round(each, 4), "eta_seconds": left and round(left, 1)})
        else:
            eta = f", eta {_span(left)}" if left is not None and not last else ""
            of = f"/{self.total}" if self.total is not None else ""
            lost = f", {failed} failed" if failed is not None else ""
            line = f"{done}{of} {self.unit}{lost}, {each:.3g} s each{eta}{'  ' + text if text else ''}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """End the display."""


class _Bar(Tracker):
    """Progress as a rich bar on a terminal."""

    def __init__(self, console, mode: str, total: int | None, unit: str):
        super().__init__(console, mode, total, unit)
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        self._bar = Progress(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                             TimeRemainingColumn(), TextColumn("{task.fields[text]}", markup=False),
                             console=console, transient=True)
        self._task = self._bar.add_task(unit, total=total, text="")
        self._bar.start()

    def update(self, done: int, *, failed: int | None = None, text: str = "", within: float = 0.0) -> None:
        shown = f"{failed} failed  {text}" if failed else text
        self._bar.update(self._task, completed=done + within, text=shown)

    def close(self) -> None:
        self._bar.stop()


@contextlib.contextmanager
def _stdout_explained() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise PipeClosedError("the reader of standard output went away") from None
    except OSError as error:
        raise OutputError(f"cannot write to standard output: {error.strerror}") from error


def stderr_console(color: str = "auto"):
    """rich on stderr: NO_COLOR, FORCE_COLOR and TERM=dumb are honoured by rich itself."""
    from rich.console import Console
    extra = {"always": {"force_terminal": True}, "never": {"no_color": True}}.get(color, {})
    return Console(stderr=True, **extra)


def complain(message: str, hint: str | None, *, color: str = "auto") -> None:
    """`error:` and `hint:` on stderr."""
    with contextlib.suppress(OSError, ValueError):
        console = stderr_console(color)
        console.print(f"error: {message}", style="" if console.no_color else "bold red", markup=False, highlight=False,
                      soft_wrap=True)
        if hint:
            console.print(f"hint: {hint}", markup=False, highlight=False, soft_wrap=True)


def silence_stdout() -> None:
    """After a broken pipe: nothing more can be said, and Python must not try at exit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _span(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{whole:02d}s" if minutes else f"{whole}s"
