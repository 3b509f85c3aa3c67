"""Conditional diffusion: a UNet steered by text or labels. Dhariwal & Nichol 2021; Ho & Salimans 2022."""

from typing import ClassVar

from pydantic import Field

from nexus.models.diffusion.unet import UNetConfig
from nexus.process.diffusion import SHARED_CODEC, DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.text.conditioner import LabelCondConfig, TextCondConfig

_LATENT_UNET = {"in_channels": 4, "out_channels": 4, "channels": 72, "mult": (1, 2), "blocks": 1, "attention": (1,),
                "head_dim": 36, "groups": 12, "context_dim": 128, "pooled_dim": 128}


class ConditionalConfig(DiffusionConfig):
    """A UNet on pixels or on a codec's latents; classifier-free guidance over text, or over labels as in ADM."""

    net: UNetConfig = UNetConfig()
    path: AnyPath = DiscretePath(spacing="linspace")
    conditioner: TextCondConfig | LabelCondConfig = Field(LabelCondConfig(), discriminator="kind")
    steps: int = Field(50, ge=1)
    guidance: float = Field(3.0, ge=0)

    presets: ClassVar[dict[str, dict]] = {
        "tiny-text": {"net": UNetConfig.presets["tiny"] | {"attention": (1,), "heads": 2, "context_dim": 16,
                                                      "pooled_dim": 16},
                 "size": 16, "steps": 4,
                 "conditioner": {"kind": "text", "encoder": {"dim": 16, "depth": 1, "buckets": 64}}},
        "tiny": {"net": UNetConfig.presets["tiny"], "size": 16, "steps": 4},
        "emoji": {"net": _LATENT_UNET, "codec": SHARED_CODEC, "prediction": "v", "steps": 20,
                  "sampler": "dpmpp-2m",
                  "conditioner": {"kind": "text", "default_style": "noto", "encoder": {"buckets": 1024}}},
        "imagenet-64": {"net": UNetConfig.presets["imagenet-64"] | {"out_channels": 6}, "size": 64, "clip": True,
                        "learned_variance": True, "path": {"kind": "discrete", "beta_schedule": "cosine"},
                        "steps": 250, "sampler": "ddpm"},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": {"steps": 20_000, "batch_size": 32, "lr": 1e-3, "warmup": 200, "schedule": "linear",
                  "final_lr": 0.05, "precision": "bfloat16", "ema": 0.998, "save_every": 500, "cache_latents": True,
                  "betas": (0.9, 0.99)},
    }
