"""Models on disk: a folder of config.json, safetensors and a manifest; reading trusts nothing."""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nexus import catalog
from nexus.atomic import staged_dir, staged_file, write_bytes
from nexus.errors import DeviceError, InputError, ModelError, UsageError
from nexus.nn.lora import MARK
from nexus.nn.outline import Unfilled, outlining
from nexus.stored import TENSOR_LIMIT as TENSOR_LIMIT
from nexus.stored import check_header, find, read_description, read_text, weight_files
from nexus.stored import zoo_names as zoo_names

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_file(path: Path):
    """A safetensors file, its header checked; ModelError when it is damaged."""
    check_header(path)
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError, RuntimeError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None


def read_tensors(path: Path, *, but: Collection[str] = (), parts: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of a safetensors file, save those named in `but` and below `parts`; ModelError when it is damaged."""
    with open_file(path) as file:
        try:
            return {name: file.get_tensor(name) for name in file.keys()
                    if name not in but and not name.startswith(parts)}
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}") from None


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a safetensors file, from its header; ModelError when it is damaged."""
    with open_file(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}      # noqa: SIM118 - no mapping


def tensor_bytes(tensors: dict[str, Tensor], description: dict | None = None) -> bytes:
    """A safetensors file in memory, with the description in its metadata; equal input gives equal bytes."""
    state = {name: t.detach().to("cpu").contiguous() for name, t in sorted(tensors.items())}
    for name, tensor in state.items():
        check_finite(name, tensor)
    return to_bytes(state, {"nexus": json.dumps(description, sort_keys=True)} if description else None)


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither a NaN nor an infinity."""
    if not tensor.is_floating_point():
        return True
    return bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())      # float8 cannot be asked


def check_finite(name: str, tensor: Tensor) -> None:
    """ModelError for a tensor with a NaN or an infinity, which no model is saved with."""
    if not is_finite(tensor):
        raise ModelError(f"{name} has a value that is not finite; it was not saved",
                         hint="a file that holds it is damaged: fetch it again")


def write_folder(path: Path, files: Mapping[str, bytes | Callable[[Any], Any]], facts: dict, *,
                 exists: str = "error") -> None:
    """Write a folder in one step: all files, then manifest.json with each one's size and sha256, then the rename.

    A file is its bytes, or a function that writes them piece by piece to the open file it is called with.
    """
    with staged_dir(path, exists=exists) as folder:
        listed = {name: _put(folder / name, data) for name, data in files.items()}
        write_bytes(folder / "manifest.json", _json({**facts, "files": listed}))


class _Hashed:
    """An open file that hashes what is written to it."""

    def __init__(self, file: Any):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)


def _put(path: Path, data: bytes | Callable[[Any], Any]) -> dict:
    with staged_file(path, size=len(data) if isinstance(data, bytes) else 0) as file:
        hashed = _Hashed(file)
        data(hashed) if callable(data) else hashed.write(data)
        return {"size": file.written, "sha256": hashed.digest.hexdigest()}


def _json(data: dict) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def save_model(path: Path, name: str, config: dict, state: dict[str, Tensor] | Callable[[dict], Mapping], *,
               facts: dict | None = None, exists: str = "error", extra: Mapping | None = None) -> None:
    """Write a model folder: `name` is the catalog name, `config` its Config as JSON data.

    state: the tensors, or what gives their files (see `write_folder`) by the model's description. extra: other files.
    """
    description = {"format": "nexus/1", "system": name, "config": config, **(facts or {})}
    weights = state(description) if callable(state) else {"model.safetensors": tensor_bytes(state, description)}
    write_folder(path, {"config.json": _json(description), **weights, **(extra or {})}, {"format": "nexus/1"},
                 exists=exists)


def verify(path: Path) -> list[str]:
    """What is wrong with a folder that has a manifest: one line a finding, empty when every file is as written."""
    try:
        listed = _listed(path)
    except (ModelError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return [f"manifest.json is missing or damaged ({error})"]
    return [found for name, facts in listed.items() if (found := _verify_file(path, name, *facts))]


def _listed(path: Path) -> dict[str, tuple[int, str]]:
    """File -> size and sha256, by the folder's manifest."""
    files = json.loads(read_text(path / "manifest.json"))["files"]
    return {str(name): (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}


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


def _check_digest(path: Path, name: str) -> None:
    """Refuse a file about to be read of which the folder's manifest says that it is not as it was written."""
    if not (path / "manifest.json").exists():
        return
    try:
        listed = _listed(path)
        wrong = _verify_file(path, name, *listed[name]) if name in listed else ""
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        wrong = f"manifest.json is damaged ({error})"
    if wrong:
        raise ModelError(f"{path} is damaged: {wrong}", hint="nexus models verify, or fetch it again")


def pick_device(name: str) -> torch.device:
    """"auto" takes CUDA, else the CPU; a device that is not there is a DeviceError.

    Apple's MPS has no float64, in which noise levels are computed, so it is taken only where it is asked for.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # torch raises another for each: a driver that is missing, a build without CUDA, a kind without a backend
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device '{name}' is not available: {str(error).splitlines()[0]}",
                          hint="--device auto, or see nexus doctor") from None
    return device


def build(system: str, config: dict, *, training: bool = True) -> nn.Module:
    """The system of a catalog name and a Config as JSON data, with the external parts that it names loaded.

    training=False leaves out those that only training needs, such as a teacher.
    """
    built = bare(system, config, training=training)
    attach_external(built, training=training)
    return built


def bare(system: str, config: dict, *, training: bool = True) -> nn.Module:
    """The same without the weights of its external parts."""
    built = catalog.config_class(system).parse(config).build()
    if not training:
        for part in _training_only(built) & built._modules.keys():
            setattr(built, part, None)
    return built


def attach_external(system: nn.Module, *, training: bool = True) -> None:
    """Load the parts whose weights live in checkpoints of their own, frozen; the system may refuse one (`admit`)."""
    for part, reference in system.external.items():
        if training or part not in _training_only(system):
            loaded = load(reference, device="cpu", dtype="float32")
            if hasattr(system, "admit"):
                system.admit(part, loaded)
            setattr(system, part, loaded.net.requires_grad_(False))


def _training_only(system: nn.Module) -> set[str]:
    return set(getattr(system, "training_only", ()))


def own_state(system: nn.Module) -> dict[str, Tensor]:
    """The tensors that a system's own checkpoint holds; of a LoRA's training, those of its branches alone."""
    own = _without(system.external, system.state_dict())
    return own if getattr(system, "adapter", None) is None else {n: t for n, t in own.items() if MARK in n}


def released_state(system: nn.Module) -> dict[str, Tensor]:
    """Those of them that sampling needs."""
    return _without(_training_only(system), own_state(system))


def _without(parts: Iterable[str], tensors: dict[str, Any]) -> dict[str, Any]:
    skip = tuple(f"{part}." for part in parts)
    return {n: t for n, t in tensors.items() if not n.startswith(skip)} if skip else tensors


def load(name: str, *, device: str = "auto", dtype: str = "auto", system: str | None = None,
         student: bool = False) -> nn.Module:
    """A ready system from a path or zoo name, in eval mode; its network is `.net`.

    dtype "auto" keeps float32 weights as they are and runs stored half-precision ones in float32 on the CPU.
    system: refuse a checkpoint of another system. student: unless it can be taken as one, a Stable Diffusion as `lcm`.
    """
    path, described = recognised(name, system=system, student=student)
    with Unfilled():
        built = _buildable(name, lambda: build(described["system"], described["config"], training=False))
    if described.get("lora"):
        from nexus.convert.lora_run import rebuild
        rebuild(built, described, path)
    else:
        fill(built, read_weights(path, built), str(path))
        place(built, path)
    target = pick_device(device)
    return built.to(target, DTYPES[dtype]).eval()


def load_net(name: str, *, device: str = "auto") -> nn.Module:
    """A model's network alone, in eval mode: all that is needed of a ControlNet, whose base need not be there."""
    path, described = recognised(name)
    with Unfilled():
        net = _buildable(name, lambda: catalog.config_class(described["system"]).parse(described["config"]).net.build())
    found = {key.removeprefix("net."): tensor for key, tensor in read_weights(path, skeleton(path)).items()
             if key.startswith("net.")}
    _copy(found, net.state_dict(), str(path))
    return net.to(pick_device(device)).eval()


def recognised(name: str, *, system: str | None = None, student: bool = False) -> tuple[Path, dict]:
    """Where a model is and its description, as that of `system` where it is one or can be (see `load`)."""
    path = find(name)
    if path.is_dir():
        _check_digest(path, "config.json")
    described = read_description(path)
    if student and system and described["system"] != system:
        from nexus.convert.lora_run import as_student
        described = as_student(system, described)
    if system and described["system"] != system:
        raise ModelError(f"{name} is a checkpoint of '{described['system']}', not of '{system}'",
                         hint=f"nexus sample {described['system']} -m {name}")
    return path, described


def place(system: nn.Module, path: Path) -> None:
    """Tell the parts that refer to files in the model's own folder ("./text") where it is."""
    for part in system.modules():
        if hasattr(part, "base"):
            part.base = path if path.is_dir() else path.parent


def _buildable(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """make(), or ModelError when a checkpoint describes nothing that can be built."""
    try:
        return make()
    except (UsageError, InputError) as error:
        raise ModelError(f"{name} describes no system that can be built: {error}", hint=error.hint) from None
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{name} is too large to be built: {said:.200}") from None


def skeleton(path: Path, described: dict | None = None) -> nn.Module:
    """The system that a model folder or file describes, on the meta device; ModelError when it describes none."""
    described = described or read_description(path)
    with outlining():
        built = _buildable(str(path), lambda: catalog.config_class(described["system"])
                           .parse(described["config"]).build())
        from nexus.convert.lora_run import dressed
        place(built, path)
        return dressed(built, described)


def read_weights(path: Path, system: nn.Module) -> dict[str, Tensor]:
    """A model's tensors for sampling, each file checked against the manifest: averaged ones, then what those lack.

    A run averages every tensor, so of its checkpoints model.safetensors is not even opened. `system` is of the same
    description, on any device.
    """
    return _gathered(path, system, read_tensors)


def read_training_parts(path: Path, system: nn.Module) -> dict[str, Tensor]:
    """Of a run's checkpoint the tensors that sampling never needs, such as a critic's; of any other model none."""
    parts = tuple(f"{part}." for part in _training_only(system))
    file = path / "model.safetensors"
    if not parts or not file.is_file():
        return {}
    names = shapes_of(file).keys()
    return read_tensors(file, but=[name for name in names if not name.startswith(parts)])


def find_weights(path: Path, system: nn.Module) -> dict[str, Path]:
    """The same, each tensor's file in its place."""
    return _gathered(path, system, lambda at, but, parts: {n: at for n in shapes_of(at) if not n.startswith(parts)})


def _gathered(path: Path, system: nn.Module, read: Callable[..., dict]) -> dict:
    parts, needed = tuple(f"{part}." for part in _training_only(system)), released_state(system).keys()
    found: dict[str, Any] = {}
    for file in [path] if path.is_file() else [*weight_files(path, "ema"), *weight_files(path)]:
        if not (found and found.keys() >= needed):
            if file != path:
                _check_digest(path, file.name)
            found = read(file, but=found, parts=parts) | found
    return found


def check_files(path: Path, system: nn.Module) -> None:
    """ModelError where a file that sampling would read is not as written, or is not of the system and of its parts."""
    find_weights(path, system)
    if wrong := misfits(path, system):
        raise ModelError(wrong[0], hint="nexus models verify, or fetch it again")
    for part, reference in system.external.items():
        if part not in _training_only(system):
            where = find(reference)
            check_files(where, skeleton(where))


def misfits(path: Path, system: nn.Module | None = None) -> list[str]:
    """Where a model's tensors are not those of the system it describes, from the headers alone: one line a finding.

    system: of that description, on any device, where the caller has built it already.
    """
    try:
        system = skeleton(path) if system is None else system
        for name in ("model",) if path.is_file() else ("model", "ema"):
            shapes = {key: shape for file in weight_files(path, name) for key, shape in shapes_of(file).items()}
            where = str(path if path.is_file() else path / f"{name}.safetensors")
            if shapes or name == "model":
                check_fit(_without(_training_only(system), shapes), released_state(system), where)
    except ModelError as error:
        return [str(error)]
    return []


def fill(system: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a system; a missing, surplus or misshapen one is a ModelError naming it."""
    _copy(tensors, own_state(system), source)


def _copy(tensors: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    check_fit({name: tuple(tensor.shape) for name, tensor in tensors.items()}, wanted, source)
    with torch.no_grad():
        for name, tensor in tensors.items():
            wanted[name].copy_(tensor)


def check_fit(shapes: dict[str, tuple[int, ...]], wanted: dict[str, Tensor], source: str) -> None:
    """ModelError naming a tensor that is missing, surplus or misshapen beside what is wanted."""
    for kind, names in (("lacks", wanted.keys() - shapes.keys()), ("has a surplus", shapes.keys() - wanted.keys())):
        if names:
            raise ModelError(f"{source} {kind} {min(names)} ({len(names)} in all)", hint="nexus convert --check")
    for name, shape in shapes.items():
        if shape != tuple(wanted[name].shape):
            raise ModelError(f"{source}: {name} is {list(shape)}, {list(wanted[name].shape)} expected")
