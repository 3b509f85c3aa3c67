"""The run folder: its lock, its metrics, its verified checkpoints."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from nexus.atomic import append_line, write_bytes, write_text
from nexus.checkpoint import verify
from nexus.errors import BusyError, ModelError, OutputError

STEP = re.compile(r"step-(\d{7,})")


def lock(run: Path) -> FileLock:
    """Hold the run folder for this process (released when the process ends); BusyError names who has it."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        held = FileLock(run / "run.lock")
        held.acquire(timeout=0)
        write_text(run / "run.owner", f"pid {os.getpid()} on {socket.gethostname()}", exists="overwrite")
    except Timeout:
        owner = (run / "run.owner").read_text() if (run / "run.owner").exists() else "another process"
        raise BusyError(f"{run} is in use by {owner}", hint="wait for it, or choose another --run") from None
    except OSError as error:
        raise OutputError(f"cannot write in {run}: {error.strerror}") from None
    return held


def leave_unbegun(run: Path) -> None:
    """Remove a folder that holds nothing but this process's lock: what was asked for was refused."""
    ours = {"run.lock", "run.owner"}
    if all(path.name in ours for path in run.iterdir()):
        for name in ours:
            (run / name).unlink(missing_ok=True)
        run.rmdir()


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lives."""
    return run / f"step-{step:07d}"


def checkpoints(run: Path) -> list[int]:
    """The steps that have a checkpoint folder, oldest first."""
    return sorted(int(m[1]) for p in run.glob("step-*") if (m := STEP.fullmatch(p.name)))


def has_learnt(run: Path) -> bool:
    """Whether the run has, or had, a checkpoint."""
    return bool(checkpoints(run)) or any(run.glob("step-*.bad"))


def newest_good(run: Path, report: Callable[[str], None]) -> int | None:
    """The newest checkpoint whose every file verifies; damaged ones are set aside as *.bad and reported.

    None when the run has no checkpoint yet. ModelError when there were some and none is good.
    """
    steps = checkpoints(run)
    for step in reversed(steps):
        folder = step_folder(run, step)
        wrong = verify(folder)
        if not wrong:
            return step
        report(f"checkpoint {folder.name} is damaged ({wrong[0]}); set aside as {folder.name}.bad")
        aside = folder.with_name(folder.name + ".bad")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    if has_learnt(run):
        raise ModelError(f"no good checkpoint is left in {run}", hint="start anew with another --run")
    return None


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; called only after the newest one is on disk."""
    for step in checkpoints(run)[:-keep]:
        shutil.rmtree(step_folder(run, step), ignore_errors=True)


def clean(run: Path) -> None:
    """Remove what a killed save left behind."""
    for path in (*run.glob(".*.tmp"), *run.glob("samples/.*.tmp"), *run.glob("profiles/*/.*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def append_metrics(run: Path, row: dict, file: str = "metrics.jsonl") -> None:
    """Add one line."""
    append_line(run / file, json.dumps(row))


def truncate_metrics(run: Path, step: int, file: str = "metrics.jsonl") -> None:
    """Drop every line after `step`, and a torn last one, so that a resumed run writes each line once."""
    path = run / file
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n") or row["step"] > step:
            break
        kept.append(line)
    write_bytes(path, b"".join(kept), exists="overwrite")


def read_metrics(run: Path, file: str = "metrics.jsonl") -> list[dict]:
    """All whole lines."""
    path = run / file
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
