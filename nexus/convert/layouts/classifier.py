"""The classifiers of noisy pictures that guide ADM: guided-diffusion's `64x64_classifier.pt` and its like.

A single file, whose shapes tell everything but the width of a head and the noise. Trap: q, k, v are ordered head by
head in the body, but in the pooling they are three whole thirds.
"""

from collections.abc import Iterator

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.labels import numbered
from nexus.convert.layouts.unet_openai import RES
from nexus.convert.layouts.unet_rows import layer, layers
from nexus.errors import ModelError
from nexus.models.diffusion.conditional_diffusion import ClassifierNetConfig

POOL = "out.2"


def _matches(shapes: Shapes, foreign: dict | None) -> bool:
    return foreign is None and {"time_embed.0.weight", "input_blocks.0.0.weight", f"{POOL}.positional_embedding",
                                f"{POOL}.qkv_proj.weight"} <= shapes.keys()


def _config(shapes: Shapes, foreign: dict | None) -> dict:
    blocks, levels = _grid(shapes)
    channels = shapes["time_embed.0.weight"][1]
    firsts = [1 + i * (blocks + 1) for i in range(levels)]                   # each level's first input block
    widths = [shapes[f"input_blocks.{n}.0.out_layers.3.weight"][0] for n in firsts]
    side = round((shapes[f"{POOL}.positional_embedding"][1] - 1) ** 0.5) * 2 ** (levels - 1)
    net = {"kind": "classifier", "in_channels": shapes["input_blocks.0.0.weight"][1], "channels": channels,
           "mult": [w // channels if w % channels == 0 else w / channels for w in widths], "blocks": blocks,
           "attention": [i for i, n in enumerate(firsts) if _attends(shapes, n)], "size": side,
           "num_classes": shapes[f"{POOL}.c_proj.weight"][0]}
    schedule = "cosine" if side == 64 else "linear"
    return {"net": net, "size": side, "path": {"kind": "discrete", "beta_schedule": schedule}} | numbered(net)


def _attends(shapes: Shapes, number: int) -> bool:
    return f"input_blocks.{number}.1.norm.weight" in shapes


def _grid(shapes: Shapes) -> tuple[int, int]:
    """Residual blocks of a level, which the attending ones at the end are, and levels."""
    count = 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("input_blocks."))
    blocks = next((i for i in range(count) if not _attends(shapes, count - 1 - i)), 0)
    if not blocks or count % (blocks + 1):
        raise ModelError("this classifier does not attend at its smallest level, as all published ones do",
                         hint="only such a file tells how many blocks a level has")
    return blocks, count // (blocks + 1)


def _table(config: dict) -> list[Row]:
    net = ClassifierNetConfig.parse(config["net"])
    rows = [
        *layer("time.fc1", "time_embed.0"), *layer("time.fc2", "time_embed.2"), *layer("conv_in", "input_blocks.0.0"),
        *layer("norm_out", "out.0"), Row("positions", f"{POOL}.positional_embedding"),
        *layer("qkv", f"{POOL}.qkv_proj", op="conv1d_to_linear"),
        *layer("out", f"{POOL}.c_proj", op="conv1d_to_linear"),
    ]
    for number, (foreign, width) in enumerate(_places(net)):
        native = f"body.{number}"
        if width is None:
            rows += layers(native, foreign, RES)
        else:
            rows += [*layer(f"{native}.norm", f"{foreign}.norm"),
                     *layer(f"{native}.qkv", f"{foreign}.qkv", op="conv1d_to_linear", heads=width // net.head_dim),
                     *layer(f"{native}.proj", f"{foreign}.proj_out", op="conv1d_to_linear")]
    return rows


def _places(net: ClassifierNetConfig) -> Iterator[tuple[str, int | None]]:
    """Every module of the body in order: its place in the file, and the width of an attention (None: a ResBlock)."""
    number = 1                              # 0 is the first convolution
    for level, width in enumerate(net.widths):
        for _ in range(net.blocks):
            yield f"input_blocks.{number}.0", None
            if level in net.attention:
                yield f"input_blocks.{number}.1", width
            number += 1
        if level + 1 < len(net.mult):
            yield f"input_blocks.{number}.0", None
            number += 1
    yield from (("middle_block.0", None), ("middle_block.1", net.widths[-1]), ("middle_block.2", None))


LAYOUTS: tuple[Layout, ...] = (
    Layout("openai-classifier", "conditional", "net", _matches, _config, _table,
           unsaid=lambda shapes, foreign: ("net.head_dim", "path.beta_schedule")),
)
