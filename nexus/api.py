"""The Python interface: what the command line does, as functions."""

import json
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from nexus import __version__, catalog, checkpoint
from nexus.errors import DeviceError, InputError, ModelError
from nexus.media import Media, to_uint8
from nexus.requests import SampleRequest

__all__ = ["Item", "load", "model_info", "models", "sample", "to_uint8", "verify"]

load = checkpoint.load
models = catalog.listing


def __getattr__(name: str):
    """`train` and `evaluate`, imported when they are used: sampling would wait half a second for them."""
    if name == "train":
        from nexus.train.start import train
        return train
    if name == "evaluate":
        from nexus.evaluate.run import evaluate
        return evaluate
    raise AttributeError(f"module 'nexus.api' has no attribute '{name}'")


class Item(NamedTuple):
    """One finished picture: image uint8 [H, W, C], and the record that goes into its file."""

    seed: int
    image: np.ndarray
    record: dict


def default_model(system: str) -> str:
    """The embedded checkpoint of a system; ModelError when it has none."""
    name = catalog.entry(system).default
    if name not in checkpoint.zoo_names():
        raise ModelError(f"'{system}' has no embedded checkpoint", hint=f"nexus train {system}, then -m RUN_FOLDER")
    return name


def sample(system: str | torch.nn.Module, request: SampleRequest, *, seeds: list[int], batch_size: int = 8,
           device: str = "auto", dtype: str = "auto", model: str | None = None,
           progress: Callable[[int, int], Any] | None = None,
           preview: Callable[[Media], Any] | None = None) -> Iterator[Item]:
    """Pictures as they are made, one a seed; picture i is the same whatever the batch size.

    system: a catalog name (with `model`, or its embedded checkpoint) or a loaded system. progress(done, total) counts
    sampling steps over all batches. An out-of-memory batch is tried once more at half its size.
    """
    if isinstance(system, str):
        catalog.entry(system)
        model = model or default_model(system)
        system = load(model, device=device, dtype=dtype, system=system)
    done = 0
    while done < len(seeds):
        part = seeds[done:done + batch_size]
        try:
            made = system.generate(request, seeds=part, watch=_watcher(progress, preview, done, part, len(seeds)))
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(part) == 1:
                raise DeviceError(f"out of memory: {str(error).splitlines()[0]:.200}",
                                  hint="a smaller --size, --dtype bfloat16, or another --device") from None
            batch_size = max(1, len(part) // 2)
            continue
        for seed, data, note in zip(part, made.data, made.notes or ({},) * len(part), strict=True):
            yield Item(seed, to_uint8(data), record_of(system, request, seed, note, model))
        done += len(part)


def _watcher(progress, preview, done: int, part: list[int], total: int):
    def watch(step: int, steps: int, x0: torch.Tensor, decode: Callable | None = None) -> None:
        if progress:
            progress(done * steps + (step + 1) * len(part), total * steps)
        if preview and decode:
            preview(Media("image", decode(x0)))
    return watch


def record_of(system: torch.nn.Module, request: SampleRequest, seed: int, note: dict, model: str | None) -> dict:
    """Everything needed to make a picture again."""
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
    file = path if path.is_file() else path / "model.safetensors"
    with checkpoint.open_file(file) as tensors:
        counts = [int(np.prod(tensors.get_slice(k).get_shape())) for k in tensors.keys()]
    return {"name": name, "path": str(path), "bytes": file.stat().st_size, "tensors": len(counts),
            "numbers": sum(counts), **described}


def verify(names: list[str] | None = None) -> list[dict]:
    """Check every file of models against their manifests: [{"name", "problems": [...]}]."""
    found = []
    for name in names or checkpoint.zoo_names():
        path = checkpoint.find(name)
        wrong = checkpoint.verify(path) if path.is_dir() else []
        if not wrong:
            load(name, device="cpu")
        found.append({"name": name, "problems": wrong})
    return found


def read_config_file(path: Path) -> dict:
    """A TOML or JSON file of settings; InputError when it cannot be read."""
    try:
        text = path.read_text("utf-8")
        return json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}", hint="TOML, or JSON with the suffix .json") from None
