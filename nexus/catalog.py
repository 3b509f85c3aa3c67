"""The names of all systems: pure data, so that listing them imports nothing heavy."""

import json
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from nexus.errors import UsageError


class Entry(NamedTuple):
    """Where a system's Config lives, what it makes, and its embedded default checkpoint."""

    config: str          # "module:Class"
    kind: str            # "image" | "audio" | "video"
    summary: str
    default: str         # zoo name, "" when it has none


CATALOG: dict[str, Entry] = {
    "ddpm": Entry("nexus.models.diffusion.base_diffusion:DDPMConfig", "image",
                  "Denoising diffusion: unconditional pictures (Ho et al. 2020)", "ddpm"),
    "conditional": Entry("nexus.models.diffusion.conditional_diffusion:ConditionalConfig", "image",
                         "Diffusion steered by text, labels or pictures, with guidance", "conditional"),
    "dit": Entry("nexus.models.diffusion.dit:DiTConfig", "image",
                 "Diffusion transformer on a codec's latents (Peebles & Xie 2022)", "dit"),
    "flow": Entry("nexus.models.diffusion.flow_matching:FlowConfig", "image",
                  "Flow matching: an ODE from noise to pictures (Lipman et al. 2022)", "flow"),
    "vae": Entry("nexus.models.cv.vae.vae:VAEConfig", "image",
                 "VAE, beta-VAE and the KL picture codec (Kingma & Welling 2013)", "picture-codec"),
}


def entry(name: str) -> Entry:
    """The catalog's entry, or UsageError naming the nearest system."""
    if name not in CATALOG:
        from difflib import get_close_matches
        near = get_close_matches(name, CATALOG, 1, cutoff=0.4)
        known = ", ".join(CATALOG)
        raise UsageError(f"unknown system '{name}'",
                         hint=f"did you mean '{near[0]}'? Systems: {known}" if near else f"systems: {known}")
    return CATALOG[name]


def config_class(name: str) -> type:
    """The Config class of a system; imports its module."""
    module, _, cls = entry(name).config.partition(":")
    return getattr(import_module(module), cls)


def listing() -> list[dict]:
    """Every system with its summary and embedded checkpoint, then the other embedded checkpoints; without torch."""
    zoo = {path.parent.name: path for path in sorted((Path(__file__).parent / "zoo").glob("*/config.json"))}
    rows = [{"system": name, "kind": e.kind, "summary": e.summary, "default": e.default if e.default in zoo else None}
            for name, e in CATALOG.items()]
    named = {e.default for e in CATALOG.values()}
    return rows + [{"system": _system_of(path), "kind": "image", "summary": "another embedded checkpoint",
                    "default": name} for name, path in zoo.items() if name not in named]


def _system_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_text("utf-8"))["system"])
    except (OSError, ValueError, KeyError, TypeError):
        return "?"
