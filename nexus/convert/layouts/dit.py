"""DiT: the paper's single file and diffusers' DiTTransformer2DModel folder.

Trap: diffusers repeats the time and label embedders in every block. Trap: it computes the time sinusoid with a
denominator of 127 instead of the paper's 128, and its folders say norm_eps 1e-5 for 1e-6, which only the norm before
an MLP heeds: its output differs a little from the paper's on the same weights. A model keeps to where it came from.
"""

from torch import Tensor

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.labels import numbered
from nexus.convert.layouts.unet_rows import layer
from nexus.errors import ModelError
from nexus.models.diffusion.dit import DiTNetConfig, position_table

PUBLISHED_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}          # by hidden width: S, B, L, XL
BLOCK = "transformer_blocks.*."
EMB = "transformer_blocks.0.norm1.emb."


def _writable(config: dict) -> DiTNetConfig:
    net = DiTNetConfig.parse(config["net"])
    if net.num_styles or not (net.num_classes and net.null_class):
        raise ModelError("public DiT layouts hold a label table with a null row and no style table",
                         hint="only a model with num_classes > 0, null_class true and num_styles 0 can be written")
    return net


def _from_shapes(shapes: Shapes, patch: str, label: str, block: str, fc1: str, final: str) -> dict:
    hidden, channels, side, _ = shapes[patch]
    return {
        "patch": side, "in_channels": channels, "hidden": hidden,
        "depth": sum(k.startswith(block) and k.endswith(fc1) for k in shapes),
        "mlp_ratio": shapes[f"{block}0{fc1}"][0] / hidden,
        "num_classes": shapes[label][0] - 1,                     # every public DiT was trained with a null row
        "learn_sigma": shapes[final][0] == 2 * channels * side**2,
    }


def _original_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight",
            "blocks.0.adaLN_modulation.1.weight", "final_layer.linear.weight"} <= shapes.keys()


def _original_config(shapes: Shapes, foreign: dict | None) -> dict:
    net = _from_shapes(shapes, "x_embedder.proj.weight", "y_embedder.embedding_table.weight", "blocks.",
                       ".mlp.fc1.weight", "final_layer.linear.weight")
    grid = round(shapes["pos_embed"][1] ** 0.5) if "pos_embed" in shapes else 32 // net["patch"]
    net |= {"size": grid * net["patch"], "heads": PUBLISHED_HEADS.get(net["hidden"])}
    return {"net": net, "learned_variance": net["learn_sigma"]} | numbered(net)


def _original_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    return ("net.heads",) if "pos_embed" in shapes else ("net.heads", "net.size")


def _original_table(config: dict) -> list[Row]:
    return [
        *layer("patch", "x_embedder.proj"),
        *layer("time.fc1", "t_embedder.mlp.0"),
        *layer("time.fc2", "t_embedder.mlp.2"),
        Row("label.weight", "y_embedder.embedding_table.weight"),
        *layer("blocks.*.adaln", "blocks.*.adaLN_modulation.1"),
        *layer("blocks.*.qkv", "blocks.*.attn.qkv"),
        *layer("blocks.*.proj", "blocks.*.attn.proj"),
        *layer("blocks.*.fc1", "blocks.*.mlp.fc1"),
        *layer("blocks.*.fc2", "blocks.*.mlp.fc2"),
        *layer("final_adaln", "final_layer.adaLN_modulation.1"),
        *layer("final", "final_layer.linear"),
    ]


def _original_constants(config: dict) -> dict[str, Tensor]:
    return {"pos_embed": position_table(_writable(config))[None]}


def _diffusers_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"pos_embed.proj.weight", f"{EMB}class_embedder.embedding_table.weight", "proj_out_2.weight",
            "transformer_blocks.0.attn1.to_q.weight"} <= shapes.keys()


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    net = _from_shapes(shapes, "pos_embed.proj.weight", f"{EMB}class_embedder.embedding_table.weight",
                       "transformer_blocks.", ".ff.net.0.proj.weight", "proj_out_2.weight")
    said = foreign or {}
    if said.get("activation_fn", "gelu-approximate") != "gelu-approximate":
        raise ModelError(f"config.json: activation_fn is {said['activation_fn']!r}, a DiT has 'gelu-approximate'")
    net |= {"size": said.get("sample_size", 32),
            "heads": said.get("num_attention_heads", PUBLISHED_HEADS.get(net["hidden"]))}
    net |= {"freq_shift": 1.0, "mlp_eps": said.get("norm_eps", 1e-5)}
    return {"net": net, "learned_variance": net["learn_sigma"]} | numbered(net)


def _diffusers_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    names = {"num_attention_heads": "net.heads", "sample_size": "net.size"}
    return tuple(native for name, native in names.items() if name not in (foreign or {}))


def _embedder(native: str, foreign: str) -> list[Row]:
    """A layer that every block repeats."""
    return layer(native, EMB + foreign, copies=f"{BLOCK}norm1.emb.{foreign}")


def _diffusers_table(config: dict) -> list[Row]:
    attn = f"{BLOCK}attn1."
    return [
        *layer("patch", "pos_embed.proj"),
        *_embedder("time.fc1", "timestep_embedder.linear_1"),
        *_embedder("time.fc2", "timestep_embedder.linear_2"),
        _embedder("label", "class_embedder.embedding_table")[0],
        *layer("blocks.*.adaln", f"{BLOCK}norm1.linear"),
        *layer("blocks.*.qkv", f"{attn}to_q", f"{attn}to_k", f"{attn}to_v"),
        *layer("blocks.*.proj", f"{attn}to_out.0"),
        *layer("blocks.*.fc1", f"{BLOCK}ff.net.0.proj"),
        *layer("blocks.*.fc2", f"{BLOCK}ff.net.2"),
        *layer("final_adaln", "proj_out_1"),
        *layer("final", "proj_out_2"),
    ]


def _diffusers_foreign(config: dict) -> dict:
    net = _writable(config)
    if net.mlp_ratio != 4:
        raise ModelError(f"diffusers' DiT has an MLP of 4 x hidden, this one has {net.mlp_ratio} x",
                         hint="write it with --to original")
    return {
        "_class_name": "DiTTransformer2DModel", "_diffusers_version": "0.42.1",
        "num_attention_heads": net.heads, "attention_head_dim": net.hidden // net.heads,
        "in_channels": net.in_channels, "out_channels": net.out_channels, "num_layers": net.depth,
        "dropout": 0.0, "norm_num_groups": 32, "attention_bias": True, "sample_size": net.size,
        "patch_size": net.patch, "activation_fn": "gelu-approximate", "num_embeds_ada_norm": net.num_classes,
        "upcast_attention": False, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
        "norm_eps": net.mlp_eps,
    }


LAYOUTS = (
    Layout("original", "dit", "net", _original_matches, _original_config, _original_table,
           unsaid=_original_unsaid, constants=_original_constants, fixed=("net.freq_shift", "net.mlp_eps")),
    Layout("diffusers", "dit", "net", _diffusers_matches, _diffusers_config, _diffusers_table,
           _diffusers_foreign, copies=lambda config: config["net"]["depth"], unsaid=_diffusers_unsaid,
           fixed=("net.freq_shift",)),
)
