"""SD3, SD3.5 and FLUX: the published single files and diffusers' transformer folders.

Trap: diffusers writes scale before shift in its last normalisation and, for SD3, in the last block's text side; the
published files say shift first. Trap: SD3's table of positions is a tensor of the file; it is kept as it is, since a
published one need not be the formula's. A native table that is computed is written out where a layout wants one.
"""

from functools import partial

from torch import Tensor

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.unet_rows import layer
from nexus.errors import ModelError
from nexus.models.diffusion.flux import FluxNetConfig
from nexus.models.diffusion.mmdit import SYSTEMS, MMDiTNetConfig, position_table

HEAD = 64                                           # every SD3's head width, which its files do not tell
AXES = {128: (16, 56, 56)}                          # FLUX's axes by head width, which its files do not tell
PREFIX = "model.diffusion_model."
SIZE = 128                                          # side of the latent of the 1024 pixels all were trained at
# SD3 is published inside a whole-model file, FLUX alone; other programs write them the other way round.
PUBLISHED, REPACKED = {"sd3": PREFIX, "flux": ""}, {"sd3": "", "flux": PREFIX}
BESIDE = ("first_stage_model.*", "text_encoders.*", "vae.*", "model_ema.*")       # other parts of a whole model
MARKS = {"sd3": ("x_embedder.proj.weight", "context_embedder.weight", "joint_blocks.0.x_block.attn.qkv.weight",
                 "joint_blocks.0.context_block.attn.qkv.weight", "y_embedder.mlp.0.weight", "pos_embed"),
         "flux": ("img_in.weight", "txt_in.weight", "double_blocks.0.img_attn.qkv.weight", "vector_in.in_layer.weight",
                  "double_blocks.0.img_attn.norm.query_norm.scale", "single_blocks.0.linear1.weight")}
FOLDER_MARKS = {"sd3": ("pos_embed.proj.weight", "pos_embed.pos_embed", "context_embedder.weight",
                        "transformer_blocks.0.attn.add_q_proj.weight", "transformer_blocks.0.ff_context.net.2.weight"),
                "flux": ("x_embedder.weight", "context_embedder.weight", "transformer_blocks.0.attn.add_q_proj.weight",
                         "single_transformer_blocks.0.proj_mlp.weight", "single_transformer_blocks.0.attn.to_q.weight")}
CLASSES = {"SD3Transformer2DModel": "sd3", "FluxTransformer2DModel": "flux"}


def _linears(native: str, foreign: str, names: dict[str, str]) -> list[Row]:
    """The rows of several layers, by what follows `native` and `foreign` in their names."""
    return [row for ours, theirs in names.items() for row in layer(native + ours, foreign + theirs)]


def _gains(native: str, q: str, k: str) -> list[Row]:
    return [Row(f"{native}.norm.q.weight", q), Row(f"{native}.norm.k.weight", k)]


def _parsed(config: dict) -> MMDiTNetConfig | FluxNetConfig:
    return (MMDiTNetConfig if config["net"]["kind"] == "sd3" else FluxNetConfig).parse(config["net"])


def _count(shapes: Shapes, pattern: str) -> int:
    """How many indices n = 0, 1, ... in the pattern name a tensor."""
    n = 0
    while pattern.format(n) in shapes:
        n += 1
    return n


def _system(kind: str, net: dict) -> dict:
    """The system's configuration around a network of a public file, which holds no text encoder."""
    name = kind if kind == "sd3" else "flux-dev" if net["guidance"] else "flux-schnell"
    return SYSTEMS[name] | {"size": net.get("size", SIZE), "net": {"kind": kind} | net}


# --- the published single files ------------------------------------------------------------------------------------

def _kind(shapes: Shapes, marks: dict[str, tuple[str, ...]], prefixes: dict[str, str]) -> str | None:
    return next((kind for kind, keys in marks.items() if all(prefixes[kind] + key in shapes for key in keys)), None)


def _original_config(shapes: Shapes, foreign: dict | None, *, prefixes: dict[str, str]) -> dict:
    kind = _kind(shapes, MARKS, prefixes)
    inner = {key.removeprefix(prefixes[kind]): shape for key, shape in shapes.items()}
    return _system(kind, (_sd3_original if kind == "sd3" else _flux_original)(inner))


def _sd3_original(shapes: Shapes) -> dict:
    hidden, channels, patch, _ = shapes["x_embedder.proj.weight"]
    block, depth = "joint_blocks.{}.x_block.", _count(shapes, "joint_blocks.{}.x_block.attn.qkv.weight")
    gain, side = shapes.get(f"{block.format(0)}attn.ln_q.weight"), round(shapes["pos_embed"][1] ** 0.5)
    return {
        "size": min(SIZE, patch * side), "patch": patch, "in_channels": channels, "hidden": hidden, "depth": depth,
        "heads": hidden // (gain[0] if gain else HEAD),
        "mlp_ratio": shapes[f"{block.format(0)}mlp.fc1.weight"][0] / hidden,
        "context_dim": shapes["context_embedder.weight"][1], "pooled_dim": shapes["y_embedder.mlp.0.weight"][1],
        "positions": side, "stored_positions": True, "qk_norm": gain is not None,
        "dual": [i for i in range(depth) if f"{block.format(i)}attn2.qkv.weight" in shapes],
    }


def _flux_original(shapes: Shapes) -> dict:
    hidden, packed = shapes["img_in.weight"]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    return {
        "in_channels": packed // 4, "out_channels": shapes["final_layer.linear.weight"][0] // 4, "hidden": hidden,
        "heads": hidden // head, "axes": AXES.get(head), "guidance": "guidance_in.in_layer.weight" in shapes,
        "depth": _count(shapes, "double_blocks.{}.img_attn.qkv.weight"),
        "single_depth": _count(shapes, "single_blocks.{}.linear1.weight"),
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"][0] / hidden,
        "context_dim": shapes["txt_in.weight"][1], "pooled_dim": shapes["vector_in.in_layer.weight"][1],
    }


def _original_unsaid(shapes: Shapes, foreign: dict | None, *, prefixes: dict[str, str]) -> tuple[str, ...]:
    kind = _kind(shapes, MARKS, prefixes)
    normed = f"{prefixes['sd3']}joint_blocks.0.x_block.attn.ln_q.weight" in shapes
    return ("net.axes",) if kind == "flux" else ("net.size",) if normed else ("net.size", "net.heads")


def _original_table(config: dict, *, prefixes: dict[str, str]) -> list[Row]:
    kind = config["net"]["kind"]
    return (_sd3_original_table if kind == "sd3" else _flux_original_table)(prefixes[kind])


def _sd3_original_table(p: str) -> list[Row]:
    rows = _linears("", p, {
        "patch": "x_embedder.proj", "time.fc1": "t_embedder.mlp.0", "time.fc2": "t_embedder.mlp.2",
        "pooled.0": "y_embedder.mlp.0", "pooled.2": "y_embedder.mlp.2", "context_in": "context_embedder",
        "final_adaln": "final_layer.adaLN_modulation.1", "final": "final_layer.linear"})
    rows.append(Row("positions", f"{p}pos_embed"))
    for side, theirs in (("x", "x_block"), ("context", "context_block")):
        ours, block = f"blocks.*.{side}.", f"{p}joint_blocks.*.{theirs}."
        rows += _linears(ours, block, {"adaln": "adaLN_modulation.1", "fc1": "mlp.fc1", "fc2": "mlp.fc2"})
        for attn in ("attn", "attn2"):
            rows += [*_linears(ours, block, {f"{attn}.qkv": f"{attn}.qkv", f"{attn}.proj": f"{attn}.proj"}),
                     *_gains(ours + attn, f"{block}{attn}.ln_q.weight", f"{block}{attn}.ln_k.weight")]
    return rows


def _flux_original_table(p: str) -> list[Row]:
    rows = _linears("", p, {
        "x_in": "img_in", "context_in": "txt_in", "final_adaln": "final_layer.adaLN_modulation.1",
        "final": "final_layer.linear", "time.fc1": "time_in.in_layer", "time.fc2": "time_in.out_layer",
        "guidance.fc1": "guidance_in.in_layer", "guidance.fc2": "guidance_in.out_layer",
        "pooled.0": "vector_in.in_layer", "pooled.2": "vector_in.out_layer"})
    for side, theirs in (("x", "img"), ("context", "txt")):
        ours, block = f"blocks.*.{side}.", f"{p}double_blocks.*.{theirs}_"
        rows += _linears(ours, block, {"adaln": "mod.lin", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj",
                                       "fc1": "mlp.0", "fc2": "mlp.2"})
        rows += _gains(f"{ours}attn", f"{block}attn.norm.query_norm.scale", f"{block}attn.norm.key_norm.scale")
    single = f"{p}single_blocks.*."
    rows += _linears("singles.*.", single, {"adaln": "modulation.lin", "inner": "linear1", "outer": "linear2"})
    return rows + _gains("singles.*", f"{single}norm.query_norm.scale", f"{single}norm.key_norm.scale")


def _original_constants(config: dict, *, prefixes: dict[str, str]) -> dict[str, Tensor]:
    return _positions(config, f"{prefixes['sd3']}pos_embed")


def _positions(config: dict, key: str) -> dict[str, Tensor]:
    net = _parsed(config)
    computed = net.kind == "sd3" and not net.stored_positions
    return {key: position_table(net)[None]} if computed else {}


# --- diffusers -----------------------------------------------------------------------------------------------------

def _diffusers_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return _kind(shapes, FOLDER_MARKS, {"sd3": "", "flux": ""}) is not None


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    kind = _kind(shapes, FOLDER_MARKS, {"sd3": "", "flux": ""})
    if foreign is None:
        raise ModelError("a diffusers transformer needs the config.json beside its weights",
                         hint="convert the folder, not the file in it")
    named = foreign.get("_class_name", next(name for name, k in CLASSES.items() if k == kind))
    if CLASSES.get(named) != kind:
        raise ModelError(f"config.json says {named}, but the weights are those of {kind}")
    first = "transformer_blocks.0."
    hidden = shapes["context_embedder.weight"][0]
    shared = {"hidden": hidden, "depth": _count(shapes, "transformer_blocks.{}.attn.to_q.weight"),
              "mlp_ratio": shapes[f"{first}ff.net.0.proj.weight"][0] / hidden,
              "context_dim": shapes["context_embedder.weight"][1],
              "pooled_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1]}
    return _system(kind, shared | (_sd3_folder if kind == "sd3" else _flux_folder)(shapes, foreign))


def _sd3_folder(shapes: Shapes, foreign: dict) -> dict:
    if foreign.get("qk_norm") not in (None, "rms_norm"):
        raise ModelError(f"config.json: qk_norm is {foreign['qk_norm']!r}, this network has 'rms_norm' or none")
    hidden, channels, patch, _ = shapes["pos_embed.proj.weight"]
    return {"size": foreign.get("sample_size", SIZE), "patch": patch, "in_channels": channels,
            "heads": foreign.get("num_attention_heads", hidden // HEAD),
            "positions": round(shapes["pos_embed.pos_embed"][1] ** 0.5), "stored_positions": True,
            "qk_norm": "transformer_blocks.0.attn.norm_q.weight" in shapes,
            "dual": list(foreign.get("dual_attention_layers", ()))}


def _flux_folder(shapes: Shapes, foreign: dict) -> dict:
    hidden, packed = shapes["x_embedder.weight"]
    head = shapes["transformer_blocks.0.attn.norm_q.weight"][0]
    return {"in_channels": packed // 4, "out_channels": shapes["proj_out.weight"][0] // 4, "heads": hidden // head,
            "axes": list(foreign.get("axes_dims_rope") or AXES.get(head, ())) or None,
            "single_depth": _count(shapes, "single_transformer_blocks.{}.proj_mlp.weight"),
            "guidance": "time_text_embed.guidance_embedder.linear_1.weight" in shapes}


def _diffusers_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    names = ({"axes_dims_rope": "net.axes"} if "x_embedder.weight" in shapes else
             {"sample_size": "net.size", "num_attention_heads": "net.heads"})
    return tuple(native for name, native in names.items() if name not in (foreign or {}))


def _diffusers_table(config: dict) -> list[Row]:
    net, embed = config["net"], "time_text_embed."
    rows = [
        *_linears("", embed, {
            "time.fc1": "timestep_embedder.linear_1", "time.fc2": "timestep_embedder.linear_2",
            "guidance.fc1": "guidance_embedder.linear_1", "guidance.fc2": "guidance_embedder.linear_2",
            "pooled.0": "text_embedder.linear_1", "pooled.2": "text_embedder.linear_2"}),
        *layer("context_in", "context_embedder"),
        *layer("final_adaln", "norm_out.linear", op="swap"),
        *layer("final", "proj_out"),
    ]
    if net["kind"] == "flux":
        return [*rows, *layer("x_in", "x_embedder"), *_joint_rows(), *_single_rows(net)]
    last = net["depth"] - 1                         # its rows go before those of any block
    return [*rows, *layer("patch", "pos_embed.proj"), Row("positions", "pos_embed.pos_embed"),
            *layer(f"blocks.{last}.context.adaln", f"transformer_blocks.{last}.norm1_context.linear", op="swap"),
            *_joint_rows(), *_attention_rows("x.attn2", "attn2", ("to_q", "to_k", "to_v"), "to_out.0", ("q", "k"))]


def _joint_rows() -> list[Row]:
    return [
        *_linears("blocks.*.", "transformer_blocks.*.", {
            "x.adaln": "norm1.linear", "x.fc1": "ff.net.0.proj", "x.fc2": "ff.net.2",
            "context.adaln": "norm1_context.linear", "context.fc1": "ff_context.net.0.proj",
            "context.fc2": "ff_context.net.2"}),
        *_attention_rows("x.attn", "attn", ("to_q", "to_k", "to_v"), "to_out.0", ("q", "k")),
        *_attention_rows("context.attn", "attn", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out",
                         ("added_q", "added_k")),
    ]


def _attention_rows(native: str, foreign: str, qkv: tuple[str, ...], out: str, norms: tuple[str, str]) -> list[Row]:
    ours, theirs = f"blocks.*.{native}", f"transformer_blocks.*.{foreign}."
    return [*layer(f"{ours}.qkv", *(theirs + name for name in qkv)), *layer(f"{ours}.proj", theirs + out),
            *_gains(ours, *(f"{theirs}norm_{name}.weight" for name in norms))]


def _single_rows(net: dict) -> list[Row]:
    theirs, mlp = "single_transformer_blocks.*.", round(net["hidden"] * net["mlp_ratio"])
    return [
        *_linears("singles.*.", theirs, {"adaln": "norm.linear", "outer": "proj_out"}),
        *layer("singles.*.inner", *(f"{theirs}attn.to_{name}" for name in "qkv"), f"{theirs}proj_mlp",
                 ratio=(net["hidden"],) * 3 + (mlp,)),
        *_gains("singles.*", f"{theirs}attn.norm_q.weight", f"{theirs}attn.norm_k.weight"),
    ]


def _diffusers_constants(config: dict) -> dict[str, Tensor]:
    if _parsed(config).mlp_ratio != 4:
        raise ModelError(f"diffusers' network has an MLP of 4 x hidden, this one has {_parsed(config).mlp_ratio} x",
                         hint="write it with --to original")
    return _positions(config, "pos_embed.pos_embed")


def _diffusers_foreign(config: dict) -> dict:
    net = _parsed(config)
    shared = {"_diffusers_version": "0.42.1", "num_layers": net.depth, "num_attention_heads": net.heads,
              "attention_head_dim": net.hidden // net.heads, "joint_attention_dim": net.context_dim,
              "pooled_projection_dim": net.pooled_dim}
    if net.kind == "flux":
        if net.theta != FluxNetConfig().theta:
            raise ModelError(f"diffusers' FLUX has theta {FluxNetConfig().theta:g}, this one has {net.theta:g}")
        return shared | {
            "_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": 4 * net.in_channels,
            "out_channels": None if net.in_channels == net.out_channels else 4 * net.out_channels,
            "num_single_layers": net.single_depth, "guidance_embeds": net.guidance, "axes_dims_rope": list(net.axes)}
    return shared | {
        "_class_name": "SD3Transformer2DModel", "sample_size": net.size, "patch_size": net.patch,
        "in_channels": net.in_channels, "out_channels": net.in_channels, "caption_projection_dim": net.hidden,
        "pos_embed_max_size": net.positions, "dual_attention_layers": list(net.dual),
        "qk_norm": "rms_norm" if net.qk_norm else None}


def _original(name: str, prefixes: dict[str, str]) -> Layout:
    return Layout(name, "mmdit", "net", lambda shapes, foreign: _kind(shapes, MARKS, prefixes) is not None,
                  partial(_original_config, prefixes=prefixes), partial(_original_table, prefixes=prefixes),
                  drop=BESIDE, constants=partial(_original_constants, prefixes=prefixes),
                  unsaid=partial(_original_unsaid, prefixes=prefixes))


LAYOUTS = (
    _original("original", PUBLISHED),
    _original("original-repacked", REPACKED),
    Layout("diffusers", "mmdit", "net", _diffusers_matches, _diffusers_config, _diffusers_table, _diffusers_foreign,
           unsaid=_diffusers_unsaid, constants=_diffusers_constants),
)
