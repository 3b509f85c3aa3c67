"""Rows of a layer for every table; those that both namings of the UNet share, and what neither can hold."""

from nexus.convert.keymap import Row
from nexus.errors import ModelError
from nexus.models.diffusion.unet import UNetConfig


def net_config(config: dict) -> UNetConfig:
    """The network of a system's configuration, or ModelError when it has parts that no public UNet has."""
    net = UNetConfig.parse(config["net"])
    ours = [name for name, has in (("num_styles", net.num_styles), ("pooled_dim without micro", net.pooled_dim
                                                                     and not net.micro)) if has]
    if ours:
        raise ModelError(f"public UNet layouts have no key for {ours[0]}",
                         hint="only a model without styles and without a bare pooled vector can be written")
    return net


def layer(native: str, *foreign: str, bias: bool = True, op: str = "", heads: int = 0, ratio: tuple[int, ...] = (),
          copies: str = "") -> list[Row]:
    """The rows of a layer's weight and bias; `op` concerns the weight alone, unless it is a swap of halves."""
    ends = ("weight", "bias") if bias else ("weight",)
    return [Row(f"{native}.{end}", tuple(f"{f}.{end}" for f in foreign), ratio, heads=heads,
                op=op if end == "weight" or op == "swap" else "", copies=(f"{copies}.{end}",) if copies else ())
            for end in ends]


def layers(native: str, foreign: str, names: dict[str, str]) -> list[Row]:
    """The rows of a module's layers, by native name below `native` and foreign name below `foreign`."""
    return [row for ours, theirs in names.items() for row in layer(f"{native}.{ours}", f"{foreign}.{theirs}")]


def transformer(native: str, foreign: str, linear_proj: bool) -> list[Row]:
    """A spatial transformer: both namings agree below its own name."""
    ours, theirs = f"{native}.blocks.*", f"{foreign}.transformer_blocks.*"
    op = "" if linear_proj else "conv_to_linear"
    return [
        *layer(f"{native}.norm", f"{foreign}.norm"),
        *layer(f"{native}.proj_in", f"{foreign}.proj_in", op=op),
        *layer(f"{native}.proj_out", f"{foreign}.proj_out", op=op),
        *layer(f"{ours}.qkv", *(f"{theirs}.attn1.to_{p}" for p in "qkv"), bias=False),
        *layer(f"{ours}.q", f"{theirs}.attn2.to_q", bias=False),
        *layer(f"{ours}.kv", *(f"{theirs}.attn2.to_{p}" for p in "kv"), bias=False),
        *layers(ours, theirs, {"norm1": "norm1", "norm2": "norm2", "norm3": "norm3",
                               "proj1": "attn1.to_out.0", "proj2": "attn2.to_out.0",
                               "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}),
    ]
