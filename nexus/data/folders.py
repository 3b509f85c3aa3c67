"""The files of a folder, of a tar or of several that hold pictures or sound, and what is written beside them."""

import csv
import glob
import io
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from nexus.data.spec import SETS
from nexus.errors import InputError

# Looked at; those after .tiff only so that `skipped` says that they are not read.
EXTENSIONS = ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .heic .heif .avif .jxl .jp2 .svg .tga .psd".split()
MAX_NOTE_BYTES = 2**20  # a caption file


class Place(NamedTuple):
    """Where a file lies: the bytes of a file, or of a member of a tar."""

    path: str
    start: int
    length: int

    def read(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.start)
            return file.read(self.length)


class Found(NamedTuple):
    """A file and what is known of it."""

    name: str
    caption: str
    style: str
    group: str  # its class
    place: Place


def find(spec: str, endings: Collection[str] = EXTENSIONS,
         sets: str = SETS) -> tuple[list[Found], list[tuple[str, str]]]:
    """All files of a folder, a tar or a glob of tars with these endings, and (name, reason) of what cannot be used.

    sets: what else could have been named, for the error.
    """
    path = os.path.expanduser(spec)
    found, skipped = [], []
    if os.path.isdir(path):
        _describe(_walk(path, skipped), "", endings, found, skipped)
    elif tars := [path] if os.path.isfile(path) else sorted(glob.glob(path)):
        for tar in tars:
            _describe(_members(tar, skipped), os.path.basename(tar) + ":", endings, found, skipped)
    else:
        raise InputError(f"data {spec!r} does not exist, expected {sets}",
                         hint="check the spelling; a path is relative to the current directory")
    return found, skipped


def _walk(root: str, skipped: list[tuple[str, str]]) -> dict[str, Place]:
    """Files below a folder by relative name; hidden ones are not looked at, links to folders not followed."""
    places = {}
    unreadable = lambda error: skipped.append((error.filename, error.strerror))  # noqa: E731
    for folder, subfolders, files in os.walk(root, onerror=unreadable):
        here = Path(folder).relative_to(root)
        skipped += [((here / name).as_posix(), "a link to a folder, links are not followed")
                    for name in subfolders if os.path.islink(os.path.join(folder, name))]
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in files:
            path = os.path.join(folder, name)
            if os.path.isfile(path):  # a pipe would block, a dangling link has no size
                places[(here / name).as_posix()] = Place(path, 0, os.path.getsize(path))
            else:
                skipped.append(((here / name).as_posix(), "not a regular file"))
    return {name: place for name, place in places.items() if not PurePosixPath(name).name.startswith(".")}


def _members(path: str, skipped: list[tuple[str, str]]) -> dict[str, Place]:
    """Files in a tar by name; nothing is extracted, so names are labels and never paths."""
    places = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isreg() and not member.issparse():
                    places[member.name] = Place(path, member.offset_data, member.size)
                elif not member.isdir():
                    skipped.append((member.name, "not a regular file"))
            if tar.offset >= os.path.getsize(path):
                skipped.append((path, "ends without the mark of a tar's end: it may be cut short"))
    except (tarfile.TarError, OSError) as error:
        if not places:
            raise InputError(f"{path!r} cannot be read as a .tar: {error}",
                             hint="expected an uncompressed .tar of name.png + name.txt pairs") from None
        skipped.append((path, f"damaged after {len(places)} members: {error}"))
    return places


def _describe(places: dict[str, Place], prefix: str, endings: Collection[str], found: list[Found],
              skipped: list[tuple[str, str]]) -> None:
    """Adds each such file with its caption: metadata row, else name.txt, name.json, else its folder's name."""
    rows = {}
    for name, place in places.items():
        if PurePosixPath(name).name in ("metadata.jsonl", "metadata.csv"):
            rows.update(_metadata(prefix + name, name, place))
    for name in sorted(rows.keys() - places.keys()):
        outside = name.startswith(("../", "/"))
        skipped.append((prefix + name, "named in the metadata but " + ("outside the set" if outside else "not there")))
    for name, place in places.items():
        stem, extension = os.path.splitext(name)
        if extension.lower() not in endings:
            continue
        try:
            note = {}
            for beside in (".json", ".txt"):
                if stem + beside in places:
                    note |= _note(places[stem + beside], beside)
            folder = PurePosixPath(name).parent.name
            note |= rows.get(name, {})
            caption = " ".join(note.get("text", note.get("caption", re.sub("[-_]", " ", folder))).split())
            known = prefix + name, caption, note.get("style", ""), note.get("class", "")
            "".join(known).encode()  # a number or an invalid character ends here, not in a checkpoint
            found.append(Found(*known[:3], known[3] or folder or caption, place))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            reason = f"its name, caption, style or class is not readable text: {error}"
            skipped.append(((prefix + name).encode(errors="replace").decode(), reason))


def _note(place: Place, extension: str) -> dict:
    """What the .txt or .json beside a file says of it; raises ValueError."""
    if place.length > MAX_NOTE_BYTES:
        raise ValueError(f"{place.length} bytes of caption, more than the {MAX_NOTE_BYTES} allowed")
    text = place.read().decode("utf-8-sig")
    return {"text": text} if extension == ".txt" else dict(json.loads(text))


def _metadata(shown: str, name: str, place: Place) -> Iterator[tuple[str, dict]]:
    """(file name, note) per row of metadata.jsonl or metadata.csv; raises InputError naming the line."""
    line = 0
    try:
        for line, text in _rows(name, place.read().decode("utf-8-sig")):  # noqa: B007  (errors below name it)
            row = json.loads(text) if isinstance(text, str) else text
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
            note = {"text": row.get("text", row.get("caption"))}
            note |= {key: row[key] for key in ("style", "class") if key in row}
            picture = row.get("file_name")
            if not all(isinstance(value, str) for value in (picture, *note.values())):
                raise ValueError("file_name, text, style or class is missing or is no text")
            yield posixpath.normpath(posixpath.join(posixpath.dirname(name), picture)), note
    except json.JSONDecodeError as error:
        raise _unreadable(f"{shown}:{line}", f"not JSON: {error.msg} at column {error.colno}") from None
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(f"{shown}:{line}" if line else shown, str(error)) from None


def _rows(name: str, text: str) -> Iterator[tuple[int, str | dict]]:
    """Number and text of the lines of a .jsonl, or number and cells of the rows of a .csv."""
    lines = io.StringIO(text, newline="")
    if not name.endswith(".csv"):
        yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        return
    reader = csv.DictReader(lines)
    if "file_name" not in (reader.fieldnames or ()):
        raise ValueError(f"there is no column file_name among {', '.join(reader.fieldnames or ()) or 'none':.200}")
    try:
        yield from ((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise ValueError(f"after line {reader.line_num}: {error}") from None


def _unreadable(where: str, why: str) -> InputError:
    return InputError(f"{where}: {why}", hint="expected file_name and text (or caption) in every row, as UTF-8")
