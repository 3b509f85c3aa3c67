"""minRF's DiT: one file, the plain state dict. Shapes tell all but the number of heads and the picture's side."""

from torch import Tensor

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.labels import numbered
from nexus.convert.layouts.unet_rows import layer
from nexus.errors import ModelError
from nexus.models.diffusion.dit_llama import LlamaDiTConfig

ATTENTION, MLP = "layers.*.attention.", "layers.*.feed_forward."


def _matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"init_conv_seq.0.weight", "x_embedder.weight", "layers.0.attention.wq.weight",
            "layers.0.feed_forward.w3.weight", "final_layer.linear.weight"} <= shapes.keys()


def _config(shapes: Shapes, foreign: dict | None) -> dict:
    half, in_channels = shapes["init_conv_seq.0.weight"][:2]
    hidden, flat = shapes["x_embedder.weight"]
    net = {
        "in_channels": in_channels, "hidden": hidden, "patch": round((flat / half) ** 0.5), "size": 32,
        "depth": sum(k.startswith("layers.") and k.endswith(".attention.wq.weight") for k in shapes),
        "heads": {512: 16, 64: 4, 256: 32, 3072: 32}.get(hidden),          # of minRF's scripts
        "mlp_hidden": shapes["layers.0.feed_forward.w1.weight"][0],
        "num_classes": shapes["y_embedder.embedding_table.weight"][0] - 1,
    }
    # minRF tells its network the bare time, 0 at the data; it draws logit-normal times
    path = {"kind": "rectified", "time_scale": 1.0, "time_sampling": "logit-normal"}
    return {"net": net, "size": 32, "path": path, "guidance": 2.0, "sampler": "euler", "steps": 50} | numbered(net)


def _writable(config: dict) -> dict[str, Tensor]:
    """No constants; ModelError for a model that has no place in the layout."""
    if "mlp_hidden" not in config["net"]:
        raise ModelError("this layout holds minRF's DiT alone", hint="an NCSN++ goes --to original")
    net = LlamaDiTConfig.parse(config["net"])
    if net.num_styles or not (net.num_classes and net.null_class):
        raise ModelError("minRF's files hold a label table with a null row and no style table",
                         hint="only a model with num_classes > 0, null_class true and num_styles 0 can be written")
    return {}


def _table(config: dict) -> list[Row]:
    return [
        *(row for i in (0, 2, 3, 5) for row in layer(f"stem.{i}", f"init_conv_seq.{i}")),
        *layer("patch", "x_embedder"),
        *layer("time.fc1", "t_embedder.mlp.0"), *layer("time.fc2", "t_embedder.mlp.2"),
        *layer("label", "y_embedder.embedding_table", bias=False),
        *layer("blocks.*.adaln", "layers.*.adaLN_modulation.1"),
        *layer("blocks.*.norm1", "layers.*.attention_norm"), *layer("blocks.*.norm2", "layers.*.ffn_norm"),
        *layer("blocks.*.qkv", *(f"{ATTENTION}w{p}" for p in "qkv"), bias=False),
        *layer("blocks.*.q_norm", f"{ATTENTION}q_norm"), *layer("blocks.*.k_norm", f"{ATTENTION}k_norm"),
        *layer("blocks.*.proj", f"{ATTENTION}wo", bias=False),
        *layer("blocks.*.gate_up", f"{MLP}w1", f"{MLP}w3", bias=False),
        *layer("blocks.*.down", f"{MLP}w2", bias=False),
        *layer("final_adaln", "final_layer.adaLN_modulation.1"), *layer("final", "final_layer.linear"),
    ]


LAYOUTS = (
    Layout("minrf", "rectified-flow", "net", _matches, _config, _table, constants=_writable,
           unsaid=lambda shapes, foreign: ("net.heads", "net.size", "size")),
)
