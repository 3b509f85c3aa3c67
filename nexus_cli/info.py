"""nexus info FILE: what a picture, a sound, a film, a model file or a run folder says about itself."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from nexus.errors import InputError, ModelError, NexusError
from nexus_cli import options
from nexus_cli.media import FILM, PICTURES, SOUNDS
from nexus_cli.output import Output, strict_json

HEADER_LIMIT = 16 * 2**20


def info(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", show_default=False,
                                                help="Pictures, sounds, films, .safetensors files, models or runs.")],
    json_lines: options.Json = False,
    color: options.Color = "auto",
) -> None:
    """Show the settings stored in pictures, sounds and models. Nothing in a file is trusted or run."""
    out = Output(json_lines=json_lines, color=color)
    first: NexusError | None = None
    for path in files:
        try:
            facts = describe(path)
        except NexusError as error:
            if len(files) == 1:
                raise
            out.warn(str(error))
            first = first or error
            continue
        head = [f"{path}:"] if len(files) > 1 else []
        lines = head + [f"{key}: {_printable(value)}" for key, value in facts.items()]
        out.result("\n".join(lines), {"path": str(path), **facts})
    if first:
        raise first


def describe(path: Path) -> dict:
    """The facts that a file holds; InputError or ModelError when it cannot be read."""
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".safetensors":
        return _safetensors(path)
    film = path.suffix.lower() == FILM
    if not os.path.exists(path):        # said at once: what reads a file takes a tenth of a second to import
        noun = "sound" if SOUNDS.ends(path) else "film" if film else "picture" if PICTURES.ends(path) else \
            "file or folder"
        raise InputError(f"there is no {noun} '{path}'", hint="check the path")
    if SOUNDS.ends(path) or film:
        return _sound(path) if SOUNDS.ends(path) else _film(path)
    from nexus.images import read_image, read_record
    record = read_record(path)
    height, width, _ = read_image(path).shape
    return {"picture": f"{width}x{height}", **(record or {"settings": "none stored"})}


def _sound(path: Path) -> dict:
    from nexus import sounds
    from nexus.loudness import loudness
    array, found = sounds.heard(path)
    length = f"{found.samples / found.rate:.2f} s, {found.channels} x {found.rate} samples a second, {found.form}"
    return {"sound": length, "loudness (LUFS)": round(loudness(array, found.rate), 1),
            "peak": round(float(abs(array).max()), 4), **(sounds.read_record(path) or {"settings": "none stored"})}


def _film(path: Path) -> dict:
    from nexus import videos
    found = videos.facts(path)
    shape = f"{found.width}x{found.height}, {found.frames} frames, {found.rate:g} a second, MP4"
    return {"film": shape, **(videos.read_record(path) or {"settings": "none stored"})}


def _folder(path: Path) -> dict:
    try:
        described = json.loads(_small(path / "config.json"))
        if not isinstance(described, dict):
            raise ValueError
    except FileNotFoundError:
        raise ModelError(f"{path} is not a model or run folder: it has no config.json") from None
    except (OSError, ValueError, RecursionError):
        raise ModelError(f"{path / 'config.json'} is damaged", hint="nexus models verify") from None
    steps = sorted(folder.name for folder in path.glob("step-*") if folder.is_dir() and folder.name[5:].isdigit())
    return {**described, **({"checkpoints": steps} if steps else {})}


def _small(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(HEADER_LIMIT + 1)
    if len(data) > HEADER_LIMIT:
        raise ValueError("too large")
    return data


def _safetensors(path: Path) -> dict:
    """Metadata and counts from the header alone, with limits before anything is parsed."""
    from nexus import stored
    try:
        size = path.stat().st_size
        metadata, held = stored.header(path)
        described = dict(json.loads(metadata["nexus"]).items()) if "nexus" in metadata else {"metadata": metadata}
    except FileNotFoundError:
        raise InputError(f"there is no file '{path}'", hint="check the path") from None
    except OSError as error:
        raise InputError(f"cannot read '{path}': {error.strerror}") from None
    except (ValueError, AttributeError, RecursionError):
        raise ModelError(f"{path} is damaged or not a safetensors file") from None
    return {"bytes": size, "tensors": len(held), "dtypes": sorted({t.dtype for t in held.values()}), **described}


def _printable(value) -> str:
    """Text from a file, with nothing that could drive the terminal."""
    text = value if isinstance(value, str) else strict_json(value, sort_keys=True)
    return "".join(char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()
                   for char in text)
