"""Modules without their initial numbers: about to be filled from a file, or looked at on the meta device."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# Of torch.Tensor and torch.nn.init.
RANDOM = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_",
                    "xavier_uniform_", "orthogonal_"})
DRAWS = frozenset({"randn", "rand"})                # of torch: as dear on the meta device


class Unfilled(TorchFunctionMode):
    """Weights built inside hold no random numbers: what is read right afterwards overwrites them all.

    On the meta device, where such numbers are nothing, they would import torch's compiler, which takes a second.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in RANDOM and (args or "tensor" in kwargs):
            return args[0] if args else kwargs["tensor"]
        if name in DRAWS:
            empty = torch.empty(*args, **{key: value for key, value in kwargs.items() if key != "generator"})
            if empty.is_meta:
                return empty
        return func(*args, **kwargs)


@contextlib.contextmanager
def outlining() -> Iterator[None]:
    """What is built inside has shapes and no numbers: the meta device, and nothing drawn on it."""
    with torch.device("meta"), Unfilled():
        yield
