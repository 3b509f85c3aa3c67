"""UNet: the public layouts of the diffusion systems built on it, unconditional and class-conditional.

Published files name the network only, so a label table is what tells the two systems apart.
"""

from functools import partial

from torch import Tensor

from nexus.convert.layout import Layout, Shapes
from nexus.convert.layouts import unet_diffusers, unet_openai
from nexus.convert.layouts.labels import numbered
from nexus.errors import ModelError
from nexus.models.diffusion.unet import UNetConfig

SIZE = 32       # pixels or latents, where the file does not tell: what the networks without a side were made for
# The chain of OpenAI's 64 pixel models is cosine, which no file tells; ADM is sampled as below.
CHAIN = {"path": {"kind": "discrete", "beta_schedule": "linear", "spacing": "linspace"}}
ADM = {"clip": True, "sampler": "ddpm", "steps": 250}
OPENAI = partial(unet_openai.table, qkv_op="conv1d_to_linear", by_head=True)
OPENAI_THIRDS = partial(unet_openai.table, qkv_op="conv1d_to_linear", by_head=False)
CONSISTENCY = partial(unet_openai.table, qkv_op="conv_to_linear", by_head=False)
DIFFUSERS_OLD = partial(unet_diffusers.table, names=unet_diffusers.OLD_ATTENTION)


def _openai(system: str, name: str, table, label: bool, conv2d: bool, auto: bool = True) -> Layout:
    """One of OpenAI's; not auto: only the order in q, k, v differs from a layout with the same keys."""
    def matches(shapes: Shapes, foreign: dict | None) -> bool:
        return (foreign is None and unet_openai.matches(shapes)
                and unet_openai.conv2d_qkv(shapes) == conv2d and ("label_emb.weight" in shapes) == label
                and not any(".attn2." in k for k in shapes))

    return Layout(name, system, "net", matches,
                  lambda shapes, foreign: _config(unet_openai.config_of(shapes), SIZE) | CHAIN | (ADM if label else {}),
                  table,
                  constants=standard, auto=auto,
                  unsaid=lambda shapes, foreign: (*unet_openai.unsaid(shapes), "size", "path.beta_schedule"))


def _config(net: dict, size: int) -> dict:
    """Twice the channels that go in are those of a learned variance."""
    variance = {"learned_variance": True} if net["out_channels"] == 2 * net["in_channels"] else {}
    return {"net": net, "size": size} | variance | numbered(net)


def standard(config: dict) -> dict[str, Tensor]:
    """No constants; ModelError for a network that OpenAI's code, with its one value of each, would build otherwise.

    Stable Diffusion's and its descendants' original code is the same.
    """
    net, usual = UNetConfig.parse(config["net"]), UNetConfig()
    for name in ("groups", "eps", "corner_pad", "sin_first", "freq_shift"):
        if getattr(net, name) != getattr(usual, name):
            raise ModelError(f"original UNets have {name} {getattr(usual, name)}, this one has {getattr(net, name)}",
                             hint="write it with --to diffusers")
    return {}


def _diffusers(system: str, name: str, table, label: bool, old: bool) -> Layout:
    def matches(shapes: Shapes, foreign: dict | None) -> bool:
        return unet_diffusers.matches(shapes, old=old) and ("class_embedding.weight" in shapes) == label

    return Layout(name, system, "net", matches,
                  lambda shapes, foreign: _config(unet_diffusers.config_of(shapes, foreign), _side(foreign) or SIZE),
                  table,
                  unet_diffusers.foreign_config,
                  unsaid=lambda shapes, foreign: () if _side(foreign) else ("size",))


def _side(foreign: dict | None) -> int | None:
    """The side of the pictures that config.json gives; None when it gives none, or a width and a height that differ."""
    said = (foreign or {}).get("sample_size")
    sides = set(said) if isinstance(said, list) else {said}
    return sides.pop() if len(sides) == 1 else None


def _of(system: str, label: bool) -> tuple[Layout, ...]:
    return (
        _openai(system, "openai", OPENAI, label, conv2d=False),
        _openai(system, "openai-thirds", OPENAI_THIRDS, label, conv2d=False, auto=False),
        _openai(system, "consistency", CONSISTENCY, label, conv2d=True),
        _diffusers(system, "diffusers", unet_diffusers.table, label, old=False),
        _diffusers(system, "diffusers-2022", DIFFUSERS_OLD, label, old=True),
    )


LAYOUTS: tuple[Layout, ...] = _of("ddpm", False) + _of("conditional", True)
