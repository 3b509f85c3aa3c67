"""DDPM: unconditional pictures from a chain of small denoisings. Ho et al. 2020; Nichol & Dhariwal 2021 (iDDPM)."""

from typing import ClassVar

from pydantic import Field

from nexus.models.diffusion.unet import UNetConfig
from nexus.process.diffusion import DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath

_IDDPM = {"learned_variance": True, "path": {"kind": "discrete", "beta_schedule": "cosine", "spacing": "linspace"}}


class DDPMConfig(DiffusionConfig):
    """The UNet on pixels, eps over the linear chain of 1000 steps, ancestral sampling with clipped x0."""

    net: UNetConfig = UNetConfig()
    path: AnyPath = DiscretePath(spacing="linspace")
    clip: bool = True
    steps: int = Field(1000, ge=1)
    sampler: str = "ddpm"

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny"], "size": 16, "steps": 4},
        "mnist": {"net": {"in_channels": 1, "out_channels": 1, "channels": 32, "mult": (1, 2, 2), "blocks": 1,
                          "attention": (2,), "heads": 2, "groups": 16}, "size": 28, "steps": 50, "sampler": "ddim"},
        "iddpm-tiny": _IDDPM | {"net": UNetConfig.presets["tiny"] | {"out_channels": 6}, "size": 16, "steps": 4},
        "cifar10": {"net": UNetConfig.presets["cifar10"], "size": 32, "variance": "large"},
        "ddpm-256": {"net": UNetConfig.presets["ddpm-256"], "size": 256},
    }
    default_preset: ClassVar[str] = "mnist"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "mnist": {"steps": 3000, "batch_size": 32, "lr": 1e-3, "warmup": 100, "schedule": "linear", "final_lr": 0.05,
                  "precision": "auto", "ema": 0.995, "save_every": 500},
        "cifar10": {"steps": 800_000, "batch_size": 128, "lr": 2e-4, "warmup": 5000, "ema": 0.9999, "flip": 0.5,
                    "save_every": 5000},
    }
