"""ControlNet: diffusers' ControlNetModel folder, and the authors' single file (lllyasviel/ControlNet)."""

from functools import partial

from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts import unet_diffusers, unet_openai
from nexus.convert.layouts.unet_rows import layer
from nexus.errors import ModelError
from nexus.models.diffusion.controlnet import ControlNetConfig

PREFIX = "control_model."
EMBED = "controlnet_cond_embedding."
FIXED = {"controlnet_conditioning_channel_order": "rgb", "encoder_hid_dim": None, "global_pool_conditions": False}


def _unet(config: dict) -> dict:
    """The configuration with the UNet that is controlled as its network."""
    return {"net": ControlNetConfig.parse(config["net"]).unet().to_json()}


def _diffusers_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {f"{EMBED}conv_in.weight", "controlnet_down_blocks.0.weight", "controlnet_mid_block.weight",
            "time_embedding.linear_1.weight"} <= shapes.keys()


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    if foreign is None:
        raise ModelError("a diffusers ControlNet needs the config.json beside its weights",
                         hint="convert the folder, not the file in it")
    for name, only in FIXED.items():
        if foreign.get(name, only) != only:
            raise ModelError(f"config.json: {name} is {foreign[name]!r}, this ControlNet has {only!r}")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(foreign["down_block_types"])]
    whole = {k: v for k, v in foreign.items() if k not in FIXED}
    net = unet_diffusers.config_of(shapes, whole | {"up_block_types": mirrored, "out_channels": foreign["in_channels"]})
    widths = foreign.get("conditioning_embedding_out_channels") or (16, 32, 96, 256)
    return {"net": net | {"hint_channels": foreign.get("conditioning_channels", 3), "hint_widths": list(widths)}}


def _diffusers_table(config: dict) -> list[Row]:
    return [*layer("hint_in", f"{EMBED}conv_in"), *layer("hint_blocks.*", f"{EMBED}blocks.*"),
            *layer("hint_out", f"{EMBED}conv_out"), *layer("zero.*", "controlnet_down_blocks.*"),
            *layer("zero_mid", "controlnet_mid_block"), *unet_diffusers.table(_unet(config))]


def _diffusers_foreign(config: dict) -> dict:
    net = ControlNetConfig.parse(config["net"])
    said = unet_diffusers.foreign_config(_unet(config))
    kept = {k: v for k, v in said.items() if k not in ("up_block_types", "out_channels", "sample_size", "dropout",
                                                       "center_input_sample", "time_cond_proj_dim")}
    return kept | {"_class_name": "ControlNetModel", "conditioning_channels": net.hint_channels,
                   "conditioning_embedding_out_channels": list(net.hint_widths), **FIXED}


def _original_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {f"{PREFIX}input_hint_block.0.weight", f"{PREFIX}zero_convs.0.0.weight",
            f"{PREFIX}middle_block_out.0.weight"} <= shapes.keys()


def _original_config(shapes: Shapes, foreign: dict | None) -> dict:
    inner = {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}
    ops = sorted(int(k.split(".")[1]) for k in inner if k.startswith("input_blocks.") and k.endswith(".0.op.weight"))
    level = ops[0] if ops else sum(k.startswith("zero_convs.") and k.endswith("weight") for k in inner)
    # The way up that a ControlNet does not have tells how many blocks and levels there are.
    up = {f"output_blocks.{level * (len(ops) + 1) - 1}.0": (), f"output_blocks.{level - 1}.1.conv.weight": ()}
    net = unet_openai.config_of(inner | up | {"out.2.weight": inner["input_blocks.0.0.weight"][1:2]})
    last = max(int(k.split(".")[1]) for k in inner if k.startswith("input_hint_block."))
    widths = [inner[f"input_hint_block.{i}.weight"][0] for i in range(0, last, 4)]
    return {"net": net | {"hint_channels": inner["input_hint_block.0.weight"][1], "hint_widths": widths}}


def _original_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    return unet_openai.unsaid(shapes)


def _original_table(config: dict) -> list[Row]:
    count = 2 * (len(config["net"]["hint_widths"]) - 1)
    own = [*layer("hint_in", "input_hint_block.0"), *layer("hint_out", f"input_hint_block.{2 * count + 2}"),
           *(row for i in range(count) for row in layer(f"hint_blocks.{i}", f"input_hint_block.{2 * i + 2}")),
           *layer("zero.*", "zero_convs.*.0"), *layer("zero_mid", "middle_block_out.0")]
    rows = own + partial(unet_openai.table, qkv_op="conv1d_to_linear", by_head=False)(_unet(config))
    return [row._replace(foreign=tuple(PREFIX + one for one in row.foreign)) for row in rows]


LAYOUTS = (
    Layout("diffusers", "controlnet", "net", _diffusers_matches, _diffusers_config, _diffusers_table,
           _diffusers_foreign),
    Layout("original", "controlnet", "net", _original_matches, _original_config, _original_table,
           unsaid=_original_unsaid),
)
