"""EnCodec: the files of facebookresearch/encodec and audiocraft, and transformers' EncodecModel folders.

A bare state dict tells the sizes and not how it pads, its rate or its loudness: those are taken from the published
codec that is built alike. audiocraft's files hold their settings beside the weights.
"""

import math
import re
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.codecs.encodec import EncodecConfig
from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.errors import ModelError

NORMS = {"weight_norm": "weight", "time_group_norm": "group"}
UNTOLD = ("rate", "causal", "padding", "trim_right", "normalize", "segment", "overlap", "choices", "dilation")
# Settings that this codec has in one value only (the first; absent counts as it).
FIXED = {"activation": ("ELU",), "activation_params": ({"alpha": 1.0}, {"alpha": 1}, {}),
         "disable_norm_outer_blocks": (0,), "final_activation": (None,)}


class Names(NamedTuple):
    """What a layout calls things: the list of layers, a convolution (up: one that doubles the rate), its parts."""

    layers: str
    conv: str
    up: str
    norm: str
    gain: str
    weight: str
    book: str


ORIGINAL = Names("model", "conv.conv", "convtr.convtr", "norm", "weight_g", "weight_v", "vq.layers.{}._codebook")
NEW = Names("layers", "conv", "conv", "norm", "parametrizations.weight.original0", "parametrizations.weight.original1",
            "layers.{}.codebook")
OLD = NEW._replace(gain="weight_g", weight="weight_v")


def rows(net: EncodecConfig, names: Names, prefix: str = "") -> list[Row]:
    """All rows of a codec's network; prefix: where it lies in a larger checkpoint."""
    made = [row for native, place, up in _convs(net)
            for row in _conv(native, f"{prefix}{place.format(names.layers)}", names, net.norm, up)]
    at = {"encoder": 1 + len(net.ratios) * (net.blocks + 2), "decoder": 1}
    made += [Row(f"{side}.recurrent.lstm.{part}_l{i}", f"{prefix}{side}.{names.layers}.{place}.lstm.{part}_l{i}")
             for side, place in at.items() for i in range(net.lstm)
             for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    return made + [Row(f"quantizer.books.{i}.{end}", f"{prefix}quantizer.{names.book.format(i)}.{end}")
                   for i in range(net.quantizers) for end in ("embed", "cluster_size", "embed_avg")]


def started(net: EncodecConfig, names: Names, prefix: str = "") -> dict[str, Tensor]:
    """The marks of codebooks that have had their k-means."""
    return {f"{prefix}quantizer.{names.book.format(i)}.inited": torch.ones(1) for i in range(net.quantizers)}


def _convs(net: EncodecConfig) -> list[tuple[str, str, bool]]:
    """(native name, foreign place with {} for its list, whether it goes up) of every convolution.

    A foreign list counts activations and the LSTM as layers.
    """
    step, last = net.blocks + 2, 1 + len(net.ratios) * (net.blocks + 2) + (2 if net.lstm else 1)
    out = [(f"{side}.first", f"{side}.{{}}.0", False) for side in ("encoder", "decoder")]
    out += [(f"{side}.last", f"{side}.{{}}.{last}", False) for side in ("encoder", "decoder")]
    for i in range(len(net.ratios)):
        down, up = 1 + i * step, (2 if net.lstm else 1) + i * step
        out += [(f"encoder.stages.{i}.resample", f"encoder.{{}}.{down + step - 1}", False),
                (f"decoder.stages.{i}.resample", f"decoder.{{}}.{up + 1}", True)]
        for j in range(net.blocks):
            for side, place in (("encoder", down + j), ("decoder", up + 2 + j)):
                block, there = f"{side}.stages.{i}.blocks.{j}", f"{side}.{{}}.{place}"
                out += [(f"{block}.conv1", f"{there}.block.1", False), (f"{block}.conv2", f"{there}.block.3", False)]
                out += [(f"{block}.shortcut", f"{there}.shortcut", False)] if net.shortcut == "conv" else []
    return out


def _conv(native: str, place: str, names: Names, norm: str, up: bool) -> list[Row]:
    conv = f"{place}.{names.up if up else names.conv}"
    out = [Row(f"{native}.conv.bias", f"{conv}.bias")]
    if norm == "weight":
        return [*out, Row(f"{native}.gain", f"{conv}.{names.gain}"),
                Row(f"{native}.conv.weight", f"{conv}.{names.weight}")]
    beside, ends = f"{conv.rpartition('.')[0]}.{names.norm}", ("weight", "bias") if norm == "group" else ()
    return [*out, Row(f"{native}.conv.weight", f"{conv}.weight"),
            *(Row(f"{native}.norm.{end}", f"{beside}.{end}") for end in ends)]


# --- what a checkpoint tells ---------------------------------------------------------------------------------------

def _matches(shapes: Shapes, foreign: dict | None, *, names: Names) -> bool:
    first = f"encoder.{names.layers}.0.{names.conv}"
    return f"quantizer.{names.book.format(0)}.embed" in shapes \
        and any(len(shapes.get(f"{first}.{end}", ())) == 3 for end in (names.weight, "weight")) \
        and (f"{first}.weight" not in shapes or names != OLD)


def sizes(shapes: Shapes, names: Names, prefix: str = "") -> dict:
    """What the shapes of a network's tensors tell of its configuration."""
    below, weight = f"{prefix}encoder.{names.layers}.", f"(?:{re.escape(names.weight)}|weight)"
    conv = re.compile(rf"(\d+)\.{re.escape(names.conv)}\.{weight}")
    inside = re.compile(rf"(\d+)\.block\.1\.{re.escape(names.conv)}\.{weight}")
    mine = {key.removeprefix(below): shape for key, shape in shapes.items() if key.startswith(below)}
    convs = {int(m[1]): shape for key, shape in mine.items() if (m := conv.fullmatch(key))}
    blocks = {int(m[1]): shape for key, shape in mine.items() if (m := inside.fullmatch(key))}
    if len(convs) < 3 or not blocks:
        raise ModelError("an EnCodec without residual blocks or resampling", hint="nexus convert --check")
    first, *strided, last = (convs[i] for i in sorted(convs))
    block = blocks[min(blocks)]
    books = re.compile(re.escape(f"{prefix}quantizer.{names.book}.embed").replace(r"\{\}", r"\d+"))
    found = [shape for key, shape in shapes.items() if books.fullmatch(key)]
    return {"channels": first[1], "filters": first[0], "kernel": first[2], "dim": last[0], "last_kernel": last[2],
            "ratios": [shape[2] // 2 for shape in reversed(strided)], "blocks": len(blocks) // len(strided),
            "block_kernel": block[2], "compress": max(1, block[1] // block[0]),
            "lstm": sum("lstm.weight_ih" in key for key in mine),
            "norm": "weight" if any(key.endswith(names.weight) for key in mine) else
                    "group" if any(key.endswith(f".{names.norm}.weight") for key in mine) else "none",
            "shortcut": "conv" if any(".shortcut." in key for key in mine) else "identity",
            "quantizers": len(found), "bins": found[0][0]}


def _usual(told: dict) -> dict:
    """What the published codec that is built alike has, where the shapes do not tell."""
    name = "48khz" if told["norm"] == "group" else "24khz" if told["shortcut"] == "conv" else "32khz"
    usual = EncodecConfig.preset(name).to_json()
    fitting = [n for n in usual["choices"] if n <= told["quantizers"]]
    return {key: usual[key] for key in UNTOLD} | {"choices": fitting}


def _original_config(shapes: Shapes, foreign: dict | None) -> dict:
    told = sizes(shapes, ORIGINAL)
    said = (foreign or {}).get("xp.cfg")
    return {"net": _usual(told) | told | (audiocraft(said) if said else {})}


def audiocraft(said: dict) -> dict:
    """What the settings of an audiocraft experiment tell beyond the shapes."""
    seanet, outer, rvq = (said.get(name) or {} for name in ("seanet", "encodec", "rvq"))
    for name, allowed in FIXED.items():
        for found in (seanet, seanet.get("encoder") or {}, seanet.get("decoder") or {}):
            if found.get(name, allowed[0]) not in allowed:
                raise ModelError(f"{name} is {found[name]!r}, this codec has {allowed[0]!r}")
    if outer.get("autoencoder", "seanet") != "seanet" or outer.get("quantizer", "rvq") != "rvq":
        raise ModelError("this compression model is no EnCodec", hint="SEANet with residual codebooks is one")
    told = {"rate": outer.get("sample_rate"), "causal": seanet.get("causal", outer.get("causal")),
            "normalize": outer.get("renormalize"), "padding": seanet.get("pad_mode"),
            "dilation": seanet.get("dilation_base"),
            "trim_right": (seanet.get("decoder") or {}).get("trim_right_ratio")}
    counts = list(range(1, rvq["n_q"] + 1)) if rvq.get("q_dropout") and isinstance(rvq.get("n_q"), int) else []
    return {key: value for key, value in told.items() if value is not None} | {
        "segment": None, "overlap": 0.0, "choices": counts}


def _untold(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    usual = {} if (foreign or {}).get("xp.cfg") else _usual(sizes(shapes, ORIGINAL))
    return tuple(f"net.{name}" for name, value in usual.items() if value is not None)


def _transformers_config(shapes: Shapes, foreign: dict | None, *, names: Names) -> dict:
    if foreign is None:
        raise ModelError("an EnCodec of transformers needs the config.json beside its weights",
                         hint="convert the folder, not the file in it")
    return {"net": sizes(shapes, names) | said_by_transformers(foreign)}


def said_by_transformers(foreign: dict) -> dict:
    """What an EncodecConfig of transformers tells beyond the shapes; absent settings have that class's defaults."""
    dim = foreign.get("hidden_size", 128)
    if foreign.get("codebook_dim") not in (None, dim):
        raise ModelError(f"config.json: codebook_dim is {foreign['codebook_dim']}, this codec has hidden_size {dim}")
    rate, ratios = foreign.get("sampling_rate", 24_000), foreign.get("upsampling_ratios", [8, 5, 4, 2])
    each = _bits(foreign.get("codebook_size", 1024)) * _frames(rate, ratios)
    widths = foreign.get("target_bandwidths", [1.5, 3.0, 6.0, 12.0, 24.0])
    counts = sorted({max(1, int(1000 * width // each)) for width in widths})
    return {"rate": rate, "causal": foreign.get("use_causal_conv", True),
            "padding": foreign.get("pad_mode", "reflect"), "normalize": foreign.get("normalize", False),
            "trim_right": foreign.get("trim_right_ratio", 1.0), "segment": foreign.get("chunk_length_s"),
            "overlap": foreign.get("overlap") or 0.0,
            "dilation": foreign.get("dilation_growth_rate", 2), "choices": counts if len(counts) > 1 else []}


def _bits(bins: int) -> int:
    return (bins - 1).bit_length()


def _frames(rate: int, ratios: list[int]) -> int:
    """Frames a second as transformers counts them, rounded up."""
    return -(-rate // math.prod(ratios))


# --- and the way back ----------------------------------------------------------------------------------------------

def _net(config: dict) -> EncodecConfig:
    """The codec's network; a mono one that hears two channels is written as the mono network it is."""
    net = EncodecConfig.parse(config["net"])
    return net if net.interleave == "none" else net.model_copy(update={"interleave": "none", "channels": 1})


def transformers_config(net: EncodecConfig) -> dict:
    """An EncodecConfig of transformers; ModelError for codebooks that it cannot have."""
    bits, frames = _bits(net.bins), _frames(net.rate, list(net.ratios))
    if 1 << bits != net.bins:
        raise ModelError(f"transformers has codebooks of a power of two, this codec has {net.bins}")
    if not net.lstm or net.norm not in NORMS.values():
        raise ModelError("transformers has no EnCodec without an LSTM or without norms", hint="--to original")
    counts = net.choices or (net.quantizers,)
    if max(counts) != net.quantizers:
        raise ModelError(f"transformers makes as many codebooks as its widest choice has: {max(counts)}, not "
                         f"{net.quantizers}", hint=f"a codec whose net.choices end with {net.quantizers}")
    return {
        "architectures": ["EncodecModel"], "model_type": "encodec", "audio_channels": net.channels,
        "chunk_length_s": net.segment, "codebook_dim": net.dim, "codebook_size": net.bins, "compress": net.compress,
        "dilation_growth_rate": net.dilation, "hidden_size": net.dim, "kernel_size": net.kernel,
        "last_kernel_size": net.last_kernel, "norm_type": next(k for k, v in NORMS.items() if v == net.norm),
        "normalize": net.normalize, "num_filters": net.filters, "num_lstm_layers": net.lstm,
        "num_residual_layers": net.blocks, "overlap": net.overlap if net.segment else None, "pad_mode": net.padding,
        "residual_kernel_size": net.block_kernel, "sampling_rate": net.rate,
        "target_bandwidths": [_bandwidth(n, bits * frames) for n in counts], "trim_right_ratio": net.trim_right,
        "upsampling_ratios": list(net.ratios), "use_causal_conv": net.causal,
        "use_conv_shortcut": net.shortcut == "conv", "dtype": "float32",
    }


def _bandwidth(count: int, bits: int) -> float:
    """Kilobits a second of so many codebooks, of which transformers takes the whole number of codebooks again."""
    width = count * bits / 1000
    return width if int(1000 * width // bits) == count else width + 1e-6


def _transformers(name: str, names: Names) -> Layout:
    return Layout(name, "encodec", "net", partial(_matches, names=names), partial(_transformers_config, names=names),
                  lambda config: rows(_net(config), names), lambda config: transformers_config(_net(config)),
                  "model.safetensors", constants=lambda config: started(_net(config), names))


LAYOUTS: tuple[Layout, ...] = (
    Layout("original", "encodec", "net", partial(_matches, names=ORIGINAL), _original_config,
           lambda config: rows(_net(config), ORIGINAL), constants=lambda config: started(_net(config), ORIGINAL),
           unsaid=_untold),
    _transformers("transformers", NEW),
    _transformers("transformers-2023", OLD),
)
