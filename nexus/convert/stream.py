"""Tensors that are made only when they are written: a model of any size is converted in the memory of one of them."""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from nexus import checkpoint
from nexus.atomic import CHUNK, staged_file
from nexus.convert.keymap import Row, parts_of, to_foreign, to_native
from nexus.errors import ModelError

SHARD = 5 * 10**9               # bytes of tensors in a file, above which a folder's weights are split
WINDOW = 64 << 20               # what was read of a mapped file stays in memory until it is closed
# The kinds of numbers in the order in which the safetensors library writes them, by their names there.
KINDS = {torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
         torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
         torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
         torch.uint8: "U8", torch.bool: "BOOL"}
DTYPES = {name: dtype for dtype, name in KINDS.items()}
Payload = bytes | Path | Callable[[Any], Any]       # a file's bytes, a file to copy, or what writes to an open file


class Lazy(NamedTuple):
    """A tensor to be: its shape and kind, as a tensor on the meta device, and what makes it."""

    meta: Tensor
    make: Callable[[], Tensor]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    @property
    def bytes(self) -> int:
        return self.meta.numel() * self.meta.element_size()


Tensors = Mapping[str, Lazy]


def ready(state: Mapping[str, Tensor]) -> dict[str, Lazy]:
    """Tensors in memory."""
    return {key: Lazy(tensor.to("meta"), partial(_same, tensor)) for key, tensor in state.items()}


def _same(tensor: Tensor) -> Tensor:
    return tensor


def visit(tensors: Tensors) -> None:
    """Make each one and let it go: what cannot be read, does not fit or is not finite is said now."""
    for name, lazy in tensors.items():
        checkpoint.check_finite(name, lazy.make())


def made(tensors: Tensors) -> dict[str, Tensor]:
    """All of them, in memory."""
    return {key: lazy.make() for key, lazy in tensors.items()}


class Reader:
    """Tensors of safetensors files by name, one file open at a time and never for long."""

    def __init__(self):
        self._path, self._file, self._left = None, None, 0

    def get(self, path: Path, key: str) -> Tensor:
        """The tensor; ModelError for a damaged file."""
        if path != self._path or self._left <= 0:
            self._path = self._file = None              # closed before the next one is opened
            self._file, self._path, self._left = checkpoint.open_file(path), path, WINDOW
        try:
            tensor = self._file.get_tensor(key)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}", hint="fetch it again") from None
        self._left -= tensor.numel() * tensor.element_size()
        return tensor


def stored(places: Mapping[str, tuple[Path, str]]) -> dict[str, Lazy]:
    """Tensors on disk, by name -> (file, its name there); the files' headers alone are read."""
    reader, metas = Reader(), {}
    for path in dict.fromkeys(path for path, _ in places.values()):
        with checkpoint.open_file(path) as file:
            for name in (name for name, place in places.items() if place[0] == path):
                part = file.get_slice(places[name][1])
                if (kind := part.get_dtype()) not in DTYPES:
                    raise ModelError(f"{path}: {places[name][1]} holds numbers of the kind {kind}, which are not known")
                metas[name] = torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")
    return {name: Lazy(metas[name], partial(reader.get, *place)) for name, place in places.items()}


def native(table: list[Row], tensors: Tensors) -> dict[str, Lazy]:
    """`to_native`, each tensor when it is asked for."""
    metas = to_native(table, {key: lazy.meta for key, lazy in tensors.items()})
    return {key: Lazy(metas[key], partial(_native, row, key, {name: tensors[name] for name in names}))
            for key, row, names in parts_of(table, tensors)}


def _native(row: Row, key: str, tensors: Tensors) -> Tensor:
    return to_native([row], made(tensors))[key]


def foreign(table: list[Row], tensors: Tensors, *, copies: int = 0) -> dict[str, Lazy]:
    """`to_foreign`, each tensor when it is asked for."""
    out = {}
    for key, lazy in tensors.items():
        metas = to_foreign(table, {key: lazy.meta}, copies=copies)
        out |= {name: Lazy(meta, partial(_foreign, table, key, lazy, name)) for name, meta in metas.items()}
    return out


def _foreign(table: list[Row], key: str, lazy: Lazy, name: str) -> Tensor:
    parts = to_foreign(table, {key: lazy.make()})
    return parts[name] if name in parts else next(iter(parts.values()))     # what is repeated is the first part


def write_tensors(file, tensors: Tensors, metadata: dict[str, str], *, finite: bool = False) -> None:
    """A safetensors file, tensor by tensor, byte for byte what the library writes.

    finite: ModelError for a tensor with a value that is not.
    """
    kinds = list(KINDS)
    order = sorted(tensors, key=lambda name: (kinds.index(tensors[name].meta.dtype), name.encode()))
    header, at = {"__metadata__": metadata} if metadata else {}, 0
    for name in order:
        lazy = tensors[name]
        end = at + lazy.bytes
        header[name] = {"dtype": KINDS[lazy.meta.dtype], "shape": list(lazy.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        tensor = tensors[name].make().detach()
        if finite:
            checkpoint.check_finite(name, tensor)
        if tensor.numel():
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        del tensor                                      # it may keep a mapped file open that is to be closed


def weights(name: str, tensors: Tensors, metadata: dict[str, str], *, limit: int = SHARD,
            finite: bool = False) -> dict[str, Payload]:
    """The files of a folder's weights: `name`.safetensors, or above `limit` bytes shards of it and their index."""
    parts = _shards(tensors, limit)
    if len(parts) == 1:
        return {f"{name}.safetensors": partial(write_tensors, tensors=tensors, metadata=metadata, finite=finite)}
    files, listed = {}, {}
    for i, keys in enumerate(parts):
        file = f"{name}-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        files[file] = partial(write_tensors, tensors={key: tensors[key] for key in keys}, metadata={"format": "pt"},
                              finite=finite)
        listed |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": sum(lazy.bytes for lazy in tensors.values())}, "weight_map": listed}
    return files | {f"{name}.safetensors.index.json": (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()}


def _shards(tensors: Tensors, limit: int) -> list[list[str]]:
    """Names in order, split so that each part has `limit` bytes at most, or one tensor that is larger."""
    parts, room = [[]], limit
    for name in sorted(tensors):
        if parts[-1] and tensors[name].bytes > room:
            parts.append([])
            room = limit
        parts[-1].append(name)
        room -= tensors[name].bytes
    return parts


def copy_into(file, path: Path) -> None:
    """A file's bytes into an open one; ModelError when it cannot be read."""
    try:
        with open(path, "rb") as source:
            shutil.copyfileobj(source, file, CHUNK)
    except OSError as error:
        if error.filename is None:                      # the target's disk, which the writer explains
            raise
        raise ModelError(f"cannot read {error.filename}: {error.strerror}") from None


def writers(files: Mapping[str, Payload]) -> dict[str, bytes | Callable[[Any], Any]]:
    """Files to copy as what copies them, the others as they are."""
    return {name: partial(copy_into, path=data) if isinstance(data, Path) else data for name, data in files.items()}


def fill(folder: Path, files: Mapping[str, Payload]) -> None:
    """Write files below a folder."""
    for name, data in writers(files).items():
        put(folder / name, data)


def put(path: Path, data: bytes | Callable[[Any], Any], *, exists: str = "error") -> None:
    """Write one file."""
    with staged_file(path, exists=exists, size=len(data) if isinstance(data, bytes) else 0) as file:
        data(file) if callable(data) else file.write(data)


def numbers(tensors: Iterable[Lazy]) -> int:
    """How many numbers they hold."""
    return sum(lazy.meta.numel() for lazy in tensors)


def misshapen(found: Tensors, wanted: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Of the names in `wanted`, all of which are found, those with another shape, a line each."""
    return tuple(f"{name} is {list(found[name].shape)}, {list(tensor.shape)} expected"
                 for name, tensor in wanted.items() if found[name].shape != tensor.shape)
