"""The names of all systems: pure data, so that listing them imports nothing heavy."""

import json
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from nexus.errors import UsageError


class Entry(NamedTuple):
    """Where a system's Config lives, what it makes, its embedded default checkpoint, and the command that makes it."""

    config: str          # "module:Class"
    kind: str            # "image" | "audio" | "video"
    summary: str
    default: str         # zoo name, "" when it has none
    command: str = "sample"


CATALOG: dict[str, Entry] = {
    "ddpm": Entry("nexus.models.diffusion.base_diffusion:DDPMConfig", "image",
                  "Denoising diffusion: unconditional pictures (Ho et al. 2020)", "ddpm"),
    "conditional": Entry("nexus.models.diffusion.conditional_diffusion:ConditionalConfig", "image",
                         "Diffusion steered by text, labels or pictures, with guidance", "conditional"),
    "dit": Entry("nexus.models.diffusion.dit:DiTConfig", "image",
                 "Diffusion transformer on a codec's latents (Peebles & Xie 2022)", "dit"),
    "flow": Entry("nexus.models.diffusion.flow_matching:FlowConfig", "image",
                  "Flow matching: an ODE from noise to pictures (Lipman et al. 2022)", "flow"),
    "mmdit": Entry("nexus.models.diffusion.mmdit:MMDiTConfig", "image",
                   "MMDiT: text and picture in one attention, SD3 and FLUX (Esser et al. 2024)", "mmdit"),
    "pixart": Entry("nexus.models.diffusion.pixart_alpha:PixArtConfig", "image",
                    "PixArt-alpha: a diffusion transformer that reads captions (Chen et al. 2023)", "pixart"),
    "consistency": Entry("nexus.models.diffusion.consistency_model:ConsistencyConfig", "image",
                         "Consistency models: pictures in one or two steps (Song et al. 2023)", "consistency"),
    "lcm": Entry("nexus.models.diffusion.lcm:LCMConfig", "image",
                 "Latent consistency: guided latents in one to eight steps (Luo et al. 2023)", "lcm"),
    "sd": Entry("nexus.models.diffusion.stable_diffusion:StableDiffusionConfig", "image",
                "Stable Diffusion: latent diffusion with text, SD 1, SD 2 and SDXL (Rombach et al. 2022)", "sd"),
    "controlnet": Entry("nexus.models.diffusion.controlnet:ControlConfig", "image",
                        "ControlNet: a picture that steers a Stable Diffusion (Zhang et al. 2023)", ""),
    "rectified-flow": Entry("nexus.models.diffusion.rectified_flow:RectifiedFlowConfig", "image",
                            "Rectified flow with reflow and one-step distillation (Liu et al. 2022)", "rectified-flow"),
    "gan": Entry("nexus.models.gan.base_gan:GANConfig", "image",
                 "GAN: DCGAN and a modern relativistic baseline (Goodfellow et al. 2014)", "gan"),
    "cgan": Entry("nexus.models.gan.conditional_gan:ConditionalGANConfig", "image",
                  "Conditional GAN: by class, or by picture as pix2pix (Mirza & Osindero 2014)", "cgan"),
    "cyclegan": Entry("nexus.models.gan.cycle_gan:CycleGANConfig", "image",
                      "CycleGAN: one kind of pictures into another, without pairs (Zhu et al. 2017)", "cyclegan"),
    "wgan": Entry("nexus.models.gan.wgan:WGANConfig", "image",
                  "Wasserstein GAN with gradient penalty or clipping (Arjovsky et al. 2017)", "wgan"),
    "vae": Entry("nexus.models.cv.vae.vae:VAEConfig", "image",
                 "VAE, beta-VAE, KL and VQ picture codecs (Kingma & Welling 2013)", "picture-codec"),
    "musicgen": Entry("nexus.models.audio.musicgen:MusicGenConfig", "audio",
                      "MusicGen: music from a text, a melody or a beginning (Copet et al. 2023)", "music", "music"),
    "encodec": Entry("nexus.models.audio.encodec:EncodecSystemConfig", "audio",
                     "EnCodec: a codec that turns sound into a few ids a frame (Defossez et al. 2022)", "music-codec"),
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


def name_of(config: object) -> str:
    """The system that a Config is of; UsageError for one that is not in the catalog."""
    wanted = f"{type(config).__module__}:{type(config).__qualname__}"
    for name, known in CATALOG.items():
        if known.config == wanted:
            return name
    raise UsageError(f"{wanted} is no system of the catalog", hint="systems: " + ", ".join(CATALOG))


def listing() -> list[dict]:
    """Every system with its summary and embedded checkpoint, then the other embedded checkpoints; without torch."""
    zoo = {path.parent.name: path for path in sorted((Path(__file__).parent / "zoo").glob("*/config.json"))}
    rows = [{"system": name, "kind": e.kind, "summary": e.summary, "default": e.default if e.default in zoo else None}
            for name, e in CATALOG.items()]
    named = {e.default for e in CATALOG.values()}
    others = [(name, _system_of(path)) for name, path in zoo.items() if name not in named]
    return rows + [{"system": system, "kind": CATALOG[system].kind if system in CATALOG else "?",
                    "summary": "another embedded checkpoint", "default": name} for name, system in others]


def _system_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_text("utf-8"))["system"])
    except (OSError, ValueError, KeyError, TypeError):
        return "?"
