"""The packages that bring the evaluators' networks: where their files lie, and whether they are the right ones."""

import hashlib
import tempfile
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from nexus.checkpoint import read_tensors
from nexus.convert.sandbox import unpickle
from nexus.errors import ModelError

EXTRA = "pip install 'nexus-media[eval]'"


def package_folder(module: str, package: str, hint: str = EXTRA) -> Path:
    """Where an installed package keeps its files; ModelError naming the extra when it is not installed."""
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"this evaluation needs the package {package}, which is not installed", hint=hint)
    return Path(spec.submodule_search_locations[0])


def sha256_of(path: Path) -> str:
    """The digest of a file; ModelError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", hint="check the path") from None


def check_digest(path: Path, expected: str) -> str:
    """The file's sha256, which must start with `expected`; else ModelError."""
    digest = sha256_of(path)
    if not digest.startswith(expected):
        raise ModelError(f"{path} is another file than numbers are compared with: its sha256 starts with "
                         f"{digest:.12}, {expected:.12} expected", hint=f"reinstall it: {EXTRA}")
    return digest


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a packaged .pth, through the sandbox that conversion uses; ModelError when it is damaged."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.safetensors"
        unpickle(path, copy)
        return read_tensors(copy)
