"""pytorch/examples' DCGAN generator (netG_epoch_N.pth): one Sequential, `main`, of convolutions and batch norms."""

import re

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.cyclegan import COUNTER, batch_norm
from nexus.convert.layouts.unet_rows import layer
from nexus.errors import ModelError
from nexus.nn.dcgan import DCGeneratorConfig


def _convs(shapes: Shapes) -> list[tuple[int, ...]]:
    """The shapes [in, out, 4, 4] of its transposed convolutions, in order; each third item of `main` is one."""
    found = {int(m[1]): s for k, s in shapes.items() if (m := re.fullmatch(r"main\.(\d+)\.weight", k)) and len(s) == 4}
    return [found[i] for i in sorted(found)] if list(sorted(found)) == list(range(0, 3 * len(found), 3)) else []


def _matches(shapes: Shapes, foreign: dict | None) -> bool:
    convs = _convs(shapes)
    return len(convs) > 2 and "main.1.running_mean" in shapes \
        and all(a[1] == b[0] and b[2:] == (4, 4) for a, b in zip(convs, convs[1:], strict=False))


def _config(shapes: Shapes, foreign: dict | None) -> dict:
    convs = _convs(shapes)
    return {"net": {"kind": "dcgan", "size": 4 * 2 ** (len(convs) - 1), "channels": convs[-1][1], "width": convs[-1][0],
                    "latents": convs[0][0]}, "critic": {"kind": "dcgan", "width": convs[-1][0]}}


def _table(config: dict) -> list[Row]:
    net = DCGeneratorConfig.parse(config["net"])
    if net.num_classes:
        raise ModelError("the DCGAN example's file has no place for labels", hint="only a model without classes fits")
    count = net.size.bit_length() - 2                   # 64 = 4 x 2 x 2 x 2 x 2 pixels: five convolutions
    rows = [row for i in range(count) for row in layer(f"convs.{i}", f"main.{3 * i}", bias=False)]
    return rows + [row for i in range(count - 1) for row in batch_norm(f"norms.{i}", f"main.{3 * i + 1}")]


LAYOUTS = (Layout("pytorch-example", "gan", "net", _matches, _config, _table, drop=(COUNTER,)),)
