"""NCSN++ and DDPM++ of score SDE's code, in rectified flow's `checkpoint_N.pth`: {optimizer, model, ema, step}.

Modules are numbered in the order in which they run; shapes tell all of the architecture but the filter and the
rescaling. Trap: the average is a list of tensors without names; the sandbox names it by the model's parameters. Trap:
matrices of attention are stored as [in, out]. Trap: score models of the same architecture have the same keys; as a
velocity they are noise.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.unet_rows import layer, layers
from nexus.errors import ModelError
from nexus.models.diffusion.ncsnpp import NCSNppConfig

ROOT = "all_modules."
RES = {"norm1": "GroupNorm_0", "conv1": "Conv_0", "emb_proj": "Dense_0", "norm2": "GroupNorm_1", "conv2": "Conv_1"}
KINDS = {                                   # what tells a module's kind, the most telling first
    "NIN_3.W": "attention", "GroupNorm_1.weight": "res", "Conv2d_0.weight": "fir", "Conv_0.weight": "conv",
    "Conv.weight": "combine", "W": "fourier"}
Place = tuple[str, str, str]                # kind, native name, what the layer is called inside its foreign module


def _matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {f"{ROOT}0.weight", f"{ROOT}1.weight", f"{ROOT}2.weight", f"{ROOT}3.GroupNorm_1.weight"} <= shapes.keys() \
        or {f"{ROOT}0.W", f"{ROOT}1.weight", f"{ROOT}3.weight", f"{ROOT}4.GroupNorm_1.weight"} <= shapes.keys()


def _kinds(shapes: Shapes) -> list[str]:
    """The kind of every numbered module; a bare layer's by the axes of its weight."""
    count = 1 + max(int(k.split(".")[1]) for k in shapes if re.match(r"all_modules\.\d+\.", k))
    kinds = []
    for i in range(count):
        known = next((kind for key, kind in KINDS.items() if f"{ROOT}{i}.{key}" in shapes), None)
        bare = {1: "norm", 2: "linear", 4: "plain"}.get(len(shapes.get(f"{ROOT}{i}.weight", ())), "nothing")
        kinds.append(known or bare)
    return kinds


def _config(shapes: Shapes, foreign: dict | None) -> dict:
    kinds = _kinds(shapes)
    first = kinds.index("plain")
    channels, in_channels = shapes[f"{ROOT}{first}.weight"][:2]
    biggan = any(_shrinks(shapes, i) for i, kind in enumerate(kinds) if kind == "res")
    levels, joins = _way_down(shapes, kinds, first + 1, biggan)
    fourier = "fourier" in kinds
    side = kinds.count("norm") > 1
    joined = {"combine": "input_skip", "fir": "residual", "conv": "residual"}.get(joins[0] if joins else "", "none")
    net = {
        "in_channels": in_channels, "channels": channels, "mult": [w // channels for w, _, _ in levels],
        "blocks": levels[0][1], "attention": [i for i, (_, _, attends) in enumerate(levels) if attends],
        "block": "biggan" if biggan else "ddpm", "fir": biggan and (fourier or side or joined != "none"),
        "skip_rescale": True, "embedding": "fourier" if fourier else "positional", "scale_by_time": fourier,
        "progressive": "output_skip" if side else "none", "progressive_input": joined,
    }
    # every published picture of this family is halved down to a side of 4
    return {"net": net, "size": 4 * 2 ** (len(levels) - 1), "conditioner": {"kind": "none"}}


def _shrinks(shapes: Shapes, i: int) -> bool:
    """A biggan block that resamples: it has a skip matrix although its width stays."""
    out, width = shapes[f"{ROOT}{i}.Conv_0.weight"][:2]
    return out == width and f"{ROOT}{i}.Conv_2.weight" in shapes


def _way_down(shapes: Shapes, kinds: list[str], at: int, biggan: bool) -> tuple[list[tuple[int, int, bool]], list[str]]:
    """(width, blocks, attends) of every level, and the kinds of the modules where a shrunken picture enters."""
    resamples = sum(_shrinks(shapes, i) if kind == "res" else False for i, kind in enumerate(kinds)) if biggan else \
        sum(kind == "conv" and kinds[i - 1] != "conv" for i, kind in enumerate(kinds))
    levels, joins = [], []
    for _ in range(resamples // 2):
        width, blocks, attends = shapes[f"{ROOT}{at}.Conv_0.weight"][0], 0, False
        while kinds[at] == "attention" or kinds[at] == "res" and not _shrinks(shapes, at):
            blocks, attends, at = blocks + (kinds[at] == "res"), attends or kinds[at] == "attention", at + 1
        levels.append((width, blocks, attends))
        at += 1
        if kinds[at] in ("combine", "fir", "conv"):
            joins.append(kinds[at])
            at += 1
    if not levels:
        raise ModelError("an NCSN++ of one resolution is not known", hint="is it a checkpoint of another repository?")
    return [*levels, (shapes[f"{ROOT}{at}.Conv_0.weight"][0], levels[0][1], kinds[at + 1] == "attention")], joins


def _unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    filtered = ("net.fir",) if any(f"{ROOT}{i}.Conv_2.weight" in shapes for i in range(len(_kinds(shapes)))) else ()
    return (*filtered, "net.skip_rescale", "net.scale_by_time", "size")


def _writable(config: dict) -> NCSNppConfig:
    if "embedding" not in config["net"]:
        raise ModelError("this layout holds an NCSN++ alone", hint="a DiT of minRF's goes --to minrf")
    net = NCSNppConfig.parse(config["net"])
    if net.num_classes or net.num_styles:
        raise ModelError("NCSN++ files hold no labels", hint="only an unconditional model can be written")
    return net


def _constants(config: dict) -> dict[str, Tensor]:
    _writable(config)
    return {}


def _places(net: NCSNppConfig) -> Iterator[Place]:
    """Every module in the order of its number."""
    if net.embedding == "fourier":
        yield "fourier", "time", ""
    yield from (("layer", "time.fc1", ""), ("layer", "time.fc2", ""), ("layer", "conv_in", ""))
    join = {"input_skip": ("layer", "", "Conv"), "residual": ("layer", ".conv", "Conv2d_0" if net.fir else "Conv_0")}
    last = len(net.mult) - 1
    for i in range(last + 1):
        for j in range(net.blocks):
            yield "res", f"down.{i}.res.{j}", ""
            if i in net.attention:
                yield "attention", f"down.{i}.attn.{j}", ""
        if i < last:
            yield from _resample(net, f"down.{i}.resample")
            if net.progressive_input in join:
                kind, native, foreign = join[net.progressive_input]
                yield kind, f"down.{i}.join{native}", foreign
    yield from (("res", "mid.res.0", ""), ("attention", "mid.attn.0", ""), ("res", "mid.res.1", ""))
    for i in range(last + 1):
        yield from (("res", f"up.{i}.res.{j}", "") for j in range(net.blocks + 1))
        if last - i in net.attention:
            yield "attention", f"up.{i}.attn.0", ""
        if net.progressive == "output_skip":
            yield from (("layer", f"up.{i}.side.norm", ""), ("layer", f"up.{i}.side.conv", ""))
        if i < last:
            yield from _resample(net, f"up.{i}.resample")
    if net.progressive == "none":
        yield from (("layer", "out.norm", ""), ("layer", "out.conv", ""))


def _resample(net: NCSNppConfig, native: str) -> Iterator[Place]:
    yield ("res", native, "") if net.block == "biggan" else ("layer", f"{native}.conv", "Conv_0")


def _matrix(native: str, *foreign: str, op: str = "transpose") -> list[Row]:
    """A linear layer that the file keeps as W [in, out] and b."""
    return [Row(f"{native}.weight", tuple(f"{f}.W" for f in foreign), op=op),
            Row(f"{native}.bias", tuple(f"{f}.b" for f in foreign))]


def _table(config: dict) -> list[Row]:
    net, rows = _writable(config), []
    for number, (kind, native, inner) in enumerate(_places(net)):
        foreign = f"{ROOT}{number}" + (f".{inner}" if inner else "")
        if kind == "fourier":
            rows.append(Row("time.freqs", f"{foreign}.W"))
        elif kind == "layer":
            rows += layer(native, foreign)
        elif kind == "res":
            rows += layers(native, foreign, RES)
            rows += layer(f"{native}.skip", f"{foreign}.Conv_2") if net.block == "biggan" else \
                _matrix(f"{native}.skip", f"{foreign}.NIN_0", op="matrix_to_conv")
        else:
            rows += [*layer(f"{native}.norm", f"{foreign}.GroupNorm_0"),
                     *_matrix(f"{native}.qkv", *(f"{foreign}.NIN_{i}" for i in range(3))),
                     *_matrix(f"{native}.proj", f"{foreign}.NIN_3")]
    return rows


LAYOUTS = (
    Layout("original", "rectified-flow", "net", _matches, _config, _table, unsaid=_unsaid, drop=("sigmas",),
           constants=_constants),
)
