"""Models on disk: a folder of config.json, safetensors and a manifest; reading trusts nothing."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nexus import catalog
from nexus.atomic import staged_dir, write_bytes
from nexus.errors import DeviceError, InputError, ModelError, UsageError

ZOO = Path(__file__).parent / "zoo"
HEADER_LIMIT = 16 << 20
TENSOR_LIMIT = 100_000
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def find(name: str) -> Path:
    """The folder or .safetensors file of a model: a path, a run folder (its newest checkpoint), or a zoo name."""
    path = Path(name)
    try:
        path.exists()
    except OSError as error:
        raise ModelError(f"there is no model '{name:.80}': {error.strerror}") from None
    if not path.exists() and (ZOO / name / "config.json").exists():
        return ZOO / name
    if path.is_dir() and not (path / "model.safetensors").exists():
        steps = sorted(p for p in path.glob("step-*") if p.name[5:].isdigit())
        if steps:
            return steps[-1]
    if (path / "model.safetensors").exists() or path.suffix == ".safetensors" and path.is_file():
        return path
    if path.exists():
        raise ModelError(f"{name} is not a Nexus model",
                         hint="a folder with config.json and model.safetensors; foreign files: nexus convert")
    known = ", ".join(sorted(p.parent.name for p in ZOO.glob("*/config.json")))
    raise ModelError(f"there is no model '{name}'", hint=f"a path, or one of: {known or 'none embedded'}")


def zoo_names() -> list[str]:
    """The embedded default checkpoints."""
    return sorted(p.parent.name for p in ZOO.glob("*/config.json"))


def read_description(path: Path) -> dict:
    """{"system", "config", ...} of a model folder or of a stray safetensors file that describes itself."""
    if path.is_dir():
        text = _read_text(path / "config.json")
    else:
        with open_file(path) as file:
            text = (file.metadata() or {}).get("nexus", "")
        if not text:
            raise ModelError(f"{path} does not say what it is", hint="nexus convert makes a Nexus model of it")
    try:
        found = json.loads(text)
        return {**found, "system": str(found["system"]), "config": dict(found["config"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"the description of {path} is damaged", hint="nexus models verify") from None


def _read_text(path: Path) -> str:
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


def open_file(path: Path):
    """A safetensors file, its header checked; ModelError when it is damaged."""
    check_header(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ModelError when it is damaged."""
    with open_file(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}") from None


def tensor_bytes(tensors: dict[str, Tensor], description: dict | None = None) -> bytes:
    """A safetensors file in memory, with the description in its metadata; equal input gives equal bytes."""
    state = {name: t.detach().to("cpu").contiguous() for name, t in sorted(tensors.items())}
    if bad := [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise ModelError(f"{bad[0]} has a value that is not finite; it was not saved")
    return to_bytes(state, {"nexus": json.dumps(description, sort_keys=True)} if description else None)


def write_folder(path: Path, files: dict[str, bytes], facts: dict, *, exists: str = "error") -> None:
    """Write a folder in one step: all files, then manifest.json with each one's size and sha256, then the rename."""
    with staged_dir(path, exists=exists) as folder:
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / name, data)
        listed = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in sorted(files.items())}
        write_bytes(folder / "manifest.json", _json({**facts, "files": listed}))


def _json(data: dict) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def save_model(path: Path, name: str, config: dict, state: dict[str, Tensor], *, facts: dict | None = None,
               exists: str = "error", extra: dict[str, bytes] | None = None) -> None:
    """Write a model folder: `name` is the catalog name, `config` its Config as JSON data."""
    description = {"format": "nexus/1", "system": name, "config": config, **(facts or {})}
    files = {"config.json": _json(description), "model.safetensors": tensor_bytes(state, description)}
    write_folder(path, {**files, **(extra or {})}, {"format": "nexus/1"}, exists=exists)


def verify(path: Path) -> list[str]:
    """What is wrong with a folder that has a manifest: one line a finding, empty when every file is as written."""
    try:
        listed = json.loads(_read_text(path / "manifest.json"))["files"]
        items = [(str(n), int(f["size"]), str(f["sha256"])) for n, f in listed.items()]
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"manifest.json is missing or damaged ({error})"]
    return [found for item in items if (found := _verify_file(path, *item))]


def _verify_file(path: Path, name: str, size: int, digest: str) -> str:
    file = path / name
    if os.path.isabs(name) or ".." in Path(name).parts:
        return f"{name}: outside the folder"
    if not file.is_file():
        return f"{name}: missing"
    if file.stat().st_size != size:
        return f"{name}: {file.stat().st_size} bytes, {size} expected"
    with open(file, "rb") as stream:
        same = hashlib.file_digest(stream, "sha256").hexdigest() == digest
    return "" if same else f"{name}: its sha256 differs"


def _check_digests(path: Path) -> None:
    """Refuse a folder whose manifest says that a file to be loaded is not as it was written."""
    if path.is_dir() and (path / "manifest.json").exists():
        wrong = [line for line in verify(path) if not line.startswith("train/")]    # may be deleted for a release
        if wrong:
            raise ModelError(f"{path} is damaged: {wrong[0]}", hint="nexus models verify, or fetch it again")


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA, then Apple's MPS, then the CPU; a device that is not there is a DeviceError."""
    if name == "auto":
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device '{name}' is not available: {str(error).splitlines()[0]}",
                          hint="--device auto, or see nexus doctor") from None
    return device


def build(system: str, config: dict) -> nn.Module:
    """The system of a catalog name and a Config as JSON data, with the external parts that it names loaded."""
    built = catalog.config_class(system).parse(config).build()
    attach_external(built)
    return built


def attach_external(system: nn.Module) -> None:
    """Load the parts whose weights live in checkpoints of their own, frozen."""
    for part, reference in system.external.items():
        setattr(system, part, load(reference, device="cpu", dtype="float32").net.requires_grad_(False))


def own_state(system: nn.Module) -> dict[str, Tensor]:
    """The tensors that a system's own checkpoint holds."""
    skip = tuple(f"{part}." for part in system.external)
    return {n: t for n, t in system.state_dict().items() if not n.startswith(skip)} if skip else system.state_dict()


def load(name: str, *, device: str = "auto", dtype: str = "auto", system: str | None = None) -> nn.Module:
    """A ready system from a path or zoo name, in eval mode; its network is `.net`.

    dtype "auto" keeps float32 weights as they are and runs stored half-precision ones in float32 on the CPU.
    system: refuse a checkpoint of another system.
    """
    path = find(name)
    described = read_description(path)
    if system and described["system"] != system:
        raise ModelError(f"{name} is a checkpoint of '{described['system']}', not of '{system}'",
                         hint=f"nexus sample {described['system']} -m {name}")
    _check_digests(path)
    try:
        built = build(described["system"], described["config"])
    except (UsageError, InputError) as error:
        raise ModelError(f"{name} describes no system that can be built: {error}", hint=error.hint) from None
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        raise ModelError(f"{name} is too large to be built: {str(error).splitlines()[0]:.200}") from None
    file = path if path.is_file() else path / "model.safetensors"
    fill(built, read_tensors(file), str(file))
    if path.is_dir() and (path / "ema.safetensors").exists():
        fill(built, {**own_state(built), **read_tensors(path / "ema.safetensors")}, str(path / "ema.safetensors"))
    target = pick_device(device)
    return built.to(target, DTYPES[dtype]).eval()


def fill(system: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a system; a missing, surplus or misshapen one is a ModelError naming it."""
    wanted = own_state(system)
    for kind, names in (("lacks", wanted.keys() - tensors.keys()), ("has a surplus", tensors.keys() - wanted.keys())):
        if names:
            raise ModelError(f"{source} {kind} {min(names)} ({len(names)} in all)", hint="nexus convert --check")
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ModelError(f"{source}: {name} is {list(tensor.shape)}, {list(wanted[name].shape)} expected")
        with torch.no_grad():
            wanted[name].copy_(tensor)
