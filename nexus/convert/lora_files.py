"""Files of low-rank updates in the public layouts: PEFT's, diffusers' (new and old) and kohya's, read and written.

One update is a pair A, B of a layer that a name in some network's public naming stands for. PEFT: NAME.lora_A.weight
below "base_model.model.", alpha in adapter_config.json. diffusers: the same below "unet." or "transformer.", alpha in
the file's metadata; before 2023 NAME.processor.to_q_lora.down.weight. kohya: lora_unet_NAME with _ for each dot,
.lora_down.weight, .lora_up.weight and .alpha.
"""

import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nexus import checkpoint
from nexus.convert import stream
from nexus.convert.detect import Source, opened, read
from nexus.errors import ModelError

FORMS = ("diffusers", "peft", "kohya")
METADATA = "lora_adapter_metadata"
# Of a text encoder the number follows; "" is the network.
PARTS = {"unet.": "", "transformer.": "", "model.diffusion_model.": "", "diffusion_model.": "", "lora_unet_": "",
         "lora_transformer_": "", "text_encoder.": "0", "text_encoder_2.": "1", "text_encoder_3.": "2",
         "lora_te_": "0", "lora_te1_": "0", "lora_te2_": "1", "lora_te3_": "2"}
_KEYS = tuple(re.compile(p) for p in (
    r"(?P<name>.+)\.lora_(?P<side>A|B)(\.[^.]+)?\.weight", r"(?P<name>.+)\.lora_(?P<side>down|up)\.weight",
    r"(?P<name>.+)\.lora(_linear_layer)?\.(?P<side>down|up)(\.weight)?",
    r"(?P<name>.+?)(\.processor)?\.(?P<proj>to_(q|k|v|out)|add_._proj)_lora\.(?P<side>down|up)\.weight",
    r"(?P<name>.+)\.(?P<side>alpha)"))
_SIDES = {"A": "down", "B": "up"}


class Update(NamedTuple):
    """One pair. part: "" for the network, else the number of the text encoder. name: as the file has it.

    down [rank, in, *kernel], up [out, rank, ...], scale: what up @ down is multiplied by. key: one key of the file.
    """

    part: str
    name: str
    down: Tensor
    up: Tensor
    scale: float
    key: str

    @property
    def dotless(self) -> bool:
        """Whether the name has _ in place of dots."""
        return self.key.startswith("lora_")


def read_updates(path: Path) -> list[Update]:
    """All updates of a file or folder. Raises ModelError for a damaged one, and for adapters of another kind."""
    with opened(path) as sources:
        source = sources[0]
        state, said = read(source), _settings(path, source)
    grouped: dict[tuple[str, str], dict[str, tuple[str, Tensor]]] = {}
    for key in sorted(state):
        part, name, side = _parsed(path, key)
        grouped.setdefault((part, name), {})[side] = key, state[key]
    found = []
    for (part, name), sides in grouped.items():
        if missing := {"down", "up"} - sides.keys():
            raise ModelError(f"{path} has {next(iter(sides.values()))[0]} but not the {min(missing)} matrix beside it")
        (key, down), (_, up) = sides["down"], sides["up"]
        if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down) or up[0, 0].numel() != 1:
            raise ModelError(f"{path}: {key} is {list(down.shape)} and its partner {list(up.shape)}, which do not "
                             "multiply")
        alpha = float(sides["alpha"][1]) if "alpha" in sides else None
        found.append(Update(part, name, down, up, _scale(said, part, name, len(down), alpha), key))
    if not found:
        raise ModelError(f"{path} holds no low-rank updates")
    return found


def _parsed(path: Path, key: str) -> tuple[str, str, str]:
    """Part, name and side of a key; ModelError for one that no plain LoRA has."""
    found = next((m for pattern in _KEYS if (m := pattern.fullmatch(key))), None)
    if found is None:
        raise ModelError(f"{path}: {key} is not of a plain LoRA",
                         hint="DoRA, LoHa, LoKr and stored differences of whole weights are other kinds of adapters")
    name, side = found["name"].removeprefix("base_model.model."), found["side"]
    part = next((p for p in PARTS if name.startswith(p)), None)
    number = "" if part is None else PARTS[part]
    name = name if part is None else name.removeprefix(part)
    proj = found.groupdict().get("proj")
    if proj and number:
        name = f"{name}.{proj.removeprefix('to_')}_proj"
    elif proj:
        name = f"{name}.{proj}{'.0' if proj == 'to_out' else ''}"
    return number, name, _SIDES.get(side, side)


def _settings(path: Path, source: Source) -> dict:
    """adapter_config.json beside the weights, or the file's own metadata; {} when there is neither."""
    file = next((stored.file for stored in source.tensors.values()), path)
    try:
        if path.is_dir() and (path / "adapter_config.json").is_file():
            said = json.loads((path / "adapter_config.json").read_text("utf-8"))
        else:
            with checkpoint.open_file(file) as opened_file:
                said = json.loads((opened_file.metadata() or {}).get(METADATA, "{}"))
        if said.get("use_dora"):
            raise ModelError(f"{path} is a DoRA, which is another kind of adapter", hint="a plain LoRA is needed")
        return dict(said)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"the description of {path} is damaged: {error}") from None


def _scale(said: dict, part: str, name: str, rank: int, alpha: float | None) -> float:
    """alpha / rank, by the layer's own key, a pattern of the settings, or the settings; 1 when nothing is said."""
    prefixes = ("", "unet.", "transformer.") if not part else (f"text_encoder{'' if part == '0' else '_2'}.",)
    of = {key.removeprefix(p): value for p in prefixes for key, value in said.items() if key.startswith(p)}
    try:
        if alpha is None:
            patterns = dict(of.get("alpha_pattern") or {})          # PEFT's rule: expressions, of a name's end
            named = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", name)), None)
            alpha = of.get("lora_alpha", rank) if named is None else named
        scale = float(alpha) / (math.sqrt(rank) if of.get("use_rslora") else rank)
    except (TypeError, ValueError, re.error):
        raise ModelError(f"the alpha of {name} is not a number, or its pattern no expression") from None
    if not math.isfinite(scale):
        raise ModelError(f"the alpha of {name} is {alpha}")
    return scale


def file_of(updates: Iterable[Update], form: str, *, prefix: str = "unet") -> bytes:
    """A .safetensors file in a form of FORMS; updates of the network alone, in dotted names, tensors as they are kept.

    prefix: "unet" or "transformer", what diffusers calls the network. PEFT's wants `adapter_settings` beside it as
    adapter_config.json. Raises ModelError for scales that differ in a form which has one alpha.
    """
    updates, state = list(updates), {}
    for one in updates:
        base = {"diffusers": f"{prefix}.{one.name}", "peft": f"base_model.model.{one.name}",
                "kohya": "lora_unet_" + one.name.replace(".", "_")}[form]
        down, up = ("lora_down", "lora_up") if form == "kohya" else ("lora_A", "lora_B")
        state |= {f"{base}.{down}.weight": one.down, f"{base}.{up}.weight": one.up}
        if form == "kohya":
            state[f"{base}.alpha"] = torch.tensor(one.scale * len(one.down))
    metadata = {"format": "pt"}
    if form == "diffusers":
        said = adapter_settings(updates)
        metadata[METADATA] = json.dumps({f"{prefix}.{k}": v for k, v in said.items()}, sort_keys=True)
    file = io.BytesIO()         # not the library's writer, whose metadata's order differs from run to run
    stream.write_tensors(file, stream.ready({k: t.detach().cpu() for k, t in state.items()}), metadata)
    return file.getvalue()


def adapter_settings(updates: list[Update]) -> dict:
    """PEFT's description: rank, alpha and the layers' names. Raises ModelError when ranks or scales differ."""
    ranks, scales = {len(one.down) for one in updates}, {one.scale for one in updates}
    if len(ranks) > 1 or len(scales) > 1:
        raise ModelError("PEFT's description has one rank and one alpha, these updates have several",
                         hint="write them in the form kohya")
    rank, scale = ranks.pop(), scales.pop()
    alpha = rank * scale
    return {"peft_type": "LORA", "r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "target_modules": sorted(one.name for one in updates), "bias": "none", "use_dora": False}
