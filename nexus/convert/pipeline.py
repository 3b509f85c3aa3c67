"""Whole pipelines: a network, a codec and text encoders at once, as a folder or as one file, both ways.

`convert` here is tried first by `nexus.convert.convert.convert`, and leaves to it what is not a pipeline that it knows.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nexus import catalog, checkpoint
from nexus.atomic import check_target
from nexus.config import Config
from nexus.convert import stream
from nexus.convert.convert import Report, load, native_path, scratch
from nexus.convert.detect import opened
from nexus.convert.export import Model, Target, check_kind, fill, save, write_file
from nexus.convert.layouts import musicgen_whole, pipelines, single
from nexus.convert.parts import HOME, Whole
from nexus.convert.sandbox import SUFFIXES
from nexus.errors import ModelError, UsageError
from nexus.text.folders import Place, places
from nexus.text.pretrained import PretrainedCondConfig
from nexus.text.recipes import RECIPES

LAYOUTS = ("diffusers", "original")


def convert(src: Path, target: Target, *, to: str | None, check: bool, overrides: Sequence[str]) -> Report | None:
    """As `nexus.convert.convert.convert`, or None for what is no pipeline known here."""
    path = native_path(src) if src.exists() else None
    if path is not None:
        described = checkpoint.read_description(path)
        if musicgen_whole.writable(described["system"], described["config"], to):
            return _export_music(src, path, target, check, overrides)
        name = _pipeline(described) if to in LAYOUTS else None
        known = name and (to == "diffusers" or name in single.WRITTEN)
        return _export(src, path, name, target, to, check, overrides) if known else None
    if not _known(src, overrides):
        return None
    if to not in (None, "nexus"):
        raise UsageError(f"'{src}' is a whole pipeline: --to {to} is possible from a Nexus model",
                         hint="convert it to a Nexus folder first, then that --to " + " or ".join(LAYOUTS))
    if not check:
        check_target(target.path, exists=target.exists, folder=True)
    return _import(src, target, check, overrides)


def _pipeline(described: dict) -> str | None:
    """The class of pipeline that a model was, or that it can be written as."""
    found, config = (described.get("layouts") or {}).get("pipeline"), described["config"]
    if found is None and described["system"] == "sd":
        return "StableDiffusionXLPipeline" if config["conditioner"].get("recipe") == "sdxl" \
            else "StableDiffusionPipeline"
    if found is None and config.get("path", {}).get("kind") == "instaflow":
        return "RectifiedFlowPipeline"
    return found if found in pipelines.KINDS else None


def _known(src: Path, overrides: Sequence[str]) -> bool:
    if src.is_dir():
        return pipelines.kind_of(src) is not None or musicgen_whole.known(src)
    if src.suffix.lower() in SUFFIXES:
        return single.may_be(src)
    try:
        checkpoint.check_header(src)
        with safe_open(src, "pt") as file:
            return single.kind_of(set(file.keys()), src, single.given(overrides)) is not None
    except (ModelError, SafetensorError, OSError, RuntimeError, ValueError):
        return False                                    # the ordinary conversion says what is wrong


def _import(src: Path, target: Target, check: bool, overrides: Sequence[str]) -> Report:
    folder, used = scratch(target.path, check), single.USED
    with ExitStack() as stack:
        if src.is_dir() and musicgen_whole.known(src):
            used = musicgen_whole.USED
            whole = musicgen_whole.read(src, stack, folder, list(overrides))
        elif src.is_dir():
            whole = pipelines.read(src, stack, folder, list(overrides))
        else:
            source, = stack.enter_context(opened(src, folder))
            whole = single.read(source, single.given(overrides), stack, folder)
        config = catalog.config_class(whole.system).parse(whole.config).override(
            [text for text in overrides if text.partition("=")[0].strip() not in used])
        problems = whole.problems + tuple(
            f"{piece.part}: {line}" for piece in whole.pieces for line in piece.problems())
        count = sum(len(piece.source.tensors) for piece in whole.pieces)
        report = Report(src, None, whole.system, f"{whole.system}/{whole.layout}", config.to_json(), count, 0,
                        whole.dropped, whole.assumed, whole.notes, problems)
        if report.refused(check):
            return report
        state = {key: lazy for piece in whole.pieces for key, lazy in piece.native().items()}
        report = report._replace(parameters=stream.numbers(state.values()))
        if check:
            stream.visit(state)
            return report
        return _saved(whole, config, state, target, report)


def _saved(whole: Whole, config: Config, state: dict, target: Target, report: Report) -> Report:
    save(target, Model(whole.system, config.to_json(), state), facts={"layouts": whole.facts}, files=whole.files)
    return report._replace(written=target.path)


def _export(src: Path, path: Path, name: str, target: Target, to: str, check: bool, overrides: Sequence[str]) -> Report:
    _check_told(overrides)
    folder = to == "diffusers"
    if not check:
        check_kind(target, to, folder)
    model = load(path)
    config = catalog.config_class(model.system).parse(model.config)
    base = path if path.is_dir() else path.parent
    facts = checkpoint.read_description(path).get("layouts") or {}
    report = Report(src, None, model.system, f"{model.system}/{to}", model.config, len(model.state),
                    stream.numbers(model.state.values()))
    with ExitStack() as stack:
        if folder:
            encoders = _encoders(config, pipelines.KINDS[name], base)
            files = pipelines.write(name, config, model.state, encoders, facts, base / HOME, target, stack)
            if check:
                return report
            fill(target, files)
        else:
            needed = single.WRITTEN[name].encoders and facts.get("words", True)     # as the file was that was read
            encoders = _encoders(config, pipelines.KINDS[name], base) if needed else []
            made = single.write(name, config, model.state, encoders, facts, base, target, stack)
            if check:
                return report
            for file, tensors in made.items():
                write_file(target._replace(path=file), tensors)
    return report._replace(written=target.path)


def _check_told(overrides: Sequence[str]) -> None:
    if overrides:
        raise UsageError("--set is for settings a foreign checkpoint does not tell; this one tells all of them")


def _export_music(src: Path, path: Path, target: Target, check: bool, overrides: Sequence[str]) -> Report:
    _check_told(overrides)
    if not check:
        check_kind(target, "transformers", True)
    model, base = load(path), path if path.is_dir() else path.parent
    config = catalog.config_class(model.system).parse(model.config)
    facts = checkpoint.read_description(path).get("layouts") or {}
    report = Report(src, None, model.system, f"{model.system}/transformers", model.config, len(model.state),
                    stream.numbers(model.state.values()))
    with ExitStack() as stack:
        files = musicgen_whole.write(config, model.state, facts, base, target, stack)
        if check:
            return report
        fill(target, files)
    return report._replace(written=target.path)


def _encoders(config: Config, kind: pipelines.Kind, base: Path) -> list[Place | None]:
    """The text encoders' folders, None for one that is not there; ModelError for words that no public layout has."""
    words, codec = config.conditioner, config.codec
    if kind.recipe and not isinstance(words, PretrainedCondConfig) or kind.codec and (codec is None or codec.weights):
        raise ModelError("public layouts hold pretrained text encoders and the codec's own weights",
                         hint="only a model with both can be written")
    if not kind.recipe:
        return []
    recipe = RECIPES[words.recipe]
    return places(words.encoders, len(recipe.kinds), base, optional=recipe.optional)
