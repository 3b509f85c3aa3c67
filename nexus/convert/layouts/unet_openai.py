"""UNet, OpenAI's naming: improved-diffusion, guided-diffusion (ADM), consistency models, latent diffusion.

A single file, whose shapes tell everything but the number of attention heads and dropout. Trap: the published
models of guided-diffusion order q, k, v head by head; consistency models and `use_new_attention_order` keep
three whole thirds.
"""

import re
from collections.abc import Iterator

from nexus.convert.keymap import Row
from nexus.convert.layout import Shapes
from nexus.convert.layouts.unet_rows import layer, layers, net_config, transformer
from nexus.models.diffusion.unet import UNetConfig

RES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "emb_proj": "emb_layers.1", "norm2": "out_layers.0",
       "conv2": "out_layers.3", "skip": "skip_connection"}
SDXL_NUMBERS, SDXL_FREQS = 6, 256        # size, crop and target: beside the pooled text in label_emb.0.0


def matches(shapes: Shapes) -> bool:
    """Whether the keys are those of an OpenAI UNet."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "middle_block.0.in_layers.0.weight",
            "out.2.weight"} <= shapes.keys()


def conv2d_qkv(shapes: Shapes) -> bool:
    """Whether q, k, v come from a 2-D convolution, as in consistency models; a 1-D one in the others."""
    return any(k.endswith(".qkv.weight") and len(s) == 4 for k, s in shapes.items())


def config_of(shapes: Shapes) -> dict:
    """The network's configuration by shapes; heads as in the published models (`_heads`), None = unknown."""
    channels = shapes["time_embed.0.weight"][1]
    blocks, levels = _grid(shapes)
    firsts = [1 + i * (blocks + 1) for i in range(levels)]                   # each level's first input block
    widths = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
    mult = [w // channels if w % channels == 0 else w / channels for w in widths]
    attention = [i for i, n in enumerate(firsts) if f"input_blocks.{n}.1.norm.weight" in shapes]
    emb_rows = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
    net = {
        "in_channels": shapes["input_blocks.0.0.weight"][1], "out_channels": shapes["out.2.weight"][0],
        "channels": channels, "mult": mult, "blocks": blocks, "attention": attention,
        "mid_attention": "middle_block.1.norm.weight" in shapes, "scale_shift": emb_rows == 2 * widths[0],
        "resblock_updown": any(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", k)
                               for k in shapes),
    }
    if "label_emb.weight" in shapes:                 # the published class-conditional models have no null row
        net |= {"num_classes": shapes["label_emb.weight"][0], "null_class": False}
    if "time_embed.cond_proj.weight" in shapes:
        net["guidance_dim"] = shapes["time_embed.cond_proj.weight"][1]
    net |= _words(shapes, firsts, attention)
    return net | _heads(shapes, net, widths)


def _grid(shapes: Shapes) -> tuple[int, int]:
    """Residual blocks of a level on the way down, and levels."""
    count = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("output_blocks."))
    ups = [int(m[1]) for k in shapes if (m := re.fullmatch(
        r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.0)\.weight", k))]
    a_level = 1 + min(ups, default=count - 1)        # the first level ends where the picture first grows
    return a_level - 1, count // a_level


def _words(shapes: Shapes, firsts: list[int], attention: list[int]) -> dict:
    """Cross-attention: width of a word, transformer blocks of each level, SDXL's added conditions."""
    to_k = "transformer_blocks.0.attn2.to_k.weight"
    found = next((s for k, s in shapes.items() if k.endswith(to_k)), None)
    if found is None:
        return {}

    def depth(prefix: str) -> int:
        return sum(re.fullmatch(re.escape(prefix) + r"transformer_blocks\.\d+\.norm1\.weight", k) is not None
                   for k in shapes)

    depths = [depth(f"input_blocks.{n}.1.") if i in attention else 1 for i, n in enumerate(firsts)]
    depths[-1] = depth("middle_block.1.") or depths[-1]
    linear = len(next(s for k, s in shapes.items() if k.endswith(".proj_in.weight"))) == 2
    words = {"context_dim": found[1], "linear_proj": linear, "depth": depths if max(depths) > 1 else []}
    if "label_emb.0.0.weight" in shapes:
        pooled = shapes["label_emb.0.0.weight"][1] - SDXL_NUMBERS * SDXL_FREQS
        words |= {"pooled_dim": pooled, "micro": SDXL_NUMBERS, "micro_freqs": SDXL_FREQS}
    return words


def _heads(shapes: Shapes, net: dict, widths: list[int]) -> dict:
    """The published models' heads: 64 channels each in ADM, consistency models, SD 2 and SDXL; 8 heads in
    SD 1; 4 heads in improved-diffusion with scale_shift, else 1."""
    if net.get("context_dim") and not net["linear_proj"]:
        return {"heads": 8}
    if net.get("linear_proj") or net["resblock_updown"] or conv2d_qkv(shapes):
        attending = {widths[i] for i in net["attention"]} | ({widths[-1]} if net["mid_attention"] else set())
        return {"head_dim": None if any(w % 64 for w in attending) else 64}
    return {"heads": 4 if net["scale_shift"] else 1}


def unsaid(shapes: Shapes) -> tuple[str, ...]:
    """The settings `config_of` takes from the published models."""
    attends = any(k.endswith((".qkv.weight", ".attn1.to_q.weight")) for k in shapes)
    return ("net.heads", "net.head_dim") if attends else ()


def table(config: dict, *, qkv_op: str, by_head: bool) -> list[Row]:
    """The rows; qkv_op turns the file's q, k, v convolution into a linear layer, by_head is their order."""
    net = net_config(config)

    def attention(native: str, foreign: str, width: int) -> list[Row]:
        if net.context_dim:
            return transformer(native, foreign, net.linear_proj)
        heads = net.heads_of(width) if by_head else 0
        return [*layer(f"{native}.norm", f"{foreign}.norm"),
                *layer(f"{native}.qkv", f"{foreign}.qkv", op=qkv_op, heads=heads),
                *layer(f"{native}.proj", f"{foreign}.proj_out", op=qkv_op)]

    rows = [
        *layer("time.fc1", "time_embed.0"), *layer("time.fc2", "time_embed.2"),
        *layer("guidance", "time_embed.cond_proj", bias=False), *layer("label", "label_emb", bias=False),
        *layer("pooled.0", "label_emb.0.0"), *layer("pooled.2", "label_emb.0.2"),
        *layer("conv_in", "input_blocks.0.0"), *layer("norm_out", "out.0"), *layer("conv_out", "out.2"),
    ]
    for kind, native, foreign, width in _places(net):
        if kind == "attn":
            rows += attention(native, foreign, width)
        else:
            rows += layers(native, foreign, RES) if kind == "res" else layer(native, foreign)
    return rows


Place = tuple[str, str, str, int]        # kind, native name, foreign name, width


def _places(net: UNetConfig) -> Iterator[Place]:
    """Every module with its place in the file."""
    yield from _side(net, "down", "input_blocks", net.blocks)
    width = net.widths[-1]
    yield "res", "mid.res.0", "middle_block.0", width
    if net.mid_attention:
        yield "attn", "mid.attn.0", "middle_block.1", width
    yield "res", "mid.res.1", f"middle_block.{1 + net.mid_attention}", width
    yield from _side(net, "up", "output_blocks", net.blocks + 1)


def _side(net: UNetConfig, native: str, foreign: str, count: int) -> Iterator[Place]:
    """One side of the U: OpenAI numbers all its blocks in one row, native names count within a level.

    A downsampling has a number of its own (0 is the first convolution); an upsampling is the last part of the
    block before it.
    """
    down = native == "down"
    number, levels = (1, range(len(net.mult))) if down else (0, reversed(range(len(net.mult))))
    for i, level in enumerate(levels):
        width, attends = net.widths[level], level in net.attention
        for j in range(count):
            yield "res", f"{native}.{i}.res.{j}", f"{foreign}.{number}.0", width
            if attends:
                yield "attn", f"{native}.{i}.attn.{j}", f"{foreign}.{number}.1", width
            number += 1
        if i + 1 == len(net.mult):
            return
        at = f"{number}.0" if down else f"{number - 1}.{1 + attends}"
        if net.resblock_updown:
            yield "res", f"{native}.{i}.resample", f"{foreign}.{at}", width
        else:
            yield "conv", f"{native}.{i}.resample.conv", f"{foreign}.{at}.{'op' if down else 'conv'}", width
        number += down
