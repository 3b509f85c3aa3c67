"""--offload: text encoders, network and codec take turns in memory, each loaded when it is called for.

A part that waits has the shapes, dtype and device of its weights, but of each tensor a single number only. On the CPU
a part is read from its file every time its turn comes; elsewhere it is read once and then moved to the CPU and back.
What is made is the same, byte for byte: only when a weight is in memory changes.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nexus import checkpoint
from nexus.errors import UsageError
from nexus.stored import find, header

PARTS = ("net", "codec", "conditioner.encoder")
METHODS = ("forward", "prepare", "encode", "decode", "decode_raw")      # a call of one is a part's turn
CHUNK = 64 << 20                    # bytes read before a file is opened anew, which frees what was mapped of it


class Source(NamedTuple):
    """Where a tensor is stored, and how large it is there."""

    file: Path
    key: str
    shape: tuple[int, ...]


class Turns:
    """Which parts of a system are in memory. tensors: each part's, by name, with their sources."""

    def __init__(self, tensors: dict[str, dict[str, tuple[Tensor, Source]]]):
        self._tensors, self._host = tensors, {}
        self._here: set[str] = set()
        self._stay: set[str] = set()
        self._encoders = None

    def join(self, name: str, module: nn.Module, methods: tuple[str, ...] = METHODS) -> None:
        """From now on a call of these methods is the module's turn."""
        for method in methods:
            if hasattr(module, method):
                setattr(module, method, self._taking(name, getattr(module, method)))

    def encoders(self, conditioner: nn.Module) -> None:
        """The same for encoders that a conditioner loads and drops itself."""
        self._encoders = conditioner
        self.join("encoders", conditioner, ("_encode",))

    def _taking(self, name: str, method):
        def taken(*args, **settings):
            self.take(name)
            return method(*args, **settings)
        return taken

    def take(self, name: str) -> None:
        """This part in memory, the others out of it."""
        if name in self._here:
            return
        for other in self._here - self._stay:
            self._rest(other)
        if name in self._host:
            for tensor, kept in self._host.pop(name):
                tensor.data = kept.to(tensor.device)
        elif name in self._tensors:
            read(list(self._tensors[name].values()))
        self._here.add(name)

    def _rest(self, name: str) -> None:
        self._here.discard(name)
        if name == "encoders":
            self._encoders.drop()
            return
        tensors = [tensor for tensor, _ in self._tensors[name].values()]
        if tensors and tensors[0].device.type != "cpu":
            self._host[name] = [(tensor, tensor.data.cpu()) for tensor in tensors]
        for tensor in tensors:
            tensor.data = waiting(tensor)

    @contextlib.contextmanager
    def staying(self, name: str) -> Iterator[None]:
        """One part that keeps its weights, which the block changes, while the others go on taking turns."""
        self.take(name)
        self._stay.add(name)
        try:
            yield
        finally:
            self._stay.discard(name)
            self._rest(name)


def waiting(like: Tensor, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """A tensor with the shape of another that takes no memory."""
    return torch.zeros((), dtype=dtype or like.dtype, device=device or like.device).expand(like.shape)


def read(tensors: list[tuple[Tensor, Source]]) -> None:
    """Give tensors the values stored of them, in their dtype and on their device. Raises ModelError."""
    for file in dict.fromkeys(source.file for _, source in tensors):
        mine = [(tensor, source.key) for tensor, source in tensors if source.file == file]
        while mine:
            size = 0
            with checkpoint.open_file(file) as stored:
                while mine and size < CHUNK:
                    tensor, key = mine.pop()
                    value = stored.get_tensor(key)
                    size += value.nbytes
                    tensor.data = value.to(tensor.device, tensor.dtype, copy=True)
                    del value


def load(name: str, *, device: str = "auto", dtype: str = "auto", system: str | None = None,
         student: bool = False) -> nn.Module:
    """As `checkpoint.load`, with nothing of the large parts in memory yet. UsageError for a LoRA's run."""
    path, described = checkpoint.recognised(name, system=system, student=student)
    if described.get("lora"):
        raise UsageError(f"--offload reads a model's own weights, and {name} is the run of a LoRA",
                         hint="merge it first: nexus convert RUN OUT")
    with torch.device("meta"):
        built = checkpoint.bare(described["system"], described["config"], training=False)
    sources = _sources(built, path)
    checkpoint.check_fit({n: s.shape for n, s in sources.items()}, dict(built.state_dict()), str(path))
    _empty(built, checkpoint.pick_device(device), checkpoint.DTYPES[dtype] or torch.float32)
    checkpoint.place(built, path)
    found = {n: (t, sources[n]) for n, t in (*built.named_parameters(), *built.named_buffers())}
    parts = {part: {n: found.pop(n) for n in list(found) if n.startswith(f"{part}.")} for part in PARTS}
    read(list(found.values()))
    built.turns = Turns(parts)
    for part in PARTS:
        if parts[part]:
            built.turns.join(part, built.get_submodule(part))
    if hasattr(getattr(built, "conditioner", None), "drop"):
        built.turns.encoders(built.conditioner)
    return built.requires_grad_(False).eval()


def _sources(built: nn.Module, path: Path) -> dict[str, Source]:
    """Of every tensor that sampling needs, in files checked against their manifests, other models' included."""
    found = {name: (file, name) for name, file in checkpoint.find_weights(path, built).items()}
    for part, reference in built.external.items():
        if part in dict(built.named_children()):
            other = find(reference)
            outline = checkpoint.skeleton(other)
            if hasattr(built, "admit"):
                built.admit(part, outline)
            setattr(built, part, outline.net)           # which knows the scale of its own latents
            found |= {f"{part}{name[3:]}": (file, name) for name, file in
                      checkpoint.find_weights(other, outline).items() if name.startswith("net.")}
    headers = {file: header(file)[1] for file, _ in found.values()}
    return {name: Source(file, key, headers[file][key].shape) for name, (file, key) in found.items()}


def _empty(built: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Every tensor waiting on the device."""
    for module in built.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(waiting(p, dtype, device), requires_grad=False)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = waiting(b, dtype if b.is_floating_point() else None, device)
