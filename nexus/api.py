"""The Python interface: what the command line does, as functions."""

import contextlib
import json
import math
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nexus import __version__, catalog, checkpoint, turns
from nexus.errors import DeviceError, InputError, ModelError, UsageError, is_full
from nexus.media import Media, to_uint8
from nexus.requests import OWN, SampleRequest, check_companions, refuse
from nexus.stored import default_model

__all__ = ["Item", "check", "evaluate", "load", "model_info", "models", "outline", "sample", "to_uint8", "train",
           "verify"]

models = catalog.listing


def load(name: str, *, offload: bool = False, tile: str = "auto", **settings) -> torch.nn.Module:
    """A ready system from a path or zoo name; settings: of `checkpoint.load` (device, dtype, system, student).

    offload: its text encoders, network and codec take turns in memory. tile: "on", "off" or "auto" (pictures above
    768x768 pixels): the codec works in stripes, which gives the same picture with less memory.
    """
    system = (turns.load if offload else checkpoint.load)(name, **settings)
    for part in system.modules():
        if hasattr(part, "tile"):
            part.tile = tile
    return system


def outline(name: str, *, system: str | None = None, student: bool = False, whole: bool = False) -> torch.nn.Module:
    """The system that `load` would give, without weights (on the meta device), as `check` needs it.

    whole: its files, and those of its parts, are compared with their manifests and with what it needs. Raises
    ModelError for a model that is not there, is another system's, describes nothing that can be built, or is damaged.
    """
    path, described = checkpoint.recognised(name, system=system, student=student)
    outlined = checkpoint.skeleton(path, described)
    if whole and not described.get("lora"):
        checkpoint.check_files(path, outlined)
    return outlined


def check(system: torch.nn.Module, request: SampleRequest) -> None:
    """UsageError or InputError for what `sample` would refuse, as far as that shows without weights; see `outline`."""
    _check_own(system, request)
    if request.control and hasattr(system, "backbone"):
        raise UsageError("this model has a ControlNet of its own", hint="leave --control out")
    if request.guide_model is not None and not hasattr(system, "check_guide"):
        raise UsageError("--guide-model: this system takes no model to guide it", hint="diffusion systems do")
    system.check(request)
    config = getattr(system, "config", None)
    if getattr(config, "codec", True) is None and getattr(config, "latent_shape", (3,))[0] not in (1, 3):
        raise ModelError(f"this model makes latents of {config.latent_shape[0]} channels and has no codec to show them",
                         hint="convert it with its codec, such as --set codec.weights=MODEL, or use it from Python")
    if next(system.parameters()).is_meta:               # a loaded system meets its companions as it is dressed
        _check_companion_files(system, request)


def _check_companion_files(system: torch.nn.Module, request: SampleRequest) -> None:
    """The error that other models and files that a request names would end its run with, their own weights aside."""
    if request.control:
        from nexus.process.control import check_control
        check_control(system, getattr(outline(request.control), "net", None))
    if request.guide_model is not None:
        system.check_guide(request, outline(request.guide_model))
    if request.lora:
        from nexus.convert.lora import read_files
        read_files(system, request.lora)
    if request.embedding:
        from nexus.convert.words import taught
        with taught(system, request.embedding):
            pass


def train(system: str, *, progress: Callable[[dict], Any] | bool = False, **settings) -> dict:
    """`nexus.train.start.train`, imported when it is used; progress: a callback, or True for a bar on stderr."""
    from nexus.train.start import train as training
    with _bar(progress, "step") as update:
        seen = update if callable(progress) else lambda row: update(*_counted(row))
        return training(system, **({} if update is None else {"progress": seen}), **settings)


def _counted(row: dict) -> tuple[int | None, int | None]:
    """(done, total) of what a training loop reports."""
    return (row["encoded"], row["of"]) if "encoded" in row else (row.get("step"), row.get("steps"))


def evaluate(what: str, *, progress: Callable[[int, int], Any] | bool = False, **settings) -> dict:
    """`nexus.evaluate.run.evaluate`, imported when it is used; progress: a callback, or True for a bar on stderr."""
    from nexus.evaluate.run import evaluate as evaluating
    with _bar(progress, "picture") as update:
        return evaluating(what, progress=update, **settings)


@contextlib.contextmanager
def _bar(progress: Callable | bool | None, unit: str) -> Iterator[Callable[..., Any] | None]:
    """The caller's own callback, None, or for True an update(done, total) that moves a tqdm bar."""
    if progress is not True:
        yield progress or None
        return
    from tqdm import tqdm
    with tqdm(unit=unit) as bar:
        def update(done: int | None, total: int | None) -> None:
            if done is not None:
                if total != bar.total or done < bar.n:      # another stage of the work has begun
                    bar.reset(total)
                bar.update(done - bar.n)
        yield update


class Item(NamedTuple):
    """One finished thing, and the record that goes into its file.

    data: of kind "image" uint8 [H, W, C], of a walk [K, H, W, C]; of kind "audio" float32 [C, T], `rate` a second.
    """

    seed: int
    data: np.ndarray
    record: dict
    kind: str = "image"
    rate: int = 0

    @property
    def image(self) -> np.ndarray:
        """A picture's data."""
        return self.data


def sample(system: str | torch.nn.Module, request: SampleRequest, *, seeds: list[int], batch_size: int = 8,
           device: str = "auto", dtype: str = "auto", model: str | None = None,
           progress: Callable[[int, int], Any] | bool = False, preview: Callable[[Media], Any] | None = None,
           preview_every: int = 1, offload: bool = False, tile: str = "auto") -> Iterator[Item]:
    """Pictures or sounds as they are made, one a seed; item i is the same whatever the batch size.

    system: a catalog name (with `model`, or its embedded checkpoint; offload and tile as of `load`) or a loaded system.
    On the CPU pictures are made one at a time, whatever batch_size says: kernels round by the shape of a batch, and a
    picture's bytes would follow (docs/design.md has what it costs). progress(done, total) counts sampling steps
    over all batches; True shows a bar on stderr. A batch that does not fit into memory is tried again at half its size,
    down to one picture. preview(media) sees a batch in the making, decoded after every preview_every-th step and the
    last one.
    """
    if isinstance(system, str):
        catalog.entry(system)
        model = model or default_model(system)
        system = load(model, device=device, dtype=dtype, system=system, student=bool(request.lora), offload=offload,
                      tile=tile)
    check(system, request)
    with _bar(progress, "step") as update, _dressed(system, request):
        yield from _made(system, request, seeds, batch_size, model, _Watch(update, preview, preview_every, len(seeds)))


def at_once(batch_size: int, device: str, medium: str = "image") -> int:
    """How many of a batch are made together on a kind of device: pictures on the CPU one by one (see `sample`)."""
    return 1 if device == "cpu" and medium == "image" else batch_size


class _Watch(NamedTuple):
    """Who looks on, how often, and at how many pictures in all."""

    progress: Callable[[int, int], Any] | None
    preview: Callable[[Media], Any] | None
    every: int
    total: int

    def of(self, done: int, count: int) -> Callable:
        """watch(step, steps, x0, decode) of a batch of `count` pictures, `done` of them being finished."""
        def watch(step: int, steps: int, x0: torch.Tensor, decode: Callable | None = None) -> None:
            if self.progress:
                self.progress(done * steps + (step + 1) * count, self.total * steps)
            if self.preview and decode and ((step + 1) % self.every == 0 or step + 1 == steps):
                self.preview(Media("image", decode(x0)))
        return watch


def _made(system: torch.nn.Module, request: SampleRequest, seeds: list[int], batch_size: int, model: str | None,
          watch: _Watch) -> Iterator[Item]:
    done, more = 0, _guide(system, request)
    medium = getattr(getattr(system, "config", None), "medium", "image")
    batch_size = at_once(batch_size, next(system.parameters()).device.type, medium)
    while done < len(seeds):
        part = seeds[done:done + batch_size]
        try:
            made = system.generate(_of_item(request, done), seeds=part, watch=watch.of(done, len(part)), **more)
        except (RuntimeError, MemoryError) as error:
            if not is_full(error):
                raise
            if len(part) == 1:
                raise DeviceError(f"out of memory: {(str(error).splitlines() or ['no message'])[0]:.200}",
                                  hint="a smaller --size, --dtype bfloat16, or another --device") from None
            batch_size = max(1, len(part) // 2)
            continue
        for i, (seed, data, note) in enumerate(zip(part, made.data, made.notes or ({},) * len(part), strict=True)):
            ready = to_uint8(data) if made.kind == "image" else data.detach().float().cpu().numpy()
            record = record_of(system, _of_item(request, done + i), seed, note, model)
            yield Item(seed, ready, record, made.kind, made.rate)
        done += len(part)


def _of_item(request: SampleRequest, number: int) -> SampleRequest:
    """The request for items from this number on: of given noise each has a row of its own."""
    if request.initial_noise is None:
        return request
    return request.model_copy(update={"noise_row": (request.noise_row or 0) + number})


def _check_own(system: torch.nn.Module, request: SampleRequest) -> None:
    """UsageError for a setting that would be ignored: of other systems alone, or without one that it goes with."""
    check_companions(request, ("control",) if hasattr(system, "backbone") else ())
    others = SampleRequest.model_fields.keys() - set(OWN)
    refuse(request, others | set(getattr(system, "takes", ())), "this system has no use for it")


@contextlib.contextmanager
def _dressed(system: torch.nn.Module, request: SampleRequest) -> Iterator[None]:
    """The system with the request's LoRAs merged, its words known, its ControlNet beside it, while the block runs."""
    if not (request.lora or request.embedding or request.control):
        yield
        return
    from nexus.convert.lora import merge_files
    from nexus.convert.words import taught
    with contextlib.ExitStack() as stack:
        if request.lora and hasattr(system, "turns"):
            stack.enter_context(system.turns.staying("net"))
        stack.callback(merge_files(system, request.lora or ()).undo)
        stack.enter_context(taught(system, request.embedding or ()))
        if request.control:
            stack.enter_context(_steered(system, request))
        yield


def _steered(system: torch.nn.Module, request: SampleRequest) -> contextlib.AbstractContextManager:
    """The system with a ControlNet; UsageError when either cannot."""
    from nexus.process.control import check_control, controlled
    parameter = next(system.net.parameters())
    net = checkpoint.load_net(request.control, device=str(parameter.device))
    check_control(system, net)
    return controlled(system, system.net, net.to(parameter.dtype), request)


def _guide(system: torch.nn.Module, request: SampleRequest) -> dict:
    """The model that the request's guidance leans on, on the system's device."""
    if request.guide_model is None:
        return {}
    return {"guide": load(request.guide_model, device=str(next(system.parameters()).device))}


def record_of(system: torch.nn.Module, request: SampleRequest, seed: int, note: dict, model: str | None) -> dict:
    """Everything needed to make an item again."""
    device = next(system.parameters()).device
    settings = {k: v for k, v in request.to_json().items() if v is not None}
    used = getattr(system, "used_settings", lambda request: {})(request)
    return {"schema": "nexus/1", "nexus": __version__, "torch": torch.__version__.split("+")[0], "model": model,
            "seed": seed, **settings, **used, **note, "device": device.type,
            "dtype": str(next(system.parameters()).dtype).removeprefix("torch.")}


def model_info(name: str) -> dict:
    """A model's system, configuration, training facts, size and parameter count, without loading its weights."""
    path = checkpoint.find(name)
    described = checkpoint.read_description(path)
    files = checkpoint.weight_files(path)
    counts = [math.prod(shape) for file in files for shape in checkpoint.shapes_of(file).values()]
    return {"name": name, "path": str(path), "bytes": sum(f.stat().st_size for f in files), "tensors": len(counts),
            "numbers": sum(counts), **described}


def verify(names: list[str] | None = None) -> list[dict]:
    """Check every file of models against their manifests, once, and their tensors against the systems they describe.

    All embedded models without names. Returns [{"name", "problems": [...]}], no problem being an empty list.
    """
    found = []
    for name in names or checkpoint.zoo_names():
        path = checkpoint.find(name)
        wrong = checkpoint.verify(path) if path.is_dir() else []
        found.append({"name": name, "problems": wrong or checkpoint.misfits(path)})
    return found


def read_config_file(path: Path) -> dict:
    """A TOML or JSON file of settings; InputError when it cannot be read."""
    try:
        text = path.read_text("utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="TOML, or JSON with the suffix .json") from None
