"""UNet, diffusers' naming: UNet2DModel, and UNet2DConditionModel (the text-conditional one)."""

from nexus.convert.keymap import Row
from nexus.convert.layout import Shapes
from nexus.convert.layouts.unet_rows import layer, layers, net_config, transformer
from nexus.errors import ModelError
from nexus.models.diffusion.unet import UNetConfig

RES = {"norm1": "norm1", "conv1": "conv1", "emb_proj": "time_emb_proj", "norm2": "norm2", "conv2": "conv2",
       "skip": "conv_shortcut"}
NEW_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OLD_ATTENTION = ("query", "key", "value", "proj_attn")           # files of 2022, google/ddpm-* among them
SIDES = (("down.*", "down_blocks.*"), ("mid", "mid_block"), ("up.*", "up_blocks.*"))
NUMBERS = 6                                                      # SDXL's size, crop and target

# Settings of config.json that this architecture has in one value only (the first; absent counts as it).
FIXED = {
    "center_input_sample": (False,), "act_fn": ("silu", "swish"), "mid_block_scale_factor": (1,),
    "time_embedding_type": ("positional",), "class_embed_type": (None,), "add_attention": (True, False),
    "only_cross_attention": (False,), "dual_cross_attention": (False,), "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,), "encoder_hid_dim": (None,), "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,), "conv_in_kernel": (3,), "conv_out_kernel": (3,),
    "attention_type": ("default",), "class_embeddings_concat": (False,), "cross_attention_norm": (None,),
    "num_attention_heads": (None,),
    "reverse_transformer_layers_per_block": (None,), "addition_embed_type": (None, "text_time"),
    "mid_block_only_cross_attention": (None, False), "resnet_time_scale_shift": ("default", "scale_shift"),
    "mid_block_type": ("UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
# Kinds of a level by name: whether it attends, and what changes its resolution ("" = downsample_type says).
KINDS = {"DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, ""),
         "CrossAttnDownBlock2D": (True, "conv"), "ResnetDownsampleBlock2D": (False, "resnet"),
         "UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, ""), "CrossAttnUpBlock2D": (True, "conv"),
         "ResnetUpsampleBlock2D": (False, "resnet")}


def matches(shapes: Shapes, *, words: bool = False, old: bool = False) -> bool:
    """Whether the keys are a diffusers UNet's, with or without cross-attention, in the old naming or not.

    One of the telling ones may be missing: then the report names it.
    """
    needed = {"conv_in.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.norm1.weight",
              "mid_block.resnets.1.conv2.weight", "up_blocks.0.resnets.0.conv_shortcut.weight",
              "conv_norm_out.weight"}
    crosses = any(".attn2.to_k." in k for k in shapes)
    aged = any(k.endswith(".proj_attn.weight") for k in shapes)
    return len(needed - shapes.keys()) <= 1 and crosses == words and aged == old


def config_of(shapes: Shapes, foreign: dict | None) -> dict:
    """The network's configuration by config.json, or ModelError naming a setting that does not fit."""
    if foreign is None:
        raise ModelError("a diffusers UNet needs the config.json beside its weights",
                         hint="convert the folder, not the file in it")
    for name, allowed in FIXED.items():
        if foreign.get(name, allowed[0]) not in allowed:
            raise ModelError(f"config.json: {name} is {foreign[name]!r}, this UNet has {allowed[0]!r}")
    widths = foreign["block_out_channels"]
    attention, updown = _levels(foreign)
    scale_shift = foreign.get("resnet_time_scale_shift", "default") == "scale_shift"
    net = {
        "in_channels": foreign["in_channels"], "out_channels": foreign["out_channels"], "channels": widths[0],
        "mult": [w // widths[0] if w % widths[0] == 0 else w / widths[0] for w in widths],
        "blocks": _same(foreign, "layers_per_block", 2), "attention": attention, "resblock_updown": updown,
        "mid_attention": foreign.get("add_attention", True), "scale_shift": scale_shift,
        "dropout": foreign.get("dropout", 0.0), "groups": foreign.get("norm_num_groups", 32),
        "eps": foreign.get("norm_eps", 1e-5), "corner_pad": foreign.get("downsample_padding", 1) == 0,
        "sin_first": not foreign.get("flip_sin_to_cos", True), "freq_shift": foreign.get("freq_shift", 0),
    }
    if foreign.get("time_embedding_dim") not in (None, 4 * widths[0]):
        raise ModelError(f"config.json: time_embedding_dim is {foreign['time_embedding_dim']}, "
                         f"this UNet has 4 x {widths[0]}")
    if "class_embedding.weight" in shapes:           # diffusers does not say whether the last row is a null
        net |= {"num_classes": shapes["class_embedding.weight"][0], "null_class": False}
    if "cross_attention_dim" in foreign:
        return net | _words(foreign, widths, attention)
    norm = foreign.get("attn_norm_num_groups") or (None if scale_shift else net["groups"])
    if net["mid_attention"] and norm != net["groups"]:
        raise ModelError(f"config.json: the middle attention has {norm or 'no'} groups, the rest "
                         f"{net['groups']}")
    head_dim = foreign.get("attention_head_dim", 8)
    return net | ({"heads": 1} if head_dim is None else {"head_dim": head_dim})


def _levels(foreign: dict) -> tuple[list[int], bool]:
    """The levels that attend, and whether residual blocks change the resolution."""
    names = {side: [name.removeprefix("UNetRes") for name in foreign[f"{side}_block_types"]]
             for side in ("down", "up")}
    if bad := [name for name in names["down"] + names["up"] if name not in KINDS]:
        raise ModelError(f"config.json: this UNet has no {bad[0]}", hint="it has " + ", ".join(KINDS))
    attends = [KINDS[name][0] for name in names["down"]]
    if attends != [KINDS[name][0] for name in reversed(names["up"])]:
        raise ModelError("config.json: other levels attend on the way up than on the way down")
    # The last level of each side changes no resolution, whatever it is called.
    ways = {KINDS[name][1] or foreign.get(f"{side}sample_type", "conv")
            for side in ("down", "up") for name in names[side][:-1]}
    if len(ways) > 1:
        raise ModelError("config.json: both convolutions and residual blocks change the resolution")
    return [i for i, yes in enumerate(attends) if yes], ways == {"resnet"}


def _same(foreign: dict, name: str, default: int) -> int:
    """A setting given once or for every level, which all levels share here."""
    value = foreign.get(name, default)
    values = {value} if isinstance(value, int) else set(value)
    if len(values) > 1:
        raise ModelError(f"config.json: {name} differs between levels: {value}")
    return values.pop()


def _words(foreign: dict, widths: list[int], attention: list[int]) -> dict:
    """Cross-attention and added conditions; diffusers' `attention_head_dim` is the number of heads here."""
    heads, depth = foreign.get("attention_head_dim", 8), foreign.get("transformer_layers_per_block", 1)
    heads = [heads] * len(widths) if isinstance(heads, int) else heads
    depth = [depth] * len(widths) if isinstance(depth, int) else depth
    attending = sorted({*attention, len(widths) - 1})
    dims, counts = {widths[i] // heads[i] for i in attending}, {heads[i] for i in attending}
    if len(counts) > 1 and len(dims) > 1:
        raise ModelError(f"config.json: attention_head_dim {heads} is not one number of heads nor one width")
    words = {"context_dim": _same(foreign, "cross_attention_dim", 1280),
             "depth": depth if max(depth) > 1 else [],
             "linear_proj": foreign.get("use_linear_projection", False),
             "guidance_dim": foreign.get("time_cond_proj_dim") or 0}
    words |= {"heads": counts.pop()} if len(counts) == 1 else {"head_dim": dims.pop()}
    if foreign.get("addition_embed_type") == "text_time":
        freqs = foreign["addition_time_embed_dim"]
        words |= {"micro": NUMBERS, "micro_freqs": freqs,
                  "pooled_dim": foreign["projection_class_embeddings_input_dim"] - NUMBERS * freqs}
    return words


def table(config: dict, *, names: tuple[str, str, str, str] = NEW_ATTENTION) -> list[Row]:
    """The rows; names are those of q, k, v and the output in a self-attention."""
    net = net_config(config)
    rows = [
        *layer("time.fc1", "time_embedding.linear_1"), *layer("time.fc2", "time_embedding.linear_2"),
        *layer("guidance", "time_embedding.cond_proj", bias=False),
        *layer("label", "class_embedding", bias=False),
        *layer("pooled.0", "add_embedding.linear_1"), *layer("pooled.2", "add_embedding.linear_2"),
        *layer("conv_in", "conv_in"), *layer("norm_out", "conv_norm_out"), *layer("conv_out", "conv_out"),
        *layer("down.*.resample.conv", "down_blocks.*.downsamplers.0.conv"),
        *layer("up.*.resample.conv", "up_blocks.*.upsamplers.0.conv"),
        *layers("down.*.resample", "down_blocks.*.downsamplers.0", RES),
        *layers("up.*.resample", "up_blocks.*.upsamplers.0", RES),
    ]
    for native, foreign in SIDES:
        rows += layers(f"{native}.res.*", f"{foreign}.resnets.*", RES)
        ours, theirs = f"{native}.attn.*", f"{foreign}.attentions.*"
        rows += transformer(ours, theirs, net.linear_proj) if net.context_dim else [
            *layer(f"{ours}.norm", f"{theirs}.group_norm"),
            *layer(f"{ours}.qkv", *(f"{theirs}.{name}" for name in names[:3])),
            *layer(f"{ours}.proj", f"{theirs}.{names[3]}")]
    return rows


def foreign_config(config: dict) -> dict:
    """The folder's config.json, or ModelError when diffusers cannot say what the network is."""
    net = net_config(config)
    if net.widths[0] != net.channels:
        raise ModelError(f"diffusers' first level is as wide as the base {net.channels}, not {net.widths[0]}")
    said = {
        "_class_name": "UNet2DConditionModel" if net.context_dim else "UNet2DModel",
        "_diffusers_version": "0.42.1",
        "sample_size": config.get("size"), "in_channels": net.in_channels, "out_channels": net.out_channels,
        "center_input_sample": False,
        "flip_sin_to_cos": not net.sin_first, "freq_shift": net.freq_shift,
        "block_out_channels": list(net.widths), "layers_per_block": net.blocks,
        "mid_block_scale_factor": 1, "downsample_padding": 0 if net.corner_pad else 1, "dropout": net.dropout,
        "act_fn": "silu", "norm_num_groups": net.groups, "norm_eps": net.eps,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
        "num_class_embeds": net.num_classes + net.null_class if net.num_classes else None,
    }
    return said | (_condition_model(net) if net.context_dim else _plain_model(net))


def _plain_model(net: UNetConfig) -> dict:
    attending = {net.widths[i] for i in net.attention} | ({net.widths[-1]} if net.mid_attention else set())
    dims = {width // net.heads_of(width) for width in attending}
    if net.heads_of(net.widths[-1]) > 1 and len(dims) > 1:
        raise ModelError(f"UNet2DModel has heads of one width, this network {net.heads} heads at every width",
                         hint="write it with --to openai")
    one = len(dims) > 1 or not dims                              # one head everywhere
    kind = "Resnet{0}sampleBlock2D" if net.resblock_updown else "{0}Block2D"
    way = "resnet" if net.resblock_updown else "conv"
    return {
        "attention_head_dim": None if one else dims.pop(), "add_attention": net.mid_attention,
        "attn_norm_num_groups": net.groups, "downsample_type": way, "upsample_type": way,
        "time_embedding_type": "positional", "class_embed_type": None,
        "down_block_types": _types(net, kind.format("Down"), "AttnDownBlock2D"),
        "up_block_types": _types(net, kind.format("Up"), "AttnUpBlock2D")[::-1],
    }


def _condition_model(net: UNetConfig) -> dict:
    if net.resblock_updown or not net.mid_attention:
        raise ModelError("UNet2DConditionModel has convolutions between levels and attention in the middle")
    said = {
        "attention_head_dim": [net.heads_of(w) for w in net.widths] if net.head_dim else net.heads,
        "cross_attention_dim": net.context_dim, "use_linear_projection": net.linear_proj,
        "transformer_layers_per_block": list(net.depth) or 1, "time_cond_proj_dim": net.guidance_dim or None,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "down_block_types": _types(net, "DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": _types(net, "UpBlock2D", "CrossAttnUpBlock2D")[::-1],
    }
    if net.micro:
        said |= {"addition_embed_type": "text_time", "addition_time_embed_dim": net.micro_freqs,
                 "projection_class_embeddings_input_dim": net.pooled_dim + net.micro * net.micro_freqs}
    return said


def _types(net: UNetConfig, plain: str, attending: str) -> list[str]:
    return [attending if i in net.attention else plain for i in range(len(net.mult))]
