"""PixArt-alpha: the paper's `.pth` (under "state_dict") and diffusers' PixArtTransformer2DModel folder.

Trap: diffusers has no place for the stored null caption. A folder written here keeps it under a key of its own, which
diffusers passes over with a warning and which is read back here; diffusers' own folders have none.
Trap: the original file does not tell how positions are scaled; by size it is 0.5, 1, 2 at 256, 512, 1024 pixels. Its
stored position table is compared, so a wrong scale is refused: it is given with --set net.pos_scale=VALUE.
"""

from torch import Tensor

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.unet_rows import layer, layers
from nexus.errors import ModelError
from nexus.models.diffusion.pixart_alpha import PixArtNetConfig, position_table

PUBLISHED_HEADS = {1152: 16}                                    # by hidden width
PUBLISHED_SCALE = {32: 0.5, 64: 1.0, 128: 2.0}                  # by latent side
BLOCK = "transformer_blocks.*."
EMB = "adaln_single.emb."
NULL = {"original": "y_embedder.y_embedding", "diffusers": "caption_projection.y_embedding"}
# Settings of diffusers' config.json that the network has in one value only (absent counts as it).
FIXED = {"activation_fn": "gelu-approximate", "norm_type": "ada_norm_single", "attention_bias": True,
         "norm_elementwise_affine": False, "attention_type": "default"}


def _from_shapes(shapes: Shapes, patch: str, caption: str, fc1: str, final: str, sized: str, null: str) -> dict:
    hidden, channels, side, _ = shapes[patch]
    before, after = fc1.split("*")
    return {
        "patch": side, "in_channels": channels, "hidden": hidden,
        "depth": sum(key.startswith(before) and key.endswith(after) for key in shapes),
        "mlp_ratio": shapes[fc1.replace("*", "0")][0] / hidden,
        "context_dim": shapes[caption][1], "sized": sized in shapes, "null_tokens": shapes.get(null, (0,))[0],
        "learn_sigma": shapes[final][0] == 2 * channels * side**2,
    }


def _system(net: dict) -> dict:
    return {"net": net, "learned_variance": net["learn_sigma"]}


def _original_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"x_embedder.proj.weight", "t_block.1.weight", "y_embedder.y_proj.fc1.weight",
            "blocks.0.cross_attn.kv_linear.weight", "final_layer.scale_shift_table"} <= shapes.keys()


def _original_config(shapes: Shapes, foreign: dict | None) -> dict:
    net = _from_shapes(shapes, "x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "blocks.*.mlp.fc1.weight",
                       "final_layer.linear.weight", "csize_embedder.mlp.0.weight", NULL["original"])
    usual = 128 if net["sized"] else 64
    size = round(shapes["pos_embed"][1] ** 0.5) * net["patch"] if "pos_embed" in shapes else usual
    return _system(net | {"size": size, "heads": PUBLISHED_HEADS.get(net["hidden"]),
                          "pos_scale": PUBLISHED_SCALE.get(size, 1.0)})


def _original_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    return ("net.heads", "net.pos_scale") if "pos_embed" in shapes else ("net.heads", "net.pos_scale", "net.size")


def _original_table(config: dict) -> list[Row]:
    return [
        *layer("patch", "x_embedder.proj"),
        *(row for native, foreign in (("time", "t_embedder"), ("side", "csize_embedder"), ("aspect", "ar_embedder"))
          for row in layers(native, foreign, {"fc1": "mlp.0", "fc2": "mlp.2"})),
        *layer("adaln", "t_block.1"),
        *layer("caption1", "y_embedder.y_proj.fc1"),
        *layer("caption2", "y_embedder.y_proj.fc2"),
        *layer("final", "final_layer.linear"),
        *layers("blocks.*", "blocks.*", {"qkv": "attn.qkv", "proj": "attn.proj", "cross_q": "cross_attn.q_linear",
                                         "cross_kv": "cross_attn.kv_linear", "cross_proj": "cross_attn.proj",
                                         "fc1": "mlp.fc1", "fc2": "mlp.fc2"}),
        Row("blocks.*.table", "blocks.*.scale_shift_table"),
        Row("final_table", "final_layer.scale_shift_table"),
        Row("null", NULL["original"]),
    ]


def _original_constants(config: dict) -> dict[str, Tensor]:
    return {"pos_embed": position_table(PixArtNetConfig.parse(config["net"]))[None]}


def _diffusers_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"pos_embed.proj.weight", "adaln_single.linear.weight", "caption_projection.linear_1.weight",
            "transformer_blocks.0.attn2.to_q.weight", "scale_shift_table", "proj_out.weight"} <= shapes.keys()


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    net = _from_shapes(shapes, "pos_embed.proj.weight", "caption_projection.linear_1.weight",
                       f"{BLOCK}ff.net.0.proj.weight", "proj_out.weight",
                       f"{EMB}resolution_embedder.linear_1.weight", NULL["diffusers"])
    said = foreign or {}
    for name, only in FIXED.items():
        if said.get(name, only) != only:
            raise ModelError(f"config.json: {name} is {said[name]!r}, a PixArt-alpha has {only!r}")
    size = said.get("sample_size", 128)
    scale = said.get("interpolation_scale")
    return _system(net | {"size": size, "heads": said.get("num_attention_heads", PUBLISHED_HEADS.get(net["hidden"])),
                          "pos_scale": max(size // 64, 1) if scale is None else scale})


def _diffusers_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    names = {"num_attention_heads": "net.heads", "sample_size": "net.size"}
    missing = tuple(native for name, native in names.items() if name not in (foreign or {}))
    return missing if foreign else (*missing, "net.pos_scale")


def _diffusers_table(config: dict) -> list[Row]:
    return [
        *layer("patch", "pos_embed.proj"),
        *(row for native, foreign in (("time", "timestep_embedder"), ("side", "resolution_embedder"),
                                      ("aspect", "aspect_ratio_embedder"))
          for row in layers(native, EMB + foreign, {"fc1": "linear_1", "fc2": "linear_2"})),
        *layer("adaln", "adaln_single.linear"),
        *layer("caption1", "caption_projection.linear_1"),
        *layer("caption2", "caption_projection.linear_2"),
        *layer("final", "proj_out"),
        *layer("blocks.*.qkv", *(f"{BLOCK}attn1.to_{p}" for p in "qkv")),
        *layer("blocks.*.cross_kv", *(f"{BLOCK}attn2.to_{p}" for p in "kv")),
        *layers("blocks.*", BLOCK[:-1], {"proj": "attn1.to_out.0", "cross_q": "attn2.to_q",
                                         "cross_proj": "attn2.to_out.0", "fc1": "ff.net.0.proj", "fc2": "ff.net.2"}),
        Row("blocks.*.table", f"{BLOCK}scale_shift_table"),
        Row("final_table", "scale_shift_table"),
        Row("null", NULL["diffusers"]),
    ]


def _diffusers_foreign(config: dict) -> dict:
    net = PixArtNetConfig.parse(config["net"])
    if net.mlp_ratio != 4:
        raise ModelError(f"diffusers' PixArt has an MLP of 4 x hidden, this one has {net.mlp_ratio} x",
                         hint="write it with --to original")
    return FIXED | {
        "_class_name": "PixArtTransformer2DModel", "_diffusers_version": "0.42.1",
        "num_attention_heads": net.heads, "attention_head_dim": net.hidden // net.heads,
        "in_channels": net.in_channels, "out_channels": net.out_channels, "num_layers": net.depth, "dropout": 0.0,
        "norm_num_groups": 32, "cross_attention_dim": net.hidden, "sample_size": net.size, "patch_size": net.patch,
        "num_embeds_ada_norm": 1000, "upcast_attention": False, "norm_eps": 1e-6,
        "interpolation_scale": net.pos_scale, "use_additional_conditions": net.sized,
        "caption_channels": net.context_dim,
    }


LAYOUTS = (
    Layout("original", "pixart", "net", _original_matches, _original_config, _original_table,
           unsaid=_original_unsaid, constants=_original_constants),
    Layout("diffusers", "pixart", "net", _diffusers_matches, _diffusers_config, _diffusers_table,
           _diffusers_foreign, unsaid=_diffusers_unsaid),
)
