"""A Nexus model in a public layout: which layouts can hold it, its foreign tensors, and what they leave out."""

import json
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from nexus import catalog, checkpoint
from nexus.atomic import check_target, staged_dir
from nexus.config import Config
from nexus.convert import stream
from nexus.convert.keymap import to_foreign
from nexus.convert.layout import Layout
from nexus.convert.layouts import every_layout
from nexus.convert.pieces import foreign
from nexus.convert.stream import Lazy, Payload, Tensors
from nexus.errors import InputError, ModelError, UsageError
from nexus.nn.outline import outlining

SINGLE_FILES = (".safetensors", ".pt")
FORMAT = {"format": "pt"}                               # transformers and diffusers refuse a file without it


class Model(NamedTuple):
    """A native model, its tensors still on disk."""

    system: str
    config: dict
    state: dict[str, Lazy]


class Target(NamedTuple):
    """Where to write. exists: "error" or "overwrite". shard: bytes of a file above which weights are split."""

    path: Path
    exists: str = "error"
    shard: int = stream.SHARD


def entry(data: dict, name: str) -> tuple[dict, str]:
    """The section of a dotted setting, and its last name."""
    *sections, last = name.split(".")
    return reduce(dict.__getitem__, sections, data), last


def layouts_of(system: str, config: Config) -> list[Layout]:
    """The layouts that can hold a system's network: its own, then other systems', in the catalog's order."""
    own, others = [], []
    for layout in every_layout():
        (own if layout.system == system else others).append(layout)
    ranked = sorted(others, key=lambda layout: list(catalog.CATALOG).index(layout.system))
    with outlining():
        state = config.build().net.state_dict()
    return own + [layout for layout in ranked if layout.part == "net" and _fits(layout, config, state)]


def _fits(layout: Layout, config: Config, state: dict[str, Tensor]) -> bool:
    """Whether another system's layout is of this class of network, and has a row for each of its tensors."""
    field = catalog.config_class(layout.system).model_fields["net"]
    if type(config.net) not in _classes(field.annotation):
        return False
    try:
        return bool(to_foreign(layout.table(config.to_json()), state))
    except (ModelError, InputError):                    # how a layout says that this network is not one of its kind
        return False


def _classes(annotation) -> set[type]:
    """A type, or the types of a union."""
    inner = get_args(annotation)
    return set().union(*map(_classes, inner)) if inner else {annotation}


def layout_names(path: Path) -> str:
    """What --to can be for the model at `path`."""
    described = checkpoint.read_description(path)
    system = described["system"]
    return _choice(system, layouts_of(system, catalog.config_class(system).parse(described["config"])))


def _choice(system: str, known: list[Layout]) -> str:
    """Own layouts by their names; of others the first system's of each name, as SYSTEM/NAME."""
    names: dict[str, str] = {}
    for layout in known:
        names.setdefault(layout.name, layout.name if layout.system == system else f"{layout.system}/{layout.name}")
    return "--to one of: " + ", ".join(names.values()) if names else f"no public layout holds the network of '{system}'"


def wanted_layout(model: Model, to: str) -> Layout:
    """The layout called `to`; another system's has to be called by both names, as the network alone goes into it.

    UsageError when there is none, or when only another system's has this name.
    """
    for layout in every_layout():
        if layout.system == model.system and to in (layout.name, f"{layout.system}/{layout.name}"):
            return layout
    config = catalog.config_class(model.system).parse(model.config)
    known = layouts_of(model.system, config)
    for layout in known:
        full = f"{layout.system}/{layout.name}"
        if to == full:
            return layout
        if to == layout.name:
            raise UsageError(f"'{model.system}' has no layout '{to}': {full} can hold its network, but "
                             f"{_otherwise(model.system, config, layout)}",
                             hint=f"--to {full} writes the network alone, for a reader of your own")
    raise UsageError(f"'{model.system}' has no layout '{to}'", hint=_choice(model.system, known))


def _otherwise(system: str, config: Config, layout: Layout) -> str:
    """Why a reader of another system's layout would make noise of this network."""
    ours = getattr(config, "prediction", None)
    field = catalog.config_class(layout.system).model_fields.get("prediction")
    if field is None or ours in (None, field.default):
        return f"whoever reads it samples as a '{layout.system}' does, not as a '{system}'"
    return f"whoever reads it takes for {field.default} what this one predicts as {ours}"


class Exported(NamedTuple):
    """A foreign state, its folder's config.json (None for a single file), and notes about what they leave out."""

    state: dict[str, Lazy]
    described: dict | None
    notes: tuple[str, ...]


def export(model: Model, layout: Layout) -> Exported:
    """A native model in a layout; ModelError when the layout cannot hold its network."""
    config = catalog.config_class(model.system).parse(model.config).to_json()
    prefix = f"{layout.part}."
    described = layout.foreign_config and layout.foreign_config(config)     # refuses what the layout cannot say
    state = foreign(model.state, layout.part, layout, config)
    parts = sorted({key.split(".")[0] for key in model.state if not key.startswith(prefix)})
    lost = _lost(config, layout, {key: lazy.shape for key, lazy in state.items()}, described)
    notes = [f"left out, the layout has no place for it: {', '.join(parts)}"] if parts else []
    return Exported(state, described, (*notes, *([f"not carried: {', '.join(lost)}"] if lost else ())))


def _lost(config: dict, layout: Layout, shapes: dict[str, tuple], described: dict | None) -> list[str]:
    """The settings that would be others if what was written were read again, as dotted names."""
    back, unsaid = layout.config(shapes, described), layout.unsaid(shapes, described)
    asked = []                                          # what a reader would have to be told
    for name in unsaid:
        (node, last), (ours, _) = entry(back, name), entry(config, name)
        if (ours.get(last) or None) != (node.get(last) or None):        # no width and a width of 0 are the same
            asked.append(name)
        if last in ours:
            node[last] = ours[last]
    read = catalog.config_class(layout.system).parse(back).to_json()
    # The rest of the network is the layout's business: it holds it, in its own words, or refuses to be written.
    outside = {key: value for key, value in config.items() if key != layout.part}
    fixed = {name for name in layout.fixed if _said(config, name) != _said(read, name)}
    return sorted({*asked, *fixed, *_differing(outside, read)})


def _said(config: dict, name: str) -> Any:
    node, last = entry(config, name)
    return node.get(last)


def _differing(ours: dict, theirs: dict, at: str = "") -> Iterator[str]:
    for key, value in ours.items():
        other = theirs.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and value.get("kind") == other.get("kind"):
            yield from _differing(value, other, f"{at}{key}.")
        elif value != other:
            yield at + key


def write(model: Model, layout: Layout | None, target: Target) -> tuple[str, ...]:
    """Write a model in a layout, None = as a Nexus folder; returns notes of what was left out."""
    if layout is None:
        save(target, model)
        return ()
    folder = layout.foreign_config is not None
    check_kind(target, layout.name, folder)
    made = export(model, layout)
    if folder:
        name = layout.file.removesuffix(".safetensors")
        fill(target, {"config.json": as_json(made.described), **weights(name, made.state, target)})
    else:
        write_file(target, made.state)
    return made.notes


def check_kind(target: Target, name: str, folder: bool) -> None:
    """UsageError for a file's name for a folder, or the reverse; OutputError for a place that cannot be written."""
    if folder == (target.path.suffix in SINGLE_FILES):
        kind = "a folder" if folder else f"one file, {' or '.join(SINGLE_FILES)}"
        raise UsageError(f"'{target.path}': the layout {name} is {kind}", hint="choose another name")
    check_target(target.path, exists=target.exists, folder=folder)


def check_file(target: Target, what: str) -> None:
    """UsageError where `what`, which is one .safetensors file, is given another name; OutputError as check_kind."""
    if target.path.suffix != ".safetensors":
        raise UsageError(f"'{target.path}': {what} are one .safetensors file", hint="choose another name")
    check_target(target.path, exists=target.exists)


def save(target: Target, model: Model, *, facts: dict | None = None,
         files: Mapping[str, Payload] | None = None) -> None:
    """Write a Nexus folder, with other files in it; facts: what the way back needs to know."""
    check_target(target.path, exists=target.exists, folder=True)
    checkpoint.save_model(
        target.path, model.system, model.config, facts=facts, exists=target.exists, extra=stream.writers(files or {}),
        state=lambda said: stream.weights("model", model.state, {"nexus": json.dumps(said, sort_keys=True)},
                                          limit=target.shard, finite=True))


def fill(target: Target, files: Mapping[str, Payload]) -> None:
    """Write a folder of these files."""
    with staged_dir(target.path, exists=target.exists) as temporary:
        stream.fill(temporary, files)


def weights(name: str, tensors: Tensors, target: Target) -> dict[str, Payload]:
    """The files of a public folder's weights, split where they are large."""
    return stream.weights(name, tensors, FORMAT, limit=target.shard)


def write_file(target: Target, tensors: Tensors) -> None:
    """Write a .safetensors or .pt file; the latter is made in memory, as PyTorch makes it."""
    if target.path.suffix == ".safetensors":
        data = partial(stream.write_tensors, tensors=tensors, metadata=FORMAT)
    else:
        # A fused tensor is split into views of one storage; in a file each is on its own.
        state = {k: t.clone(memory_format=torch.contiguous_format) for k, t in stream.made(tensors).items()}
        data = partial(torch.save, state)
    stream.put(target.path, data, exists=target.exists)


def as_json(data: dict) -> bytes:
    """A configuration as transformers and diffusers write theirs."""
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()
