"""What is dear to compute and a pure function of its input, kept in the user's cache folder."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from nexus.atomic import cache_folder, write_bytes
from nexus.checkpoint import read_tensors, tensor_bytes
from nexus.errors import ModelError, OutputError


def kept(name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> Tensor:
    """make() -> Tensor of `shape`, or what an earlier call stored under `name` (in float32); float64.

    A damaged or misshapen file is made anew; a folder that cannot be written costs the time, not the result.
    """
    path = cache_folder("evaluate") / f"{name}.safetensors"
    with contextlib.suppress(ModelError, KeyError):
        value = read_tensors(path)["value"]
        if tuple(value.shape) == shape:
            return value.double()
    value = make().to(torch.float32)
    with contextlib.suppress(OutputError, OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, tensor_bytes({"value": value}), exists="overwrite")
    return value.double()
