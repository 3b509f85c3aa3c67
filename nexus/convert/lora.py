"""Low-rank updates of a system: found by the key tables of its network, merged, trained, and written for others.

A LoRA's key is its layer's foreign name and a suffix, so whatever network has a layout has LoRA. Where one native
layer stands for several foreign ones (q, k and v), each of those updates its own rows: the fused B is block-diagonal.
Which rows is asked of the table itself: row numbers are sent through it in place of a weight.
"""

import contextlib
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nexus import catalog, checkpoint
from nexus.convert.export import layouts_of
from nexus.convert.keymap import Row, to_foreign
from nexus.convert.lora_files import Update, file_of, read_updates
from nexus.convert.lora_text import TextUpdates
from nexus.errors import InputError, ModelError, UsageError
from nexus.nn.lora import LoRAConfig, attach, merge, unmerge
from nexus.requests import weighted_file

PREFERRED = "diffusers"
ATTENTION = ("qkv", "q", "kv", "proj", "proj1", "proj2", "cross_q", "cross_kv", "cross_proj")
FOREIGN_ATTENTION = tuple(f".{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj",
                                                  "add_v_proj", "to_add_out"))
WHOLE_MODEL = "model.diffusion_model."


class Slot(NamedTuple):
    """A layer of a public naming. native: its layer in the network. order [rows]: the native row of each of its rows.

    ndim: of its weight, 2 for a linear layer, 4 for a convolution. shape: the native weight's.
    """

    foreign: str
    native: str
    order: Tensor
    ndim: int
    shape: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, int]:
        """The native rows, first to last + 1."""
        return int(self.order.min()), int(self.order.max()) + 1


class Fitted(NamedTuple):
    """An update and where it goes."""

    update: Update
    slot: Slot
    weight: float


def _layers(net: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def _slots(net: nn.Module, table: list[Row]) -> list[Slot]:
    """Every layer of a layout; what the layout repeats or turns around has none."""
    found = []
    for native, layer in _layers(net).items():
        shape = tuple(layer.weight.shape)
        probe = torch.arange(shape[0], dtype=torch.float64, device="cpu").view(-1, *[1] * (len(shape) - 1))
        parts = to_foreign(table, {f"{native}.weight": probe}, copies=2)
        whole = [part for key, part in parts.items() if key.endswith(".weight") and part.shape[0] == part.numel()]
        if len(whole) == len(parts) and sum(map(len, whole)) == shape[0]:
            found += [Slot(key.removesuffix(".weight").removeprefix(WHOLE_MODEL), native, part.flatten().long(),
                           part.ndim, shape) for key, part in parts.items()]
    return found


def _own(net: nn.Module) -> list[Slot]:
    """Every layer under its native name."""
    weights = {name: layer.weight for name, layer in _layers(net).items()}
    return [Slot(name, name, torch.arange(len(weight), device="cpu"), weight.ndim, tuple(weight.shape))
            for name, weight in weights.items()]


def _namings(name: str, system: nn.Module) -> list[list[Slot]]:
    """The layers in each public naming of the network, the one to write in first, and at last in the native one."""
    config, data = system.config, system.config.to_json()
    found = []
    for layout in sorted(layouts_of(name, config), key=lambda one: one.name != PREFERRED):
        with contextlib.suppress(ModelError, InputError):           # it has no place for some part of this network
            found += [_slots(system.net, layout.table(data))] if layout.part == "net" else []
    return [*found, _own(system.net)]


# --- training ------------------------------------------------------------------------------------------------------

class Adapter(NamedTuple):
    """What a system in LoRA training carries besides its branches: the naming to write them in, and their settings."""

    slots: tuple[Slot, ...]
    spec: LoRAConfig
    prefix: str

    def file(self, tensors: dict[str, Tensor]) -> bytes:
        """The branches' tensors, by their names in the system, as a .safetensors file in diffusers' layout."""
        return file_of(self.updates(tensors), "diffusers", prefix=self.prefix)

    def updates(self, tensors: dict[str, Tensor]) -> list[Update]:
        """One update a slot."""
        found, seen = [], {}
        for slot in self.slots:
            base, rank = f"net.{slot.native}.lora", self.spec.rank
            part, row = seen.get(slot.native, (0, 0))
            end = row + len(slot.order)
            seen[slot.native] = part + 1, end
            down, up = tensors[f"{base}.down"][part * rank:(part + 1) * rank], tensors[f"{base}.up"][row:end]
            kernel = slot.shape[2:] or (1,) * (slot.ndim - 2)       # a foreign 1x1 convolution is linear here, or not
            down = down.reshape(rank, slot.shape[1], *(kernel if slot.ndim > 2 else ()))
            up = up[slot.order - slot.rows[0]].reshape(*up.shape, *[1] * (slot.ndim - 2))
            found.append(Update("", slot.foreign, down, up, self.spec.scale, slot.foreign))
        return found


def adapt(system: nn.Module, name: str, spec: LoRAConfig) -> None:
    """Freeze a system and give its network branches, which are then all that is trained and saved.

    name: its catalog name. Raises UsageError when there is nothing to adapt.
    """
    if getattr(system.config, "medium", "image") == "audio":
        raise UsageError(f"'{name}' takes no LoRA: its network reads weights past their layers, and branches with them",
                         hint=f"nexus train {name} --init MODEL goes on with all of it")
    chosen = [slot for slot in _namings(name, system)[0] if _wanted(system.net, slot, spec.targets)]
    if not chosen:
        raise UsageError(f"'{name}' has no layer for --lora targets={spec.targets}",
                         hint="targets=linear or targets=all")
    chosen.sort(key=lambda slot: (slot.native, slot.rows))
    targets: dict[str, tuple] = {}
    for slot in chosen:
        targets[slot.native] = (*targets.get(slot.native, ()), slot.rows)
    system.requires_grad_(False)
    attach(system.net, targets, spec.rank, spec.scale)
    kind = type(system.net).__name__
    system.adapter = Adapter(tuple(chosen), spec, "unet" if kind in ("UNet", "NCSNpp") else "transformer")


def _wanted(net: nn.Module, slot: Slot, targets: str) -> bool:
    if targets == "attn":
        return slot.native.rpartition(".")[2] in ATTENTION or slot.foreign.endswith(FOREIGN_ATTENTION)
    return targets == "all" or isinstance(net.get_submodule(slot.native), nn.Linear)


# --- loading -------------------------------------------------------------------------------------------------------

class Merged(NamedTuple):
    """What `undo` puts back: the weights that were changed, and the text encoders' updates before."""

    system: Any
    kept: dict[str, Tensor]
    extras: tuple | None

    def undo(self) -> None:
        """The system as it was, bit for bit."""
        unmerge(self.system.net, self.kept)
        if self.extras is not None:
            self.system.conditioner.dress(self.extras)


def merge_files(system: nn.Module, references: Sequence[str], *, text: bool = True) -> Merged:
    """Merge FILE[:WEIGHT]s into a system's network, and with `text` into its pretrained text encoders.

    Raises ModelError naming the first key of a file that fits nothing.
    """
    fitted, words = read_files(system, references)
    extras = None
    if words:
        if not text:
            raise ModelError(f"{words[0][2]} changes the text encoders too, which cannot be merged into a model's file",
                             hint="give it with nexus sample --lora instead")
        extras = system.conditioner.extras
    kept = merge(system.net, _deltas(fitted))
    if extras is not None:
        system.conditioner.dress((*extras, TextUpdates([(one, weight) for one, weight, _ in words], words[0][2])))
    return Merged(system, kept, extras)


def read_files(system: nn.Module, references: Sequence[str]) -> tuple[list[Fitted], list[tuple[Update, float, str]]]:
    """The updates of FILE[:WEIGHT]s for a system's network, and (update, weight, file) of its text encoders.

    The system may be on the meta device. Raises ModelError naming the first key of a file that fits nothing.
    """
    names, fitted, words = _known(catalog.name_of(system.config), system), [], []
    for reference in references:
        path, weight = weighted_file(reference)
        updates = _updates(Path(path))
        fitted += [Fitted(one, _place(Path(path), one, names), weight) for one in updates if not one.part]
        words += [(one, weight, path) for one in updates if one.part]
    if words and not hasattr(system.conditioner, "dress"):
        one, _, path = words[0]
        raise ModelError(f"{path} is no LoRA for this model: {one.key} is of a text encoder, and it has none",
                         hint="the LoRA was made for a model with CLIP")
    return fitted, words


def _updates(path: Path) -> list[Update]:
    """A file's, a folder's, or those of a LoRA run."""
    if path.is_dir() and not any((path / n).is_file() for n in ("adapter_config.json", "adapter.safetensors")):
        found = checkpoint.find(str(path)) if (path / "config.json").exists() else path
        path = found / "adapter.safetensors" if (found / "adapter.safetensors").is_file() else path
    elif (path / "adapter.safetensors").is_file():
        path = path / "adapter.safetensors"
    return read_updates(path)


def _known(name: str, system: nn.Module) -> tuple[dict[str, Slot], dict[str, Slot]]:
    """Slots by name, and by name with _ for each dot; of two namings that share a name the first counts."""
    slots = [slot for naming in reversed(_namings(name, system)) for slot in naming]
    return {s.foreign: s for s in slots}, {s.foreign.replace(".", "_"): s for s in slots}


def _place(path: Path, update: Update, names: tuple[dict[str, Slot], dict[str, Slot]]) -> Slot:
    known = names[update.dotless]
    slot = known.get(update.name)
    if slot is None:
        near = difflib.get_close_matches(update.name, known, 1, cutoff=0.0)
        raise ModelError(f"{path} is no LoRA for this model: {update.key} fits nothing in it; the nearest layer is "
                         f"{near[0] if near else 'none'}",
                         hint="is it for another model, such as SDXL in place of SD 1?")
    rows, columns = len(update.up), update.down[0].numel()
    if rows != len(slot.order) or columns != math.prod(slot.shape[1:]):
        raise ModelError(f"{path} is no LoRA for this model: {update.key} is of a layer [{rows}, {columns}], and "
                         f"{slot.foreign} is [{len(slot.order)}, {math.prod(slot.shape[1:])}]",
                         hint="is it for another size of this model?")
    return slot


def _deltas(fitted: list[Fitted]) -> Iterator[tuple[str, Tensor]]:
    """Each native layer's update, summed over all files."""
    layers: dict[str, list[Fitted]] = {}
    for one in fitted:
        layers.setdefault(one.slot.native, []).append(one)
    for native, parts in layers.items():
        whole = torch.zeros(parts[0].slot.shape)
        for update, slot, weight in parts:
            change = update.up.float().flatten(1) @ update.down.float().flatten(1)
            whole[slot.order] += weight * update.scale * change.unflatten(1, slot.shape[1:])
        yield native, whole
