"""`nexus convert`: public checkpoints to Nexus models and back. Every key is used exactly once, or named."""

import difflib
import fnmatch
import io
import json
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from nexus import catalog, checkpoint
from nexus.atomic import check_target, staged_dir, write_bytes
from nexus.config import Config
from nexus.convert.detect import Found, Source, detect, opened, read
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layout import Layout
from nexus.convert.layouts import every_layout
from nexus.errors import ModelError, UsageError

SINGLE_FILES = (".safetensors", ".pt")


class Report(NamedTuple):
    """What a conversion found and did. written is None for a check; problems are one line each, empty when all fits.

    layout: the one read or written, as system/name. dropped: keys that carry no information. assumed: settings that
    the checkpoint does not tell, with the value taken. config: the native configuration. tensors, parameters: counts.
    """

    source: Path
    written: Path | None
    system: str
    layout: str
    config: dict
    tensors: int
    parameters: int
    dropped: tuple[str, ...] = ()
    assumed: dict[str, object] = {}                     # noqa: RUF012 - never changed
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


class Model(NamedTuple):
    """A native model in memory."""

    system: str
    config: dict
    state: dict[str, Tensor]


def convert(src: Path, dst: Path, *, to: str | None = None, check: bool = False, overrides: Sequence[str] = (),
            exists: str = "error") -> Report:
    """Convert `src` to `dst`: a foreign checkpoint to a Nexus folder, or with `to` to the layout of that name.

    check: read and compare everything, write nothing, and list the problems instead of raising the first one.
    overrides: KEY=VALUE settings that the checkpoint does not tell. exists: "error" or "overwrite".
    Raises ModelError (bad source), UsageError (bad `to`, name or override) and OutputError (bad `dst`).
    """
    if not check and to in (None, "nexus"):
        check_target(dst, exists=exists, folder=True)   # before the work, not after
    native = _native_path(src)
    if native and (not to or to == "nexus"):
        raise UsageError(f"'{src}' is a Nexus model already", hint=_layout_names(native))
    if native and overrides:
        raise UsageError("--set is for settings a foreign checkpoint does not tell; this one tells all of them")
    if native:
        model = _load(native)
        report = Report(src, None, model.system, "", model.config, len(model.state), _count(model.state))
    else:
        report, model = _import(src, _scratch(dst, check), check, overrides)
    if model is None:
        return report
    layout = _wanted(model.system, to) if to and to != "nexus" else None
    if layout:
        report = report._replace(layout=f"{model.system}/{layout.name}")
    if check:
        return report if layout is None else report._replace(notes=(*report.notes, *_export(model, layout)[1]))
    notes = _write(model, layout, dst, exists)
    return report._replace(written=dst, notes=(*report.notes, *notes))


def _scratch(dst: Path, check: bool) -> Path | None:
    """A place on the target's disk, which must have room for the model anyway."""
    return None if check else next((p for p in dst.absolute().parents if p.is_dir()), None)


def _count(state: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in state.values())


def _native_path(src: Path) -> Path | None:
    """The folder or file of a Nexus model, or None for a foreign checkpoint."""
    if not src.exists():
        return checkpoint.find(str(src))
    if src.is_file():
        return src if src.suffix == ".safetensors" and _describes_itself(src) else None
    folder = next((p.parent for p in (src / "config.json", *sorted(src.glob("step-*/config.json"))) if p.exists()), src)
    return checkpoint.find(str(src)) if _describes_itself(folder) else None


def _describes_itself(path: Path) -> bool:
    try:
        checkpoint.read_description(path)
    except ModelError:                                  # foreign or damaged: reading it as foreign tells which
        return False
    return True


def _load(path: Path) -> Model:
    """The averaged weights where there are any, as sampling takes them."""
    described = checkpoint.read_description(path)
    state = checkpoint.read_tensors(path if path.is_file() else path / "model.safetensors")
    if path.is_dir() and (path / "ema.safetensors").exists():
        state |= checkpoint.read_tensors(path / "ema.safetensors")
    return Model(described["system"], described["config"], state)


def _import(src: Path, scratch: Path | None, check: bool, overrides: Sequence[str]) -> tuple[Report, Model | None]:
    with opened(src, scratch) as sources:
        found = detect(sources)
        layout, source = found.layout, found.source
        config, assumed = _settle(found, overrides)
        data, built = config.to_json(), _built(layout, config)
        expected = to_foreign(layout.table(data), built, copies=layout.copies(data))
        wanted = {key: tuple(tensor.shape) for key, tensor in expected.items()}
        dropped = tuple(key for key in sorted(source.tensors.keys() - wanted.keys())
                        if any(fnmatch.fnmatch(key, pattern) for pattern in layout.drop))
        problems = _compare(source, wanted, dropped, layout.constants(data))
        report = Report(src, None, layout.system, f"{layout.system}/{layout.name}", data, len(source.tensors),
                        0, dropped, assumed, found.notes, problems)
        if problems and check:
            return report, None
        if problems:
            raise ModelError(f"{src}: {problems[0]}" + (f" ({len(problems)} problems)" if problems[1:] else ""),
                             hint="nexus convert --check lists them all")
        state = read(source._replace(tensors={k: v for k, v in source.tensors.items() if k not in dropped}))
        state = _without_constants(state, layout.constants(data))
        native = to_native(layout.table(data), state)
        _check_shapes(src, native, built)
        named = {f"{layout.part}.{key}": tensor for key, tensor in native.items()}
        return report._replace(parameters=_count(named)), Model(layout.system, data, named)


def _settle(found: Found, overrides: Sequence[str]) -> tuple[Config, dict[str, object]]:
    """The native configuration, and which settings of it were assumed."""
    layout, source = found.layout, found.source
    data, assumed = layout.config(source.shapes, source.config), {}
    given = {name.strip(): value for name, _, value in (text.partition("=") for text in overrides)}
    unsaid = layout.unsaid(source.shapes, source.config)
    for name in unsaid:
        *sections, last = name.split(".")
        node = reduce(dict.__getitem__, sections, data)
        if name in given:
            node[last] = given[name]
        elif last in node and node[last] is None and not given.keys() & set(unsaid):
            raise ModelError(f"{source.path} does not tell {name}, and its width is not a published one",
                             hint=f"give it with --set {name}=VALUE")
        elif node.get(last) is not None:
            assumed[name] = node[last]
    return catalog.config_class(layout.system).parse(data).override(list(overrides)), assumed


def _built(layout: Layout, config: Config) -> dict[str, Tensor]:
    """The native tensors of the layout's part, on the meta device."""
    with torch.device("meta"):
        return config.build().get_submodule(layout.part).state_dict()


def _check_shapes(src: Path, native: dict[str, Tensor], built: dict[str, Tensor]) -> None:
    for key, tensor in native.items():
        if tensor.shape != built[key].shape:
            raise ModelError(f"{src}: {key} would be {list(tensor.shape)}, {list(built[key].shape)} expected",
                             hint="a linear layer in place of a convolution, or the reverse")


def _compare(source: Source, wanted: dict[str, tuple], dropped: tuple[str, ...], constants) -> tuple[str, ...]:
    shapes = {k: s for k, s in source.shapes.items() if k not in dropped and k not in constants}
    missing, surplus = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    return (
        *(f"{key} is missing{_near(key, surplus)}" for key in missing),
        *(f"{key} has no place in this layout{_near(key, missing or wanted)}" for key in surplus),
        *(f"{key} is {list(shapes[key])}, {list(wanted[key])} expected" for key in sorted(wanted.keys() & shapes.keys())
          if _core(shapes[key]) != _core(wanted[key])))


def _near(key: str, known) -> str:
    near = difflib.get_close_matches(key, list(known), 1, cutoff=0.7)
    return f"; the nearest key is {near[0]}" if near else ""


def _core(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution and a linear layer are the same map, and checkpoints of one layout hold either."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _without_constants(state: dict[str, Tensor], constants: dict[str, Tensor]) -> dict[str, Tensor]:
    for key, constant in constants.items():
        if key in state:
            near = 1e-4 if state[key].dtype == torch.float32 else 1e-2
            if state[key].shape != constant.shape or (state[key].float() - constant).abs().max() > near:
                raise ModelError(f"{key} is not the fixed table that this layout has",
                                 hint="its size or its formula is another; a learned one cannot be converted")
    return {key: tensor for key, tensor in state.items() if key not in constants}


def _layout_names(path: Path) -> str:
    system = checkpoint.read_description(path)["system"]
    names = ", ".join(dict.fromkeys(layout.name for layout in every_layout() if layout.system == system))
    return f"--to one of: {names}" if names else f"no public layout of '{system}' is known"


def _wanted(system: str, to: str) -> Layout:
    known = [layout for layout in every_layout() if layout.system == system]
    for layout in known:
        if layout.name == to:
            return layout
    names = ", ".join(layout.name for layout in known)
    raise UsageError(f"'{system}' has no layout '{to}'", hint=f"--to one of: {names or 'none is known'}, or nexus")


def _export(model: Model, layout: Layout) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The foreign state of a native model, and notes about what it leaves out."""
    config = catalog.config_class(model.system).parse(model.config).to_json()
    prefix = f"{layout.part}."
    inner = {key.removeprefix(prefix): t for key, t in model.state.items() if key.startswith(prefix)}
    constants = layout.constants(config)                # refuses what the layout cannot say, before any work
    state = to_foreign(layout.table(config), inner, copies=layout.copies(config))
    dtype = next(iter(state.values())).dtype
    state |= {key: tensor.to(dtype) for key, tensor in constants.items()}
    left = sorted({key.split(".")[0] for key in model.state if not key.startswith(prefix)})
    return state, (f"left out, the layout has no place for it: {', '.join(left)}",) if left else ()


def _write(model: Model, layout: Layout | None, dst: Path, exists: str) -> tuple[str, ...]:
    if layout is None:
        check_target(dst, exists=exists, folder=True)
        checkpoint.save_model(dst, model.system, model.config, model.state, exists=exists)
        return ()
    folder = layout.foreign_config is not None
    if folder == (dst.suffix in SINGLE_FILES):
        kind = "a folder" if folder else f"one file, {' or '.join(SINGLE_FILES)}"
        raise UsageError(f"'{dst}': the layout {layout.name} is {kind}", hint="choose another name")
    check_target(dst, exists=exists, folder=folder)
    described = layout.foreign_config and layout.foreign_config(
        catalog.config_class(model.system).parse(model.config).to_json())
    state, notes = _export(model, layout)
    if not folder:
        write_bytes(dst, _file_bytes(state, dst.suffix), exists=exists)
        return notes
    with staged_dir(dst, exists=exists) as temporary:
        write_bytes(temporary / "config.json", (json.dumps(described, indent=2, sort_keys=True) + "\n").encode())
        write_bytes(temporary / layout.file, _file_bytes(state, ".safetensors"))
    return notes


def _file_bytes(state: dict[str, Tensor], suffix: str) -> bytes:
    # A fused tensor was split into views of one storage; in a file each is on its own.
    state = {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in state.items()}
    if suffix == ".safetensors":
        return to_bytes(state, {"format": "pt"})        # transformers and diffusers refuse a file without it
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
