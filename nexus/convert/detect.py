"""What is this checkpoint? Reads any public file or folder as named shapes and finds the layout they follow."""

import contextlib
import difflib
import json
import math
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor

from nexus import catalog, checkpoint
from nexus.convert.layout import Layout
from nexus.convert.layouts import every_layout
from nexus.convert.plain_yaml import parse
from nexus.convert.sandbox import SUFFIXES, TEXT, unpickle
from nexus.errors import InputError, ModelError, UsageError

CONFIG_LIMIT = 10_000_000
# Where training scripts put the weights, averaged ones first: those are what papers report.
AVERAGED = ("ema", "ema_model", "model_ema", "ema_state_dict", "params_ema")
WRAPPERS = (*AVERAGED, "best_state", "state_dict", "model_state_dict", "model", "params", "net", "module",
            "_orig_mod")
LAST = "model.diffusion_model."         # the network in whole files, tried when no layout knows the names as they are
COMPONENTS = ("transformer", "unet", "prior", "vae", "vqvae")
MAX_WRAPPERS = 3
LORA = (".lora_", "lora_unet_", ".lora.")


class Stored(NamedTuple):
    """Where a tensor is: a safetensors file and its key there."""

    file: Path
    key: str
    shape: tuple[int, ...]


class Source(NamedTuple):
    """A checkpoint as named shapes.

    config: its folder's config.json; for a single file None, or what is told inside it (audiocraft: {"xp.cfg": ...}).
    """

    path: Path
    tensors: dict[str, Stored]
    config: dict | None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape."""
        return {key: stored.shape for key, stored in self.tensors.items()}


class Found(NamedTuple):
    """A checkpoint and the layout it follows; `source` has the wrappers stripped, `notes` say what was done."""

    layout: Layout
    source: Source
    notes: tuple[str, ...]


@contextlib.contextmanager
def opened(path: Path, scratch: Path | None = None) -> Iterator[list[Source]]:
    """The checkpoints at `path`: one, or one a component of a pipeline folder.

    Pickled files are copied by the sandbox to a temporary folder in `scratch`, which lives as long as the block.
    Raises ModelError when something is missing, damaged, unsafe or of an unknown kind.
    """
    if not path.exists():
        raise ModelError(f"there is no file or folder '{path}'")
    with tempfile.TemporaryDirectory(dir=scratch, prefix=".nexus-convert-") as temporary:
        if path.is_file():
            found = _read_file(path, Path(temporary))
            yield [Source(path, found, _said(found))]
        elif (path / "model_index.json").exists() and not (path / "config.json").exists():  # one of 2022 is all flat
            parts = [path / name for name in COMPONENTS if (path / name / "config.json").exists()]
            if not parts:
                raise ModelError(f"{path} is a pipeline without any of {', '.join(COMPONENTS)}")
            yield [_read_folder(part, Path(temporary)) for part in parts]
        else:
            yield [_read_folder(path, Path(temporary))]


def _read_folder(folder: Path, temporary: Path) -> Source:
    config = json_of(folder / "config.json") if (folder / "config.json").exists() else None
    if config is not None and (folder.parent / "model_index.json").exists():    # one network serves several systems
        config = config | {"_pipeline": json_of(folder.parent / "model_index.json").get("_class_name")}
    tensors: dict[str, Stored] = {}
    for prefix, file in _both_ways(folder) if config is None else ():
        tensors |= {prefix + key: at for key, at in _read_file(file, temporary).items()}
    for file in _weight_files(folder) if not tensors else ():
        tensors |= _read_file(file, temporary)
    return Source(folder, tensors, config)


def _both_ways(folder: Path) -> list[tuple[str, Path]]:
    """The generators of both ways in a folder of junyanz' training, those of the newest epoch, with what tells them."""
    pairs = [(first, first.with_name(first.name.replace("_net_G_A.", "_net_G_B."))) for first in
             sorted(folder.glob("*_net_G_A.*"), key=lambda p: _epoch(p.name)) if first.suffix in SUFFIXES]
    whole = [pair for pair in pairs if pair[1].is_file()]
    return list(zip(("A.", "B."), whole[-1], strict=True)) if whole else []


def _epoch(name: str) -> float:
    number = name.partition("_")[0]
    return int(number) if number.isdecimal() else math.inf


def index_of(folder: Path) -> Path | None:
    """The index of a folder's shards, that of full precision first: x.safetensors.index.fp16.json has less."""
    for pattern in ("*.safetensors.index*.json", "*.bin.index*.json"):
        if found := sorted(folder.glob(pattern), key=lambda p: (p.name.count("."), p.name)):
            return found[0]
    return None


def _weight_files(folder: Path) -> list[Path]:
    if index := index_of(folder):
        listed = json_of(index).get("weight_map")
        names = sorted(set(listed.values())) if isinstance(listed, dict) else []
        if not names or any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ModelError(f"{index}: its weight_map does not list files of this folder")
        return [folder / name for name in names]
    for suffix in (".safetensors", *SUFFIXES):
        found = sorted(folder.glob(f"*{suffix}"), key=lambda p: (p.name.count("."), p.name))
        # x.fp16.safetensors beside x.safetensors is the same model with less precision.
        if len(found) > 1 and found[0].name.count(".") == found[1].name.count("."):
            raise ModelError(f"{folder} holds several weight files: {', '.join(p.name for p in found[:4])}",
                             hint="give the file itself")
        if found:
            return found[:1]
    raise ModelError(f"{folder} holds no weights", hint=f"looked for .safetensors, {', '.join(SUFFIXES)}")


def _read_file(file: Path, temporary: Path) -> dict[str, Stored]:
    """What the file holds goes before what it is called, except that safetensors must really be safetensors."""
    if not file.is_file():
        raise ModelError(f"{file} is missing")
    suffix = file.suffix.lower()
    if suffix not in (".safetensors", *SUFFIXES):
        raise ModelError(f"'{file.name}' is no checkpoint that can be read",
                         hint=f"known files: .safetensors, {', '.join(SUFFIXES)}, or a folder with config.json")
    try:
        with file.open("rb") as stream:
            head = stream.read(9)
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    if head[8:] != b"{":
        if suffix == ".safetensors":
            pickled = head.startswith((b"PK", b"\x80"))
            raise ModelError(f"{file} is called .safetensors but {'is a pickle' if pickled else 'is damaged'}",
                             hint="where does it come from?" if pickled else "fetch it again")
        copy = temporary / f"{len(list(temporary.iterdir()))}.safetensors"
        unpickle(file, copy)
        file = copy
    return _shapes(file)


def _said(tensors: dict[str, Stored]) -> dict | None:
    """The configuration that a single file holds beside its weights, under its name there, or None."""
    for file in {stored.file for stored in tensors.values()}:
        with checkpoint.open_file(file) as opened_file:
            if text := (opened_file.metadata() or {}).get(TEXT):
                return {TEXT: parse(text)}
    return None


def _shapes(file: Path) -> dict[str, Stored]:
    with checkpoint.open_file(file) as opened_file:
        return {key: Stored(file, key, tuple(opened_file.get_slice(key).get_shape()))
                for key in opened_file.keys()}                      # noqa: SIM118 - it is no mapping


def json_of(path: Path) -> dict:
    """A JSON object of no absurd size; ModelError when the file holds none."""
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise ModelError(f"{path} is larger than {CONFIG_LIMIT:,} bytes, which no configuration is")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}", hint="fetch it again") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} is damaged: not a JSON object", hint="fetch it again")
    return found


def read(source: Source) -> dict[str, Tensor]:
    """Every tensor, each file opened once."""
    state = {}
    for file in sorted({stored.file for stored in source.tensors.values()}):
        with checkpoint.open_file(file) as opened_file:
            try:
                state |= {key: opened_file.get_tensor(stored.key)
                          for key, stored in source.tensors.items() if stored.file == file}
            except (SafetensorError, RuntimeError, ValueError) as error:
                raise ModelError(f"{file} is damaged: {error}", hint="fetch it again") from None
    return state


def detect(sources: list[Source], read_as: str | None = None) -> Found:
    """The layout that one of the sources follows, wrappers stripped; read_as: try those of this name alone.

    Raises ModelError saying what was tried, and UsageError for a name that no layout has.
    """
    layouts = tuple(layout for layout in every_layout() if layout.auto) if read_as is None else _named(read_as)
    for source in sources[:1]:                          # of a pipeline its network, never the codec in its place
        last = (LAST,) if any(key.startswith(LAST) for key in source.tensors) else ()
        for prefix in (*_prefixes(list(source.tensors)), *last):
            inner = Source(source.path, _below(source.tensors, prefix), source.config)
            shapes = inner.shapes
            for layout in layouts:
                if layout.matches(shapes, inner.config):
                    return Found(layout, inner, _notes(source, prefix, sources))
    raise _unknown(sources[0], layouts)


def _named(name: str) -> tuple[Layout, ...]:
    """The layouts called `name`, or SYSTEM/NAME."""
    known = every_layout()
    found = tuple(layout for layout in known if name in (layout.name, f"{layout.system}/{layout.name}"))
    if not found:
        names = dict.fromkeys(layout.name for layout in known)
        near = difflib.get_close_matches(name, [*names, *(f"{one.system}/{one.name}" for one in known)], 1)
        raise UsageError(f"there is no layout '{name}'",
                         hint=(f"did you mean '{near[0]}'? " if near else "") + "known: " + ", ".join(names))
    return found


def _prefixes(keys: list[str], prefix: str = "", depth: int = MAX_WRAPPERS) -> Iterator[str]:
    """Where the weights may be, best guess first, the top level last."""
    for name in WRAPPERS if depth else ():
        inner = f"{prefix}{name}."
        below = [key for key in keys if key.startswith(inner)]
        if below:
            yield from _prefixes(below, inner, depth - 1)
    yield prefix


def _below(tensors: dict[str, Stored], prefix: str) -> dict[str, Stored]:
    return {key.removeprefix(prefix): stored for key, stored in tensors.items() if key.startswith(prefix)}


def _notes(source: Source, prefix: str, sources: list[Source]) -> tuple[str, ...]:
    notes = []
    if (source.path.parent / "model_index.json").exists():
        others = ", ".join(other.path.name for other in sources if other is not source)
        notes.append(f"took the component {source.path.name}" + (f", not {others}" if others else ""))
    if prefix:
        averaged = any(name in AVERAGED for name in prefix.split("."))
        notes.append(f"took the {'averaged ' if averaged else ''}weights under '{prefix.rstrip('.')}'")
    ignored = {key.split(".")[0] for key in source.tensors if not key.startswith(prefix)}
    if ignored:
        notes.append(f"left alone: {', '.join(sorted(ignored)[:8])}")
    return tuple(notes)


def _unknown(source: Source, layouts: tuple[Layout, ...]) -> ModelError:
    """Which layout comes nearest, by the share of the file's keys that it knows, and what the file lacks."""
    if any(mark in key for key in source.tensors for mark in LORA):
        return ModelError(f"{source.path} is a LoRA: it changes a model, and is none itself",
                          hint="nexus sample --lora FILE, or nexus convert MODEL OUT --lora FILE")
    views = [_patterns(_below(source.tensors, prefix)) for prefix in _prefixes(list(source.tensors))]
    known = [(layout, _patterns(_known(layout))) for layout in layouts]
    share, layout, keys, wanted = max(((len(keys & wanted) / max(1, len(keys)), layout, keys, wanted)
                                       for layout, wanted in known for keys in views), key=lambda found: found[0])
    hint = "tried: " + "; ".join(
        f"{system} ({', '.join(one.name for one in layouts if one.system == system)})"
        for system in dict.fromkeys(one.system for one in layouts))
    named = f" ({source.config['_class_name']})" if source.config and "_class_name" in source.config else ""
    if share < 0.3:
        return ModelError(f"{source.path}{named} follows no known layout; it has {len(source.tensors)} tensors, "
                          f"the first is {min(source.tensors, default='none')}", hint=hint)
    return ModelError(f"{source.path}{named} is nearest to {layout.system}/{layout.name}, but {_gap(keys, wanted)}",
                      hint=hint)


def _gap(keys: set[str], wanted: set[str]) -> str:
    if missing := sorted(wanted - keys):
        return f"lacks {len(missing)} of its keys, for example {missing[0]}"
    if not (strange := sorted(keys - wanted)):
        return "the shapes differ"
    near = difflib.get_close_matches(strange[0], wanted, 1)
    return f"has {strange[0]}" + (f" where {near[0]} is known" if near else "")


def _patterns(keys: Iterable[str]) -> set[str]:
    return {re.sub(r"\d+", "*", key) for key in keys}


def _known(layout: Layout) -> list[str]:
    """The foreign key patterns of a small model of the layout's system."""
    try:
        rows = layout.table(catalog.config_class(layout.system).preset("tiny").to_json())
    except (InputError, ModelError):                    # no such preset, or not one that this layout can hold
        return []
    return [key for row in rows for key in ([row.foreign] if isinstance(row.foreign, str) else row.foreign)]
