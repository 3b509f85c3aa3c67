"""Stable Diffusion's UNet alone, in diffusers' naming and in the original one; whole models: pipelines.py, single.py.

The network's width of words tells which model it is of: SD 1 reads CLIP-L (768), SD 2 OpenCLIP (1024), SDXL both.
"""

from functools import partial

from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts import unet_diffusers, unet_openai
from nexus.convert.layouts.unet import standard
from nexus.models.diffusion.stable_diffusion import StableDiffusionConfig
from nexus.models.diffusion.unet import UNetConfig

TABLE = partial(unet_openai.table, qkv_op="conv1d_to_linear", by_head=False)


def _crosses(shapes: Shapes) -> bool:
    return any(".attn2.to_k." in key for key in shapes)


def inpainting(net: UNetConfig) -> dict | None:
    """What a network that takes a mask and a picture beside its own channels is conditioned on."""
    return {"kind": "inpaint"} if net.in_channels == 2 * net.out_channels + 1 else None


def _config(net: dict) -> dict:
    """The settings of the published model with such words; the codec is the usual one, without weights of its own."""
    parsed = UNetConfig.parse(net)
    preset = "sdxl" if parsed.pooled_dim else "sd21" if parsed.context_dim == 1024 else "sd15"
    usual = StableDiffusionConfig.presets[preset]
    return {key: value for key, value in usual.items() if key != "net"} | {"net": net, "concat": inpainting(parsed)}


LAYOUTS = (
    Layout("diffusers", "sd", "net", lambda shapes, foreign: unet_diffusers.matches(shapes, words=True),
           lambda shapes, foreign: _config(unet_diffusers.config_of(shapes, foreign)),
           unet_diffusers.table, unet_diffusers.foreign_config),
    Layout("original", "sd", "net", lambda shapes, foreign: unet_openai.matches(shapes) and _crosses(shapes),
           lambda shapes, foreign: _config(unet_openai.config_of(shapes)), TABLE,
           constants=standard, unsaid=lambda shapes, foreign: (*unet_openai.unsaid(shapes), "prediction")),
)
