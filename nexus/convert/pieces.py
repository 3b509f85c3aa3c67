"""One network of a checkpoint: whether its tensors are those of its layout, and what they are here."""

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.config import Config
from nexus.convert import stream
from nexus.convert.detect import Source, read
from nexus.convert.keymap import to_foreign
from nexus.convert.layout import Layout
from nexus.convert.stream import Lazy, Tensors
from nexus.errors import ModelError
from nexus.nn.outline import outlining


class Piece(NamedTuple):
    """A network and where its tensors are.

    part: its name in the system ("net", "codec"). built: its native tensors on the meta device. data: the
    configuration, as the layout's functions take it.
    """

    part: str
    built: dict[str, Tensor]
    layout: Layout
    data: dict
    source: Source

    def dropped(self) -> tuple[str, ...]:
        """Keys that carry no information."""
        return tuple(key for key in sorted(self.source.tensors.keys() - self._wanted().keys())
                     if any(fnmatch.fnmatch(key, pattern) for pattern in self.layout.drop))

    def problems(self) -> tuple[str, ...]:
        """Keys that are missing, have no place, or have another shape: a line each."""
        return _compare(self.source, self._wanted(), self.dropped(), self.layout.constants(self.data))

    def native(self) -> dict[str, Lazy]:
        """The native tensors, under the part's name.

        Raises ModelError for a linear layer in place of a convolution, for whole numbers in place of weights, and for a
        table that is not the layout's.
        """
        source, constants = self.source, self.layout.constants(self.data)
        _check_constants(below(source, only=constants), constants)
        gone = {*constants, *self.dropped()}
        left = [key for key in source.tensors if key not in gone]
        found = stream.native(self.layout.table(self.data), tensors_of(below(source, only=left)))
        for key, lazy in found.items():
            if lazy.meta.shape != self.built[key].shape:
                raise ModelError(f"{source.path}: {key} would be {list(lazy.shape)}, {list(self.built[key].shape)} "
                                 "expected", hint="a linear layer in place of a convolution, or the reverse")
            if self.built[key].is_floating_point() and not lazy.meta.is_floating_point():
                kind = str(lazy.meta.dtype).removeprefix("torch.")
                raise ModelError(f"{source.path}: {key} is of {kind}, which is no weight's kind of number",
                                 hint="a quantised checkpoint is not read: convert the one that it was made from")
        return {f"{self.part}.{key}": lazy for key, lazy in found.items()}

    def _wanted(self) -> dict[str, tuple[int, ...]]:
        expected = to_foreign(self.layout.table(self.data), self.built, copies=self.layout.copies(self.data))
        return {key: tuple(tensor.shape) for key, tensor in expected.items()}


def built(config: Config, part: str = "") -> dict[str, Tensor]:
    """The native tensors of what a Config builds, or of a part of it, on the meta device."""
    with outlining():
        return config.build().get_submodule(part).state_dict()


def tensors_of(source: Source) -> dict[str, Lazy]:
    """A checkpoint's tensors, on disk."""
    return stream.stored({key: (at.file, at.key) for key, at in source.tensors.items()})


def below(source: Source, prefix: str = "", only: Iterable[str] | None = None) -> Source:
    """The tensors whose names begin with `prefix`, without it; or only those named."""
    kept = source.tensors if only is None else {k: source.tensors[k] for k in only if k in source.tensors}
    return source._replace(tensors={key.removeprefix(prefix): at for key, at in kept.items() if key.startswith(prefix)})


def split(source: Source, patterns: Iterable[str]) -> tuple[Source, Source]:
    """The source less what matches a pattern, and that."""
    found = {k for pattern in patterns for k in fnmatch.filter(source.tensors, pattern)}
    return below(source, only=[k for k in source.tensors if k not in found]), below(source, only=found)


def foreign(tensors: Tensors, part: str, layout: Layout, data: dict, prefix: str = "") -> dict[str, Lazy]:
    """One part of a model in a layout's names, its constants among them."""
    inner = {key.removeprefix(f"{part}."): lazy for key, lazy in tensors.items() if key.startswith(f"{part}.")}
    constants = layout.constants(data)                  # refuses what the layout cannot say, before any work
    out = stream.foreign(layout.table(data), inner, copies=layout.copies(data))
    kind = next(iter(out.values())).meta.dtype
    out |= stream.ready({key: tensor.to(kind) for key, tensor in constants.items()})
    return {prefix + key: lazy for key, lazy in out.items()}


def _compare(source: Source, wanted: Mapping[str, tuple], dropped: tuple[str, ...], constants) -> tuple[str, ...]:
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


def _check_constants(source: Source, constants: dict[str, Tensor]) -> None:
    for key, tensor in read(source).items():
        near = 1e-4 if tensor.dtype == torch.float32 else 1e-2
        if tensor.shape != constants[key].shape or (tensor.float() - constants[key]).abs().max() > near:
            raise ModelError(f"{key} is not the fixed table that this layout has",
                             hint="its size or its formula is another; a learned one cannot be converted")
