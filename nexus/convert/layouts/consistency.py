"""Consistency models: OpenAI's .pt files (students and their EDM teachers) and diffusers' ConsistencyModelPipeline.

Only consistency models' files hold q, k, v as 2-D convolutions; a diffusers UNet is told by its pipeline. No file says
the picture's size or the noise levels: those of the published models are taken.
"""

from collections.abc import Callable
from typing import Any

from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts import unet_diffusers, unet_openai
from nexus.convert.layouts.labels import numbered
from nexus.convert.layouts.unet import CONSISTENCY
from nexus.errors import ModelError


def _openai_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return foreign is None and unet_openai.matches(shapes) and unet_openai.conv2d_qkv(shapes)


def _config(net: dict, size: int) -> dict:
    return {"net": net, "size": size, "conditioner": {"kind": "none"}} | numbered(net)


def _openai_config(shapes: Shapes, foreign: dict | None) -> dict:
    return _config(unet_openai.config_of(shapes), 64 if "label_emb.weight" in shapes else 256)


def _diffusers_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return (foreign or {}).get("_pipeline") == "ConsistencyModelPipeline" and unet_diffusers.matches(shapes)


def _diffusers_config(shapes: Shapes, foreign: dict | None) -> dict:
    net = unet_diffusers.config_of(shapes, foreign)
    return _config(net, (foreign or {}).get("sample_size") or (64 if "num_classes" in net else 256))


def _unet(of: Callable[[dict], Any]) -> Callable[[dict], Any]:
    """What is `of` a UNet; ModelError for a model that was distilled from one on another path, or is a transformer."""
    def checked(config: dict) -> Any:
        if "channels" not in config["net"] or config.get("path", {}).get("native"):
            raise ModelError("public consistency models are UNets that are told their own noise levels, this one's "
                             "network speaks of another path", hint="it stays a model of nexus")
        return of(config)
    return checked


LAYOUTS = (
    Layout("openai", "consistency", "net", _openai_matches, _openai_config, _unet(CONSISTENCY),
           unsaid=lambda shapes, foreign: ("size", *unet_openai.unsaid(shapes))),
    Layout("diffusers", "consistency", "net", _diffusers_matches, _diffusers_config, _unet(unet_diffusers.table),
           _unet(unet_diffusers.foreign_config)),
)
