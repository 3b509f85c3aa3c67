"""The one door for pickled checkpoints: a child process with limits that copies their tensors to safetensors.

The child loads with `weights_only`, which builds tensors and plain containers and calls nothing else; memory and
processor time are bounded besides, so a bomb ends the child and not the command.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from nexus.errors import ModelError

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".th")
SPARE_MEMORY = 2 << 30                 # beside what the interpreter has mapped and 4 times the file
SPARE_SECONDS = 60
BYTES_PER_SECOND = 10_000_000          # no disk that is worth using is slower
MAX_DEPTH = 8
TEXT, TEXT_LIMIT = "xp.cfg", 1_000_000
# What training scripts leave in their checkpoints beside weights; it loads as an empty shell, its code is never run.
BAGGAGE = (
    "argparse.Namespace",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
)


class Shell:
    """Stands for an object of BAGGAGE."""


def unpickle(source: Path, out: Path) -> None:
    """Copy the tensors of a pickled checkpoint to the safetensors file `out`, names of nested dicts joined by dots.

    Raises ModelError when the file is damaged, unsafe, or needs more than a file of its size should.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    size = source.stat().st_size
    try:
        child = subprocess.run(
            [sys.executable, "-m", "nexus.convert.sandbox", str(source.absolute()), str(out.absolute())],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=2 * SPARE_SECONDS + 2 * size / BYTES_PER_SECOND)
    except subprocess.TimeoutExpired:
        raise _too_much(source) from None
    if child.returncode == ModelError.code:
        found = json.loads(child.stdout)
        raise ModelError(f"{source}: {found['message']}", hint=found["hint"])
    if child.returncode < 0 or "MemoryError" in child.stderr:
        raise _too_much(source)
    if child.returncode:
        said = child.stderr.strip().splitlines() or ["no message"]
        raise ModelError(f"{source} could not be read: {said[-1]:.300}", hint="nexus doctor")


def _too_much(source: Path) -> ModelError:
    return ModelError(f"{source}: refused: it needs more memory or time than a file of its size should",
                      hint="ask its author for a safetensors file")


def main(source: str, out: str) -> int:
    """The child: 0, or ModelError's code with {"message", "hint"} as JSON on stdout."""
    import torch

    torch.set_num_threads(1)
    size = os.path.getsize(source)
    _limit(size)
    try:
        copy_tensors(source, out)
        return 0
    except ModelError as error:
        message = str(error).encode("utf-8", "backslashreplace").decode()
        sys.stdout.write(json.dumps({"message": message, "hint": error.hint}))
        return ModelError.code


def copy_tensors(source: str, out: str) -> None:
    """What the child does. Raises ModelError, or MemoryError when a limit strikes."""
    import torch
    from safetensors.torch import save_file

    with torch.serialization.safe_globals([(Shell, name) for name in BAGGAGE]):
        try:
            _refuse_bomb(source, os.path.getsize(source))
            loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
            save_file(_flat(_named_average(loaded)), out, metadata=_texts(loaded))
        except (MemoryError, ModelError):
            raise
        except Exception as error:                        # noqa: BLE001 - a hostile file can raise anything
            raise _refusal(str(error) or type(error).__name__) from None


def _limit(size: int) -> None:
    if sys.platform != "linux":
        return
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + SPARE_SECONDS + size // BYTES_PER_SECOND
    for name, limit in (("RLIMIT_AS", pages * resource.getpagesize() + 4 * size + SPARE_MEMORY),
                        ("RLIMIT_CPU", seconds), ("RLIMIT_FSIZE", 4 * size + SPARE_MEMORY), ("RLIMIT_CORE", 0)):
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))


def _refuse_bomb(source: str, size: int) -> None:
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 2 * size + (1 << 20):
            raise ModelError(f"refused as unsafe: {size:,} bytes that unpack to {unpacked:,}",
                             hint="PyTorch does not compress its checkpoints; do not trust this one")


def _named_average(loaded):
    """An average that is a bare list, in the order of the model's trained parameters (score SDE's `shadow_params`),
    under the model's names; what it leaves out, buffers and fixed frequencies, is the model's own."""
    import torch

    model, ema = (loaded.get(key) for key in ("model", "ema")) if isinstance(loaded, dict) else (None, None)
    listed = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(model, dict) or not isinstance(listed, list | tuple):
        return loaded
    named, left = {}, list(listed)
    for name, tensor in model.items():
        match = left and isinstance(tensor, torch.Tensor) and getattr(left[0], "shape", None) == tensor.shape
        named[name] = left.pop(0) if match else tensor
    if left:
        raise ModelError(f"its list of averages does not follow its model: {len(left)} of {len(listed)} have no name",
                         hint="is it a checkpoint of another repository?")
    return {**loaded, "ema": named}


def _texts(loaded) -> dict[str, str]:
    """The configuration that audiocraft leaves beside its weights, as the plain text it is."""
    text = loaded.get(TEXT) if isinstance(loaded, dict) else None
    return {TEXT: text} if isinstance(text, str) and len(text) <= TEXT_LIMIT else {}


def _flat(loaded) -> dict:
    """Every tensor below string keys. Optimiser states, which are kept by number, are left behind."""
    import torch

    if isinstance(loaded, torch.Tensor):
        loaded = {"tensor": loaded}
    out, storages, containers, stack = {}, set(), set(), [("", loaded, 0)]
    while stack:
        name, value, depth = stack.pop()
        if isinstance(value, torch.Tensor):
            out[name] = _own(value, storages, name)
        elif isinstance(value, dict) and id(value) not in containers:
            containers.add(id(value))                     # a pickle can hold a dict that holds itself
            if depth > MAX_DEPTH:
                raise ModelError(f"its containers are nested deeper than {MAX_DEPTH}", hint="is it a checkpoint?")
            stack += [(f"{name}.{key}" if name else key, inner, depth + 1)
                      for key, inner in value.items() if isinstance(key, str)]
    if not out:
        raise ModelError("it holds no named tensors", hint="a checkpoint is a state dict, or a dict of them")
    return out


def _own(tensor, seen: set, name: str):
    """The tensor in memory of its own, because safetensors refuses shared storage."""
    import torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        raise ModelError(f"{name} is a sparse, quantised or complex tensor, which no model here holds",
                         hint="save it with plain dense weights")
    storage = tensor.untyped_storage()
    shared = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
    seen.add(storage.data_ptr())
    tensor = tensor.detach()
    return tensor.clone(memory_format=torch.contiguous_format) if shared else tensor.contiguous()


def _refusal(message: str) -> ModelError | MemoryError:
    if "allocate memory" in message:
        return MemoryError()
    first, ask = message.splitlines()[0], "ask its author for safetensors or a plain state dict"
    if name := re.search(r"GLOBAL (\S+)", message):
        return ModelError(f"refused as unsafe: opening it would run {name[1]}", hint=ask)
    if "weights_only" in message and "corrupted" not in message:
        inner = re.search(r"WeightsUnpickler error:\s*(.{1,120})", message)
        return ModelError(f"refused as unsafe: not plain weights ({inner[1] if inner else first:.200})", hint=ask)
    return ModelError(f"damaged, or not a checkpoint: {first.split('. ')[0]:.200}", hint="fetch it again")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
