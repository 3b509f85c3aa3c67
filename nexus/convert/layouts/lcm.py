"""Latent consistency models: UNets of text that are told the scale of guidance, in diffusers' and OpenAI's naming."""

from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts import unet_diffusers, unet_openai
from nexus.convert.layouts.unet import OPENAI


def _diffusers_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return "time_embedding.cond_proj.weight" in shapes and unet_diffusers.matches(shapes, words=True)


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    return {"net": unet_diffusers.config_of(shapes, foreign), "size": (foreign or {}).get("sample_size") or 96}


def _openai_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return "time_embed.cond_proj.weight" in shapes and unet_openai.matches(shapes)


def _openai_config(shapes: Shapes, foreign: dict | None) -> dict:
    return {"net": unet_openai.config_of(shapes), "size": 96}


LAYOUTS = (
    Layout("diffusers", "lcm", "net", _diffusers_matches, _diffusers_config, unet_diffusers.table,
           unet_diffusers.foreign_config),
    Layout("openai", "lcm", "net", _openai_matches, _openai_config, OPENAI,
           unsaid=lambda shapes, foreign: ("size", *unet_openai.unsaid(shapes))),
)
