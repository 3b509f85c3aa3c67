"""junyanz' CycleGAN and pix2pix: the generators' and critics' plain state dicts (latest_net_G_A.pth, horse2zebra.pth).

Old files also hold running statistics of instance norms, which nothing ever used; files older than torch 0.4.1 do not
count the batches of batch norms. A U-Net is pix2pix's unless it is read `--from cyclegan/unet`. Whether a network had
dropout is told by its keys where it is residual, and by nothing where it is a U-Net: pix2pix's had.
"""

import re

from nexus.convert.keymap import Row, foreign_keys
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.unet_rows import layer
from nexus.models.gan.cycle_gan import PatchNetConfig
from nexus.nn.translators import ResnetConfig, UNetConfig

COUNTER = "*.num_batches_tracked"
STATISTICS = ("*.running_mean", "*.running_var", COUNTER)
FIRST_BLOCK = 10


def batch_norm(native: str, foreign: str) -> list[Row]:
    """The rows of a batch norm."""
    return [Row(f"{native}.{end}", f"{foreign}.{end}") for end in ("weight", "bias", "running_mean", "running_var")]


def _norm_of(shapes: Shapes) -> str:
    """Batch norms have weights, the one kind of one-dimensional ones; instance norms have none."""
    return "batch" if any(k.endswith(".weight") and len(s) == 1 for k, s in shapes.items()) else "instance"


# --- the residual generator ----------------------------------------------------------------------------------------

def _resnet_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return len(shapes.get("model.1.weight", ())) == 4 and shapes["model.1.weight"][2:] == (7, 7) \
        and "model.10.conv_block.1.weight" in shapes


def _blocks(shapes: Shapes) -> int:
    return len({k.split(".")[1] for k in shapes if ".conv_block." in k})


def _resnet_config(shapes: Shapes, foreign: dict | None) -> dict:
    width, channels = shapes["model.1.weight"][:2]
    blocks = _blocks(shapes)
    out = shapes.get(f"model.{FIRST_BLOCK + blocks + 7}.weight", (channels,))[0]
    second = shapes.get("model.10.conv_block.6.weight", ())
    net = {"kind": "resnet", "in_channels": channels, "out_channels": out, "width": width, "blocks": blocks,
           "norm": _norm_of(shapes), "dropout": len(second) == 4}
    return {"net": net, "two_way": False, "size": 256}


def _resnet_table(config: dict) -> list[Row]:
    net = ResnetConfig.parse(config["net"])
    bias, end, second = net.norm == "instance", FIRST_BLOCK + net.blocks, 6 if net.dropout else 5
    rows = [row for native, foreign in (("first", 1), ("downs.0", 4), ("downs.1", 7), ("ups.0", end),
                                        ("ups.1", end + 3)) for row in layer(native, f"model.{foreign}", bias=bias)]
    rows += layer("last", f"model.{end + 7}")
    for i in range(net.blocks):
        block = f"model.{FIRST_BLOCK + i}.conv_block"
        rows += [*layer(f"blocks.{i}.conv1", f"{block}.1", bias=bias),
                 *layer(f"blocks.{i}.conv2", f"{block}.{second}", bias=bias)]
        if not bias:
            rows += [*batch_norm(f"blocks.{i}.norm1", f"{block}.2"),
                     *batch_norm(f"blocks.{i}.norm2", f"{block}.{second + 1}")]
    if not bias:
        rows += [row for i, at in enumerate((2, 5, 8, end + 1, end + 4))
                 for row in batch_norm(f"norms.{i}", f"model.{at}")]
    return rows


# --- the U-Net -----------------------------------------------------------------------------------------------------

def _prefix(block: int) -> str:
    """Where the U-Net's block of this depth stands: item 1 of the outermost one, item 3 of any other around it."""
    return "model.model" + (".1.model" + ".3.model" * (block - 1) if block else "")


def _unet_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"model.model.0.weight", "model.model.1.model.1.weight", "model.model.3.weight"} <= shapes.keys() \
        and len(shapes["model.model.0.weight"]) == 4


def _unet_net(shapes: Shapes) -> dict:
    width, channels = shapes["model.model.0.weight"][:2]
    inner = re.compile(r"model\.model\.1\.model(\.3\.model)*\.1\.weight")
    depth = 2 + max(k.count(".3.model") for k in shapes if inner.fullmatch(k))
    return {"kind": "unet", "in_channels": channels, "out_channels": shapes["model.model.3.weight"][1], "width": width,
            "depth": depth, "norm": _norm_of(shapes), "dropout": True}


def _pix2pix_config(shapes: Shapes, foreign: dict | None) -> dict:
    net = _unet_net(shapes)
    return {"net": net, "critic": {"kind": "patch"}, "conditioner": {"kind": "none"},
            "size": max(256, 2 ** net["depth"])}


def _unet_cycle_config(shapes: Shapes, foreign: dict | None) -> dict:
    return {"net": _unet_net(shapes) | {"dropout": False}, "two_way": False, "size": 256}


def _unet_table(config: dict) -> list[Row]:
    net = UNetConfig.parse(config["net"])
    bias, last = net.norm == "instance", net.depth - 1
    rows = []
    for block in range(net.depth):
        at, up = _prefix(block), 3 if block in (0, last) else 5
        rows += layer(f"downs.{block}", f"{at}.{1 if block else 0}", bias=bias)
        rows += layer(f"ups.{last - block}", f"{at}.{up}", bias=bias or block == 0)
        if not bias and block:
            rows += batch_norm(f"up_norms.{last - block}", f"{at}.{up + 1}")
            rows += batch_norm(f"down_norms.{block - 1}", f"{at}.2") if block < last else []
    return rows


# --- the critic ----------------------------------------------------------------------------------------------------

def _critic_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return all(len(shapes.get(f"model.{i}.weight", ())) == 4 for i in (0, 2, 5)) \
        and shapes["model.0.weight"][2:] == (4, 4) and shapes[f"model.{_last(shapes)}.weight"][0] == 1


def _last(shapes: Shapes) -> int:
    return max(int(m[1]) for k, s in shapes.items() if len(s) == 4 and (m := re.fullmatch(r"model\.(\d+)\.weight", k)))


def _critic_config(shapes: Shapes, foreign: dict | None) -> dict:
    width, channels = shapes["model.0.weight"][:2]
    net = {"kind": "patch", "in_channels": channels, "width": width, "layers": (_last(shapes) - 2) // 3,
           "norm": _norm_of(shapes)}
    return {"net": net, "two_way": False}


def _critic_table(config: dict) -> list[Row]:
    net = PatchNetConfig.parse(config["net"])
    rows = [*layer("first", "model.0"), *layer("last", f"model.{2 + 3 * net.layers}")]
    for i in range(net.layers):
        rows += layer(f"convs.{i}", f"model.{2 + 3 * i}", bias=net.norm != "batch")
        rows += batch_norm(f"norms.{i}", f"model.{3 + 3 * i}") if net.norm == "batch" else []
    return rows


# --- both ways of a training's folder, which `detect` reads as one with "A." and "B." before the keys ----------------

def _way(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def _pair_matches(shapes: Shapes, foreign: dict | None) -> bool:
    a, b = (_way(shapes, prefix) for prefix in ("A.", "B."))
    return bool(a) and a == b and (_resnet_matches(a, None) or _unet_matches(a, None))


def _pair_config(shapes: Shapes, foreign: dict | None) -> dict:
    shapes = _way(shapes, "A.")
    one = (_resnet_config if _resnet_matches(shapes, None) else _unet_cycle_config)(shapes, None)
    return one | {"two_way": True}


def _pair_table(config: dict) -> list[Row]:
    rows = (_resnet_table if config["net"]["kind"] == "resnet" else _unet_table)(config)
    return [Row(f"{way}.{row.native}", tuple(f"{prefix}.{key}" for key in foreign_keys(row)))
            for way, prefix in (("ab", "A"), ("ba", "B")) for row in rows]


def _size(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    return ("size",)


LAYOUTS = (
    Layout("both", "cyclegan", "net", _pair_matches, _pair_config, _pair_table, unsaid=_size, drop=STATISTICS),
    Layout("resnet", "cyclegan", "net.ab", _resnet_matches, _resnet_config, _resnet_table, unsaid=_size,
           drop=STATISTICS),
    Layout("unet", "cgan", "net", _unet_matches, _pix2pix_config, _unet_table, drop=STATISTICS,
           unsaid=lambda shapes, foreign: ("size", "net.dropout")),
    Layout("unet", "cyclegan", "net.ab", _unet_matches, _unet_cycle_config, _unet_table, unsaid=_size,
           drop=STATISTICS, auto=False),
    Layout("critic", "cyclegan", "net", _critic_matches, _critic_config, _critic_table, drop=STATISTICS),
)
