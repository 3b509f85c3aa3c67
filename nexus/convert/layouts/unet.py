"""UNet: the public layouts of the diffusion systems built on it, unconditional and class-conditional.

Published files name the network only, so a label table is what tells the two systems apart.
"""

from functools import partial

from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts import unet_diffusers, unet_openai

OPENAI = partial(unet_openai.table, qkv_op="conv1d_to_linear", by_head=True)
OPENAI_THIRDS = partial(unet_openai.table, qkv_op="conv1d_to_linear", by_head=False)
CONSISTENCY = partial(unet_openai.table, qkv_op="conv_to_linear", by_head=False)
DIFFUSERS_OLD = partial(unet_diffusers.table, names=unet_diffusers.OLD_ATTENTION)


def _openai(system: str, name: str, table, label: bool, conv2d: bool | None) -> Layout:
    """One of OpenAI's; conv2d None = never recognised by its keys: only the order in q, k, v differs."""
    def matches(shapes: Shapes, foreign: dict | None) -> bool:
        return (conv2d is not None and foreign is None and unet_openai.matches(shapes)
                and unet_openai.conv2d_qkv(shapes) == conv2d and ("label_emb.weight" in shapes) == label
                and not any(".attn2." in k for k in shapes))

    return Layout(name, system, "net", matches,
                  lambda shapes, foreign: {"net": unet_openai.config_of(shapes)}, table,
                  unsaid=lambda shapes, foreign: unet_openai.unsaid(shapes))


def _diffusers(system: str, name: str, table, label: bool, old: bool) -> Layout:
    def matches(shapes: Shapes, foreign: dict | None) -> bool:
        return unet_diffusers.matches(shapes, old=old) and ("class_embedding.weight" in shapes) == label

    return Layout(name, system, "net", matches,
                  lambda shapes, foreign: {"net": unet_diffusers.config_of(shapes, foreign)}, table,
                  unet_diffusers.foreign_config)


def _of(system: str, label: bool) -> tuple[Layout, ...]:
    return (
        _openai(system, "openai", OPENAI, label, conv2d=False),
        _openai(system, "openai-thirds", OPENAI_THIRDS, label, conv2d=None),
        _openai(system, "consistency", CONSISTENCY, label, conv2d=True),
        _diffusers(system, "diffusers", unet_diffusers.table, label, old=False),
        _diffusers(system, "diffusers-2022", DIFFUSERS_OLD, label, old=True),
    )


LAYOUTS: tuple[Layout, ...] = _of("ddpm", False) + _of("conditional", True)
