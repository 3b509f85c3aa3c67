"""Batch files: rows of settings from JSONL, CSV, TSV or plain prompts, every line checked before anything is made."""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nexus.errors import InputError, ModelError, NexusError, UsageError

FILE_LIMIT = 64 * 2**20
LINE_LIMIT = 2**20
PATH_KEYS = ("image", "mask", "initial_noise", "control_image", "melody", "continued")
FILE_LISTS = ("lora", "embedding")              # each entry a file, with a weight or a word after a colon
LISTS = (*FILE_LISTS, "apg", "perturb_layers")  # in a cell of a table their entries are separated by commas
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
OWN_KEYS = ("seed", "num", "id", "output")


class Row(NamedTuple):
    """One line of a batch file: its number, the request's settings, its own keys, or the error it has."""

    line: int
    settings: dict
    own: dict
    error: NexusError | None = None


def read_stdin(what: str, limit: int = FILE_LIMIT) -> bytes:
    """All of standard input; UsageError if it is a terminal, InputError if it is too long."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError(f"{what} is to come from standard input, but nothing is piped in", hint="pipe or name it")
    data = sys.stdin.buffer.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{what} on standard input is over {limit:,} bytes")
    return data


def read_text_file(path: str, what: str, limit: int) -> str:
    """A UTF-8 text file ("-" is standard input); InputError when it cannot be read."""
    try:
        if path != "-" and Path(path).stat().st_size > limit:
            raise InputError(f"{path} is over {limit:,} bytes")
        data = read_stdin(what, limit) if path == "-" else Path(path).read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}:{line}: not UTF-8 text (byte {error.start})", hint="save the file as UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {what} '{path}': {getattr(error, 'strerror', None) or error}",
                         hint="check the path") from None


def read_rows(path: str, form: str | None = None) -> list[Row]:
    """The rows of a batch file, bad ones with their error; InputError when the file as a whole cannot be read."""
    if path != "-" and Path(path).is_dir():
        return folder_rows(Path(path))
    text = read_text_file(path, "the batch file", FILE_LIMIT)
    form = form or (Path(path).suffix.lower() if path != "-" else ".jsonl")
    readers = {".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _table, ".tsv": _table, ".txt": _prompts}
    if form not in readers:
        raise UsageError(f"batch file '{path}' is of an unknown kind", hint=".jsonl, .csv, .tsv or .txt")
    base = Path(path).parent if path != "-" else Path(".")
    rows = [_row(line, value, base, path) for line, value in readers[form](text, form)]
    if not rows:
        raise InputError(f"{path}: there is no item in it", hint="one JSON object, table row or prompt a line")
    return rows


def folder_rows(folder: Path) -> list[Row]:
    """A row for each picture of a folder, whose result has its name; InputError when there is none."""
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
    if not files:
        raise InputError(f"there is no picture in {folder}", hint="check the path; endings: " + " ".join(PICTURES))
    stems = [p.stem for p in files]
    names = [p.stem if stems.count(p.stem) == 1 else p.name for p in files]
    return [Row(i, {"image": str(p)}, {"id": name, "output": f"{name}.png"})
            for i, (p, name) in enumerate(zip(files, names, strict=True), 1)]


def _json_lines(text: str, form: str) -> Iterator[tuple[int, dict | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if len(line) > LINE_LIMIT:
            yield number, f"the line is over {LINE_LIMIT:,} characters"
            continue
        try:
            value = json.loads(line, parse_constant=_refuse, object_pairs_hook=_unique)
            yield number, value if isinstance(value, dict) else f"not a JSON object: {line.strip()[:60]}"
        except json.JSONDecodeError as error:
            yield number, f"not JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:
            yield number, str(error)[:200]


def _refuse(text: str):
    raise ValueError(f"{text} is not a number")


def _unique(pairs: list[tuple]) -> dict:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key is given twice: " + next(key for key in keys if keys.count(key) > 1))
    return dict(pairs)


def _table(text: str, form: str) -> Iterator[tuple[int, dict | str]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if form == ".tsv" else ",", strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) != len(header):
            raise InputError("the table's header names a column twice", hint="rename one of them")
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) > len(header):
                yield reader.line_num, f"{len(cells)} cells, but the header has {len(header)}"
                continue
            yield reader.line_num, {key: cell for key, cell in zip(header, cells, strict=False) if cell != ""}
    except csv.Error as error:
        yield reader.line_num, f"not a table row ({error}); the lines after it were not read"


def _prompts(text: str, form: str) -> Iterator[tuple[int, dict | str]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _row(line: int, value: dict | str, base: Path, path: str) -> Row:
    try:
        if isinstance(value, str):
            raise InputError(value)
        return Row(line, *_checked(value, base))
    except NexusError as error:
        reason = str(error).removeprefix("SampleRequest: ")
        located = InputError(f"{path}:{line}: {reason}", hint=error.hint or "nexus help batch")
        return Row(line, {}, {}, located)


def _checked(value: dict, base: Path) -> tuple[dict, dict]:
    """Settings and own keys of one row, validated alone; InputError for an unknown key or a bad value."""
    from nexus.config import nearest
    from nexus.naming import FLAGS, clean_text
    from nexus.requests import SampleRequest
    fields = {FLAGS.get(name, name): name for name in SampleRequest.model_fields}
    if unknown := [key for key in value if key not in fields and key not in OWN_KEYS]:
        raise InputError(f"unknown setting '{unknown[0]}'", hint=nearest(unknown[0], (*fields, *OWN_KEYS)))
    settings = {fields[key]: value[key] for key in value if key not in OWN_KEYS}
    for key, entry in value.items():
        if isinstance(entry, bool):
            raise InputError(f"{key}: true and false are not settings of an item")
    for name in ("guidance_interval", "perturb_interval"):
        if isinstance(settings.get(name), str):
            settings[name] = settings[name].replace("-", ",").split(",")
    settings |= {key: [entry.strip() for entry in settings[key].split(",")] for key in LISTS
                 if isinstance(settings.get(key), str)}
    for key in ("prompt", "negative_prompt"):
        if isinstance(settings.get(key), str):
            settings[key] = clean_text(settings[key])
    parsed = SampleRequest.parse(settings).to_json()
    settings = {key: parsed[key] for key in settings if parsed[key] is not None}
    for key in PATH_KEYS:
        if key in settings:
            settings[key] = _input_path(base, settings[key], key)
    for key in FILE_LISTS:
        if key in settings:
            check_files(key, settings[key], base)
            settings[key] = [str(base / entry) for entry in settings[key]]
    return settings, _own(value)


def check_files(key: str, entries: list[str], base: Path = Path()) -> None:
    """UsageError for an entry of a list of FILE_LISTS that names no file, ModelError for one that is not there.

    base: the folder that relative names are below.
    """
    from nexus.requests import named_file, weighted_file
    for entry in entries:
        name = (weighted_file if key == "lora" else named_file)(entry)[0]
        if not name.strip():
            raise UsageError(f"--{key} '{entry}' names no file", hint=f"--{key} FILE, or leave it out")
        if "\0" in name or not (base / name).exists():
            raise ModelError(f"--{key}: there is no file '{name}'", hint="check the path")


def _input_path(base: Path, name: str, key: str) -> str:
    path = base / name
    if "\0" in name or not path.is_file():
        raise InputError(f"{key}: there is no file '{name}'", hint="paths are relative to the batch file")
    return str(path)


def _own(value: dict) -> dict:
    own = {}
    for key, high in (("seed", 2**63 - 1), ("num", 1_000_000)):
        if value.get(key) is not None:
            own[key] = _whole(key, value[key], 0 if key == "seed" else 1, high)
    for key in ("id", "output"):
        if value.get(key) is not None:
            if not isinstance(value[key], str | int) or not str(value[key]).strip() or len(str(value[key])) > 1000:
                raise InputError(f"{key}: {str(value[key])!r:.80} is not a short text")
            own[key] = str(value[key])
    return own


def _whole(key: str, value, low: int, high: int) -> int:
    text = str(value)
    if not isinstance(value, str | int) or not text.isascii() or not text.isdecimal() or len(text) > 20 \
            or not low <= int(text) <= high:
        raise InputError(f"{key}: {text[:40]!r} is not a whole number from {low} to {high}")
    return int(text)
