"""Models on disk as far as it needs no torch: where they are, what they say they are, which tensors they hold."""

import json
from pathlib import Path
from typing import NamedTuple

from nexus import catalog
from nexus.errors import ModelError

ZOO = Path(__file__).parent / "zoo"
HEADER_LIMIT = 16 << 20
INDEX = ".index.json"           # of weights in shards, beside which it lies under their name
TENSOR_LIMIT = 100_000
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}                        # bytes of a number


class Held(NamedTuple):
    """A tensor as a file's header tells of it."""

    dtype: str
    shape: tuple[int, ...]


def find(name: str) -> Path:
    """The folder or .safetensors file of a model: a path, a run folder (its newest checkpoint), or a zoo name."""
    path = Path(name)
    try:
        path.exists()
    except OSError as error:
        raise ModelError(f"there is no model '{name:.80}': {error.strerror}") from None
    if found := _model_at(path):
        return found
    if name in zoo_names():             # also beside a folder of that name that holds something else: --data music
        return ZOO / name
    if path.exists():
        raise ModelError(f"{name} is not a Nexus model",
                         hint="a folder with config.json and model.safetensors; foreign files: nexus convert")
    known = ", ".join(zoo_names())
    raise ModelError(f"there is no model '{name}'", hint=f"a path, or one of: {known or 'none embedded'}")


def _model_at(path: Path) -> Path | None:
    """The model that a path leads to, of a run its newest; None for anything else."""
    steps = {int(p.name[5:]): p for p in path.glob("step-*") if p.name[5:].isdigit()} if path.is_dir() else {}
    if steps and not _has_weights(path):
        return steps[max(steps)]
    return path if _has_weights(path) or path.suffix == ".safetensors" and path.is_file() else None


def _has_weights(folder: Path) -> bool:
    return any((folder / f"model.safetensors{end}").exists() for end in ("", INDEX))


def weight_files(path: Path, name: str = "model") -> list[Path]:
    """The files that hold a model's weights, or its averaged ones (`ema`): one, or the shards that its index lists.

    [] where there are no such weights; ModelError for an index that is damaged.
    """
    whole, index = path / f"{name}.safetensors", path / f"{name}.safetensors{INDEX}"
    if path.is_file() or whole.exists() or not index.exists():
        return [path] if path.is_file() else [whole] if whole.exists() else []
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
        if names and all(Path(n).name == n for n in names):
            return [path / n for n in names]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise ModelError(f"{index}: its weight_map does not list files of this folder", hint="nexus models verify")


def zoo_names() -> list[str]:
    """The embedded default checkpoints."""
    return sorted(p.parent.name for p in ZOO.glob("*/config.json"))


def default_model(system: str) -> str:
    """The embedded checkpoint of a system; ModelError when it has none."""
    name = catalog.entry(system).default
    if name not in zoo_names():
        raise ModelError(f"'{system}' has no embedded checkpoint", hint=f"nexus train {system}, then -m RUN_FOLDER")
    return name


def read_description(path: Path) -> dict:
    """{"system", "config", ...} of a model folder or of a stray safetensors file that describes itself."""
    if path.is_dir():
        text = read_text(path / "config.json")
    else:
        text = header(path)[0].get("nexus", "")
        if not text:
            raise ModelError(f"{path} does not say what it is", hint="nexus convert makes a Nexus model of it")
    try:
        found = json.loads(text)
        return {**found, "system": str(found["system"]), "config": dict(found["config"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"the description of {path} is damaged", hint="nexus models verify") from None


def read_text(path: Path) -> str:
    """A small text file of a model folder; ModelError when it cannot be read."""
    try:
        if path.stat().st_size > HEADER_LIMIT:
            raise ModelError(f"{path} is larger than a description may be ({HEADER_LIMIT} bytes)")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header is too large or lies about its length, before anything parses it."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = file.read(min(length, HEADER_LIMIT)) if 8 + length <= size else b""
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if size < 10 or length > HEADER_LIMIT or 8 + length > size or head.count(b"data_offsets") > TENSOR_LIMIT:
        raise ModelError(f"{path} is damaged or not a safetensors file", hint="nexus models verify, or fetch it again")


def header(path: Path) -> tuple[dict[str, str], dict[str, Held]]:
    """The metadata and tensors of a safetensors file; ModelError when it is damaged."""
    check_header(path)
    try:
        with open(path, "rb") as file:
            found = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        stored = {str(k): str(v) for k, v in found.pop("__metadata__", {}).items()}
        held = {name: Held(str(row["dtype"]), tuple(int(n) for n in row["shape"])) for name, row in found.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        raise ModelError(f"{path} is damaged", hint="nexus models verify, or fetch it again") from None
    return stored, held
