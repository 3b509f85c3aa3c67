"""Names of outputs and text from outside: templates with a closed set of fields, slugs, paths that stay inside."""

import os
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from nexus.errors import InputError, UsageError

FIELDS = ("n", "seed", "model", "prompt", "id", "hash", "date", "ext")
DEFAULT = "outputs/{date}-{model}-{seed}-{n:03d}.{ext}"
SLUG_BYTES = 120
PROMPT_LIMIT = 10_000
FLAGS = {"continued": "continue"}       # settings that flags and batch rows call otherwise
_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]|%%|%(0?[0-9]{0,2})d")
_WIDTH = re.compile(r"(0?)([0-9]{1,2})d")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


class Field(NamedTuple):
    """One `{name}` or `{name:04d}` of a template; `width` 0 means as it is."""

    name: str
    width: int = 0
    fill: str = " "


Template = tuple[str | Field, ...]


def flag_of(setting: str) -> str:
    """A setting as the command line writes it."""
    return f"--{FLAGS.get(setting, setting).replace('_', '-')}"


def parse_template(text: str) -> Template:
    """The parts of an output template; UsageError names an unknown field or a stray brace.

    Fields: {n} {seed} {model} {prompt} {id} {hash} {date} {ext}; {n:04d} pads; %d and %03d are {n}; {{ }} are literal.
    """
    parts: list[str | Field] = []
    position = 0
    for match in _TOKEN.finditer(text):
        parts.append(text[position:match.start()])
        parts.append(_part(match, text))
        position = match.end()
    parts.append(text[position:])
    return tuple(part for part in parts if part != "")


def _part(match: re.Match, text: str) -> str | Field:
    token = match[0]
    if token in ("{{", "}}", "%%"):
        return token[0]
    if token.startswith("%"):
        return _field("n", f"{match[2]}d" if match[2] else "", text)
    if token in "{}":
        raise UsageError(f"output '{text}': a stray '{token}'", hint="write {{ or }} for a literal brace")
    name, _, form = match[1].partition(":")
    return _field(name, form, text)


def _field(name: str, form: str, text: str) -> Field:
    if name not in FIELDS:
        raise UsageError(f"output '{text}': there is no field {{{name}}}",
                         hint="fields: " + " ".join(f"{{{field}}}" for field in FIELDS))
    if not form:
        return Field(name)
    match = _WIDTH.fullmatch(form)
    if not match or name not in ("n", "seed"):
        raise UsageError(f"output '{text}': '{{{name}:{form}}}' is not a padded number", hint="for example {n:04d}")
    return Field(name, int(match[2]), "0" if match[1] else " ")


def fields_of(template: Template) -> set[str]:
    """The names of the fields that a template uses."""
    return {part.name for part in template if isinstance(part, Field)}


def render(template: Template, values: Mapping[str, object]) -> str:
    """The path a template gives; every text value becomes a slug, so it can add no folder of its own."""
    out = []
    for part in template:
        if isinstance(part, str):
            out.append(part)
        elif part.width or isinstance(values[part.name], int):
            out.append(str(values[part.name]).rjust(part.width, part.fill))
        else:
            out.append(slug(str(values[part.name])))
    return "".join(out)


def slug(text: str, limit: int = SLUG_BYTES) -> str:
    """A file name part, safe on every system: at most `limit` bytes of UTF-8, never empty.

    NFKC; control and format characters go, `/\\:*?"<>|` and runs of whitespace become "-"; no leading "." or "-", no
    trailing "." or " ", no reserved Windows name.
    """
    text = unicodedata.normalize("NFKC", text)
    text = re.sub(r"[\s/\\:*?\"<>|]+", "-", text)
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    text = re.sub(r"-{2,}", "-", text).lstrip(".-")
    text = text.encode("utf-8")[:limit].decode("utf-8", "ignore").rstrip(".- ")
    if _RESERVED.fullmatch(text):
        text = text[:limit - 1] + "_" if "." not in text else "_" + text[:limit - 1]
    return text or "untitled"


def clean_text(text: str, limit: int = PROMPT_LIMIT) -> str:
    """A prompt as it is used and stored: NFC, no control characters or broken bytes; InputError if over `limit`."""
    text = text.encode("utf-8", "surrogateescape" if not _has_plain_surrogate(text) else "replace").decode("utf-8",
                                                                                                       "replace")
    text = unicodedata.normalize("NFC", text)
    text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs")).strip()
    if len(text) > limit:
        raise InputError(f"the prompt has {len(text):,} characters, at most {limit:,} are allowed", hint="shorten it")
    return text


def _has_plain_surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" and not "\udc80" <= c <= "\udcff" for c in text)


def inside(root: str | os.PathLike, name: str) -> Path:
    """The path of `name` from an untrusted row below `root`; InputError for one that would leave it.

    Refused: absolute paths, drive letters, backslashes, "..", hidden or reserved parts, control characters, a trailing
    dot or space, parts over 255 bytes, and symbolic links that lead outside.
    """
    parts = name.split("/")
    for part in parts:
        bad = _bad_part(part)
        if bad:
            raise InputError(f"output {name!r:.200} is not allowed: {bad}", hint="a plain relative path")
    path = Path(root).joinpath(*parts)
    base = os.path.realpath(root)
    for place in (path, *path.parents[:len(parts) - 1]):
        if os.path.commonpath([base, os.path.realpath(place)]) != base:
            raise InputError(f"output {name!r:.200} is not allowed: a symbolic link leads outside", hint="remove it")
    return path


def _bad_part(part: str) -> str:
    if part in ("", ".", ".."):
        return "it is absolute, or has empty, '.' or '..' parts"
    if part[0] in ".~" or part[0] == "-":
        return "a part starts with '.', '~' or '-'"
    if re.search(r"[\\:*?\"<>|]", part):
        return "it has one of \\ : * ? \" < > |"
    if any(unicodedata.category(char) in ("Cc", "Cf", "Cs") for char in part):
        return "it has control or invisible characters"
    if part[-1] in ". ":
        return "a part ends with a dot or a space"
    if _RESERVED.fullmatch(part):
        return "it is a reserved name"
    return "a part is over 255 bytes" if len(part.encode()) > 255 else ""
