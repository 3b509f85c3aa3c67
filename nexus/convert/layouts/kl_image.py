"""The picture codecs: diffusers' AutoencoderKL and VQModel, and single files of VQGAN, latent diffusion, SD3, FLUX."""

from functools import partial

from torch import Tensor

from nexus.codecs.kl_image import KLConfig
from nexus.codecs.vq_image import VQConfig
from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts.unet_rows import layer, layers
from nexus.errors import ModelError

EPS, GROUPS = 1e-6, 32                  # neither is told by a single file; diffusers tells the groups
PREFIX = "first_stage_model."           # where the codec lies in a whole Stable Diffusion or SD3 file
TRAINED = {"likelihood": "laplace", "beta": 1e-6, "per_value": True, "edge_weight": 0.5}
RES = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
NEW_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OLD_ATTENTION = ("query", "key", "value", "proj_attn")          # files of 2022
ENDS = ("conv_in", "conv_out")
DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
CODES = "quantize.embedding.weight"                             # of a VQ codec, which has all other keys of a KL codec
NETS = {"kl": KLConfig, "vq": VQConfig}

# Settings of config.json that this codec has in one value only (the first; absent counts as it).
FIXED = {"act_fn": ("silu", "swish"), "latents_mean": (None,), "latents_std": (None,), "norm_type": ("group",)}


def _middle_rows(config: dict, prefix: str) -> list[Row]:
    """What lies between the encoder and the decoder, in every layout."""
    codes = [Row("codes.weight", prefix + CODES)] if config["net"]["kind"] == "vq" else []
    return [*layer("quant_conv", f"{prefix}quant_conv"), *layer("post_quant_conv", f"{prefix}post_quant_conv"), *codes]


def _diffusers_table(config: dict, *, names: tuple[str, ...] = NEW_ATTENTION) -> list[Row]:
    rows = _middle_rows(config, "")
    for side, stage, way in (("encoder", "down_blocks", "downsamplers"), ("decoder", "up_blocks", "upsamplers")):
        middle = f"{side}.mid_block.attentions.0"
        inner, theirs = f"{side}.stages.*.attentions.*", f"{side}.{stage}.*.attentions.*"
        rows += [
            *layers(side, side, {**{end: end for end in ENDS}, "norm_out": "conv_norm_out"}),
            *layers(f"{side}.stages.*.blocks.*", f"{side}.{stage}.*.resnets.*", RES | {"skip": "conv_shortcut"}),
            *layer(f"{side}.stages.*.resample.conv", f"{side}.{stage}.*.{way}.0.conv"),
            *layers(f"{side}.middle.block1", f"{side}.mid_block.resnets.0", RES),
            *layers(f"{side}.middle.block2", f"{side}.mid_block.resnets.1", RES),
            *(row for ours, here in ((f"{side}.middle.attention", middle), (inner, theirs))
              for row in (*layer(f"{ours}.norm", f"{here}.group_norm"),
                          *layer(f"{ours}.qkv", *(f"{here}.{name}" for name in names[:3])),
                          *layer(f"{ours}.proj", f"{here}.{names[3]}"))),
        ]
    return rows


def _original_table(config: dict, *, prefix: str) -> list[Row]:
    """The decoder's levels are numbered from the largest resolution, ours in the order in which they run."""
    net = config["net"]
    count = len(net["channels"]) if net["kind"] in NETS else 4
    rows = _middle_rows(config, prefix)
    for side, level, way in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        theirs = f"{prefix}{side}"
        for i in range(count):
            stage, here = f"{side}.stages.{i}", f"{theirs}.{level}.{i if side == 'encoder' else count - 1 - i}"
            rows += [*layers(f"{stage}.blocks.*", f"{here}.block.*", RES | {"skip": "nin_shortcut"}),
                     *_original_attention(f"{stage}.attentions.*", f"{here}.attn.*"),
                     *layer(f"{stage}.resample.conv", f"{here}.{way}.conv")]
        rows += [
            *layers(side, theirs, {end: end for end in (*ENDS, "norm_out")}),
            *layers(f"{side}.middle.block1", f"{theirs}.mid.block_1", RES),
            *layers(f"{side}.middle.block2", f"{theirs}.mid.block_2", RES),
            *_original_attention(f"{side}.middle.attention", f"{theirs}.mid.attn_1"),
        ]
    return rows


def _original_attention(native: str, foreign: str) -> list[Row]:
    return [*layer(f"{native}.norm", f"{foreign}.norm"),
            *layer(f"{native}.qkv", *(f"{foreign}.{p}" for p in "qkv"), op="conv_to_linear"),
            *layer(f"{native}.proj", f"{foreign}.proj_out", op="conv_to_linear")]


def _diffusers_matches(shapes: Shapes, foreign: dict | None, *, old: bool) -> bool:
    attention = "encoder.mid_block.attentions.0.query.weight"
    return (len(shapes.get("encoder.down_blocks.0.resnets.0.conv1.weight", ())) == 4
            and {"encoder.mid_block.resnets.0.conv1.weight",
                 "decoder.up_blocks.0.resnets.0.conv1.weight"} <= set(shapes)
            and (attention in shapes) == old)


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    if foreign is None:
        raise ModelError("a diffusers codec needs the config.json beside its weights",
                         hint="convert the folder, not the file in it")
    for name, allowed in FIXED.items():
        if foreign.get(name, allowed[0]) not in allowed:
            raise ModelError(f"config.json: {name} is {foreign[name]!r}, this codec has {allowed[0]!r}")
    quant = foreign.get("use_quant_conv", True)
    if foreign.get("use_post_quant_conv", True) != quant:
        raise ModelError("config.json: this codec has both quant_conv and post_quant_conv, or neither")
    widths, size = foreign.get("block_out_channels", [64]), foreign.get("sample_size", 32)
    return TRAINED | {"net": {
        "kind": "kl", "in_channels": foreign.get("in_channels", 3), "out_channels": foreign.get("out_channels", 3),
        "latent_channels": foreign.get("latent_channels", 3 if CODES in shapes else 4), "channels": widths,
        "blocks": foreign.get("layers_per_block", 1), "attention": _attending(foreign),
        "groups": foreign.get("norm_num_groups", GROUPS),
        "mid_attention": foreign.get("mid_block_add_attention", True), "quant_conv": quant,
        "scale": foreign.get("scaling_factor", 0.18215), "shift": foreign.get("shift_factor") or 0.0,
        "size": _whole(size if isinstance(size, int) else 512, len(widths)),
    } | _codebook(shapes, "")}


def _attending(foreign: dict) -> list[int]:
    """The levels that attend, 0 the largest, by the kinds of blocks; ModelError for other kinds."""
    down, up = foreign.get("down_block_types", ()), foreign.get("up_block_types", ())
    if other := {*down, *up} - {*DOWN, *UP}:
        raise ModelError(f"config.json: this codec has no {min(other)}")
    found = [i for i, kind in enumerate(down) if kind == DOWN[1]]
    if found != [i for i, kind in enumerate(reversed(up)) if kind == UP[1]]:
        raise ModelError("config.json: this codec attends at the same levels on both sides")
    return found


def _codebook(shapes: Shapes, prefix: str) -> dict:
    """The settings of a VQ codec alone; its latents are scaled by whoever learns them."""
    if prefix + CODES not in shapes:
        return {}
    bins, dim = shapes[prefix + CODES]
    return {"kind": "vq", "bins": bins, "dim": dim, "quant_conv": True, "shift": 0.0}


def _whole(size: int, levels: int) -> int:
    """The nearest side that halves between all levels, at least one latent wide."""
    factor = 2 ** (levels - 1)
    return max(factor, size - size % factor)


def _original_matches(shapes: Shapes, foreign: dict | None, *, prefix: str) -> bool:
    needed = {f"{prefix}{key}.weight" for key in
              ("encoder.mid.block_1.norm1", "decoder.mid.block_1.norm1", "decoder.up.0.block.0.conv1",
               "decoder.conv_in")}
    return needed <= set(shapes) and len(shapes.get(f"{prefix}encoder.down.0.block.0.conv1.weight", ())) == 4


def _count(shapes: Shapes, pattern: str) -> int:
    """How many indices n = 0, 1, ... in the pattern name a tensor."""
    n = 0
    while pattern.format(n) in shapes:
        n += 1
    return n


def _original_config(shapes: Shapes, foreign: dict | None, *, prefix: str) -> dict:
    levels = _count(shapes, f"{prefix}encoder.down.{{}}.block.0.conv1.weight")
    quant = f"{prefix}quant_conv.weight" in shapes
    # Without quant convolutions it is SD3's codec when it lies in a whole file, and FLUX's when it is alone.
    usual = KLConfig.preset("sd-f8" if quant else "sd3" if prefix else "flux")
    return TRAINED | {"net": {
        "kind": "kl", "in_channels": shapes[f"{prefix}encoder.conv_in.weight"][1],
        "out_channels": shapes[f"{prefix}decoder.conv_out.weight"][0],
        "latent_channels": shapes[f"{prefix}decoder.conv_in.weight"][1],
        "channels": [shapes[f"{prefix}encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)],
        "blocks": _count(shapes, f"{prefix}encoder.down.0.block.{{}}.conv1.weight"),
        "attention": [i for i in range(levels) if f"{prefix}encoder.down.{i}.attn.0.norm.weight" in shapes],
        "groups": GROUPS, "mid_attention": f"{prefix}encoder.mid.attn_1.norm.weight" in shapes, "quant_conv": quant,
        "scale": 1.0 if prefix + CODES in shapes else usual.scale, "shift": usual.shift,
        "size": _whole(usual.size, levels),
    } | _codebook(shapes, prefix)}


def _sayable(config: dict) -> KLConfig:
    """The codec's network, or ModelError when no public layout can hold it."""
    if config["net"]["kind"] not in NETS:
        raise ModelError(f"public layouts hold picture codecs only, not a network '{config['net']['kind']}'")
    net = NETS[config["net"]["kind"]].parse(config["net"])
    if net.patch != 1:
        raise ModelError(f"public layouts have no folding of pixels, this codec has patch {net.patch}",
                         hint="only a codec with patch 1 can be written")
    if net.eps != EPS:
        raise ModelError(f"public layouts have eps {EPS}, this codec has {net.eps}")
    return net


def _original_constants(config: dict) -> dict[str, Tensor]:
    groups = _sayable(config).groups
    if groups != GROUPS:
        raise ModelError(f"the original layout has {GROUPS} groups a normalisation, this codec has {groups}",
                         hint="write it with --to diffusers")
    return {}


def _diffusers_constants(config: dict) -> dict[str, Tensor]:
    _sayable(config)
    return {}


def _foreign_config(config: dict) -> dict:
    net = _sayable(config)
    levels = len(net.channels)
    shared = {
        "_diffusers_version": "0.42.1", "sample_size": net.size,
        "in_channels": net.in_channels, "out_channels": net.out_channels, "latent_channels": net.latent_channels,
        "down_block_types": [DOWN[i in net.attention] for i in range(levels)],
        "up_block_types": [UP[i in net.attention] for i in reversed(range(levels))],
        "block_out_channels": list(net.channels), "layers_per_block": net.blocks, "act_fn": "silu",
        "norm_num_groups": net.groups, "scaling_factor": net.scale, "mid_block_add_attention": net.mid_attention,
    }
    if isinstance(net, VQConfig):
        if net.shift:
            raise ModelError(f"diffusers' VQModel does not shift its latents, this codec does by {net.shift}")
        return shared | {"_class_name": "VQModel", "num_vq_embeddings": net.bins, "vq_embed_dim": net.dim,
                         "norm_type": "group", "lookup_from_codebook": False, "force_upcast": False}
    return shared | {"_class_name": "AutoencoderKL", "shift_factor": net.shift or None, "force_upcast": True,
                     "use_quant_conv": net.quant_conv, "use_post_quant_conv": net.quant_conv}


def _diffusers(name: str, names: tuple[str, ...], old: bool) -> Layout:
    return Layout(name, "vae", "net", partial(_diffusers_matches, old=old), _diffusers_config,
                  partial(_diffusers_table, names=names), _foreign_config, constants=_diffusers_constants)


def _original(name: str, prefix: str, drop: tuple[str, ...]) -> Layout:
    return Layout(name, "vae", "net", partial(_original_matches, prefix=prefix),
                  partial(_original_config, prefix=prefix), partial(_original_table, prefix=prefix), drop=drop,
                  constants=_original_constants,
                  unsaid=lambda shapes, foreign: ("net.scale", "net.shift", "net.size"))


# A discriminator and averages may lie beside the codec; of a whole Stable Diffusion file only the codec is taken.
LAYOUTS: tuple[Layout, ...] = (
    _diffusers("diffusers", NEW_ATTENTION, old=False),
    _diffusers("diffusers-2022", OLD_ATTENTION, old=True),
    _original("original", "", ("loss.*", "model_ema.*", "quantize.used")),
    _original("original-sd", PREFIX, ("[!f]*", f"{PREFIX}loss.*", f"{PREFIX}quantize.used")),
)
