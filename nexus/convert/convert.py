"""`nexus convert`: public checkpoints to Nexus models and back. Every key is used exactly once, or named."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from nexus import catalog, checkpoint
from nexus.atomic import check_target
from nexus.config import Config
from nexus.convert import stream
from nexus.convert.detect import Found, detect, opened
from nexus.convert.export import Model, Target, entry, export, layout_names, wanted_layout, write
from nexus.convert.layout import native_config
from nexus.convert.pieces import Piece, built
from nexus.errors import InputError, ModelError, OutputError, UsageError

OF_MODELS = ("config.json", "model_index.json", "manifest.json", "adapter_config.json")     # a model's folder has one


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

    def refused(self, check: bool) -> bool:
        """Whether to stop here: problems are for a check to list, and are a ModelError otherwise."""
        if self.problems and not check:
            count = len(self.problems)
            raise ModelError(f"{self.source}: {self.problems[0]}" + (f" ({count} problems)" if count > 1 else ""),
                             hint="nexus convert --check lists them all")
        return bool(self.problems)


def convert(src: Path, dst: Path, *, to: str | None = None, read_as: str | None = None, check: bool = False,
            overrides: Sequence[str] = (), exists: str = "error", shard: int = stream.SHARD) -> Report:
    """Convert `src` to `dst`: a foreign checkpoint to a Nexus folder, or with `to` to the layout of that name.

    src: a path, or the name of an embedded model. read_as: the layout that src follows, where its keys alone do not
    tell. Layouts are called NAME or SYSTEM/NAME; `to` "lpips" makes the file of that distance of a public VGG16, and
    "efficientnet" that of the features of projected GANs. check: read and compare everything, write nothing, and list
    the problems instead of raising the first one. overrides: KEY=VALUE settings that the checkpoint does not tell.
    exists: "error" or "overwrite". shard: bytes above which a folder's weights are split into several files.
    Raises ModelError (bad source), UsageError (bad `to`, name or override) and OutputError (bad `dst`).
    """
    from nexus.convert import efficientnet, lpips, pipeline  # they stand on what this file has
    target = Target(dst, exists, shard)
    if not check:
        check_places(src, dst, exists)
    for one in (lpips, efficientnet):                   # networks that others look through, each one file
        if to == one.NAME:
            return one.convert(src, target, check=check, overrides=overrides)
    if not read_as and (whole := pipeline.convert(src, target, to=to, check=check, overrides=overrides)):
        return whole
    if not check and to in (None, "nexus"):
        check_target(dst, exists=exists, folder=True)   # before the work, not after
    path = native_path(src)
    with ExitStack() as stack:                          # pickled weights are copied for as long as it is open
        if path:
            _check_native(src, path, to, read_as, overrides)
            model = load(path)
            report = Report(src, None, model.system, "", model.config, len(model.state),
                            stream.numbers(model.state.values()))
        else:
            report, model = _import(src, stack, scratch(dst, check), check, overrides, read_as)
        if model is None:
            return report
        layout = wanted_layout(model, to) if to and to != "nexus" else None
        if layout:
            report = report._replace(layout=f"{layout.system}/{layout.name}")
        if check:
            stream.visit(model.state)
            return report if layout is None else report._replace(notes=(*report.notes, *export(model, layout).notes))
        notes = write(model, layout, target)
    return report._replace(written=dst, notes=(*report.notes, *notes))


def check_places(src: Path, dst: Path, exists: str) -> None:
    """UsageError for a DST that is or holds SRC, OutputError for a folder that is no model's: all would be lost."""
    if dst.resolve() in (Path.cwd(), Path(dst.anchor or "/")):
        raise UsageError(f"'{dst}' cannot be replaced as a whole", hint="name a folder of its own for DST")
    if src.exists() and (src.resolve() == dst.resolve() or dst.resolve() in src.resolve().parents):
        raise UsageError(f"'{dst}' is or holds what is converted, '{src}'", hint="name another DST")
    ours = not dst.is_dir() or not any(dst.iterdir()) or any((dst / name).exists() for name in OF_MODELS)
    if exists == "overwrite" and not ours:
        raise OutputError(f"'{dst}' is a folder that holds no model: all in it would be lost",
                          hint="name another DST, or empty it yourself")


def _check_native(src: Path, native: Path, to: str | None, read_as: str | None, overrides: Sequence[str]) -> None:
    """UsageError for what has no meaning when a Nexus model is converted."""
    if not to or to == "nexus":
        raise UsageError(f"'{src}' is a Nexus model already: name the layout that it is to be written in",
                         hint=layout_names(native))
    if read_as:
        raise UsageError(f"--from is for foreign checkpoints, and '{src}' is a Nexus model", hint="leave --from out")
    if overrides:
        raise UsageError("--set is for settings a foreign checkpoint does not tell; this one tells all of them",
                         hint="leave --set out")


def scratch(dst: Path, check: bool) -> Path | None:
    """A place on the target's disk, which must have room for the model anyway."""
    return None if check else next((p for p in dst.absolute().parents if p.is_dir()), None)


def native_path(src: Path) -> Path | None:
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


def load(path: Path) -> Model:
    """The averaged weights where there are any, as sampling takes them; still on disk."""
    described = checkpoint.read_description(path)
    found = checkpoint.find_weights(path, checkpoint.skeleton(path))
    return Model(described["system"], described["config"], stream.stored({key: (at, key) for key, at in found.items()}))


def _import(src: Path, stack: ExitStack, folder: Path | None, check: bool, overrides: Sequence[str],
            read_as: str | None) -> tuple[Report, Model | None]:
    found = detect(stack.enter_context(opened(src, folder)), read_as)
    layout = found.layout
    config, assumed = settle(found, overrides)
    data = config.to_json()
    piece = Piece(layout.part, built(config, layout.part), layout, data, found.source)
    report = Report(src, None, layout.system, f"{layout.system}/{layout.name}", data, len(found.source.tensors),
                    0, piece.dropped(), assumed, found.notes, piece.problems())
    if report.refused(check):
        return report, None
    state = piece.native()
    return report._replace(parameters=stream.numbers(state.values())), Model(layout.system, data, state)


def settle(found: Found, overrides: Sequence[str]) -> tuple[Config, dict[str, object]]:
    """The native configuration, and which settings of it were assumed."""
    layout, source = found.layout, found.source
    data, assumed = native_config(layout, source.shapes, source.config, source.path), {}
    given = {name.strip(): value for name, _, value in (text.partition("=") for text in overrides)}
    unsaid = layout.unsaid(source.shapes, source.config)
    # Of settings that say the same in two ways (heads, or the width of one), the file's user gives either.
    ways = {name for name in unsaid if entry(data, name)[0].get(entry(data, name)[1]) is None}
    for name in unsaid:
        node, last = entry(data, name)
        if name in given:
            node[last] = given[name]
        elif last in node and node[last] is None and not given.keys() & ways:
            raise ModelError(f"{source.path} does not tell {name}, and its width is not a published one",
                             hint=f"give it with --set {name}=VALUE")
        elif node.get(last) is not None:
            assumed[name] = node[last]
    try:
        config = catalog.config_class(layout.system).parse(data)
    except InputError as error:
        if given:
            raise
        raise ModelError(f"{source.path} is of a kind that this network has not: {error}", hint=error.hint) from None
    return config.override(list(overrides)), assumed

