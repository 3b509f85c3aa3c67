"""GAN: DCGAN, a modern baseline in the spirit of R3GAN, and games of features. Goodfellow et al. 2014; Radford et al.
2015; Huang et al. 2024; Sauer et al. 2021 (Projected GAN) and 2024 (LADD)."""

from typing import ClassVar

from nexus.codecs.kl_image import KLConfig
from nexus.nn.gan_resnet import EMOJI_NET
from nexus.process.adversarial import (
    EMOJI,
    EMOJI_RECIPE,
    PROJECTED,
    RELATIVISTIC,
    RELATIVISTIC_RECIPE,
    AdversarialConfig,
)

TINY_NET = {"kind": "dcgan", "size": 16, "width": 8, "latents": 16}
_TINY_WIDTHS = {"kind": "resnet", "widths": (16, 16, 8), "blocks": 1, "group": 8}
_MODERN = {"loss": "relativistic", "augment": ("translation",)}


class GANConfig(AdversarialConfig):
    """Pictures from random codes; the defaults are DCGAN's of pytorch/examples."""

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": TINY_NET, "critic": {"kind": "dcgan", "width": 8}},
        "tiny-modern": _MODERN | {"net": _TINY_WIDTHS | {"latents": 16}, "critic": _TINY_WIDTHS, "r1": 1.0, "r2": 1.0},
        "tiny-latent": {"net": {"kind": "resnet", "widths": (16, 8), "blocks": 1, "channels": 4, "latents": 16},
                        "critic": {"kind": "resnet", "widths": (16, 8), "blocks": 1},
                        "codec": {"net": KLConfig.presets["tiny"]}},
        "dcgan": {},
        "emoji": EMOJI,
        "emoji-relativistic": RELATIVISTIC,
        "emoji-pixels": _MODERN | {"net": EMOJI_NET, "critic": EMOJI_NET, "r1": 2.0, "r2": 2.0},
        "emoji-projected": PROJECTED,
        "digits": {"net": {"kind": "dcgan", "size": 32, "channels": 1, "width": 32, "latents": 64},
                   "critic": {"kind": "dcgan", "width": 32, "norm": "none"},
                   "loss": "relativistic", "r1": 1.0, "r2": 1.0},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "tiny-modern": {"steps": 20, "batch_size": 4},
        "tiny-latent": {"steps": 20, "batch_size": 4, "cache_latents": True},
        "dcgan": {"steps": 50_000, "batch_size": 64, "optimizer": "adam", "lr": 2e-4, "betas": (0.5, 0.999),
                  "clip": 0.0},
        "emoji": EMOJI_RECIPE,
        "emoji-projected": EMOJI_RECIPE,
        "emoji-relativistic": RELATIVISTIC_RECIPE,
        "emoji-pixels": RELATIVISTIC_RECIPE | {"final_lr": 0.25, "cache_latents": False, "shift": 0, "variants": 1},
        "digits": {"steps": 5000, "batch_size": 64, "optimizer": "adam", "lr": 2e-4, "betas": (0.5, 0.99),
                   "clip": 0.0, "ema": 0.998},
    }
