"""Stable Diffusion: a UNet that reads words by cross-attention, on a codec's latents. Rombach et al. 2022,
arXiv:2112.10752 (SD 1, SD 2); Podell et al. 2023, arXiv:2307.01952 (SDXL)."""

from typing import ClassVar, Literal

from pydantic import Field

from nexus.codecs.kl_image import KLConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.process.diffusion import SHARED_CODEC, SHARED_LATENTS, CodecConfig, DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.text.conditioner import NoCondConfig, TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig

# The published models visit every (1000 // steps)-th index, counted from 1.
_PATH = {"kind": "discrete", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
         "spacing": "leading", "offset": 1, "ends_at_first": True}
_CLIP_L = {"kind": "pretrained", "recipe": "sd", "encoders": ["openai/clip-vit-large-patch14"]}
_OPENCLIP_H = {"kind": "pretrained", "recipe": "sd2", "encoders": ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]}
_BOTH = {"kind": "pretrained", "recipe": "sdxl", "null": "zeros",
         "encoders": ["stabilityai/stable-diffusion-xl-base-1.0"]}
_SMALL_UNET = {"in_channels": SHARED_LATENTS, "out_channels": SHARED_LATENTS, "channels": 56, "mult": (1, 2),
               "blocks": 1, "attention": (0, 1), "head_dim": 28, "groups": 14, "context_dim": 128}


class StableDiffusionConfig(DiffusionConfig):
    """Latent diffusion with text, as published: SD 1's UNet, its chain and codec, CLIP-L's words, guidance 7.5."""

    net: UNetConfig = UNetConfig.preset("sd15")
    path: AnyPath = DiscretePath.parse(_PATH)
    prediction: Literal["eps", "v"] = "eps"
    conditioner: PretrainedCondConfig | TextCondConfig | NoCondConfig = Field(
        PretrainedCondConfig.parse(_CLIP_L), discriminator="kind")
    codec: CodecConfig | None = CodecConfig(net=KLConfig.preset("sd-f8"))
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=0)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny"] | {"in_channels": 4, "out_channels": 4, "attention": (0, 1),
                                                      "heads": 2, "context_dim": 16},
                 "codec": {"net": KLConfig.presets["tiny"]}, "steps": 4,
                 "conditioner": {"kind": "text", "encoder": {"dim": 16, "depth": 1, "buckets": 64}}},
        "emoji": {"net": _SMALL_UNET, "codec": SHARED_CODEC, "prediction": "v", "steps": 20, "guidance": 3.0,
                  "sampler": "dpmpp-2m", "path": _PATH | {"spacing": "linspace", "offset": 0},
                  "conditioner": {"kind": "text", "default_style": "noto", "encoder": {"buckets": 1024}}},
        "sd15": {},
        "sd15-inpaint": {"net": UNetConfig.presets["sd15-inpaint"], "concat": {"kind": "inpaint"}},
        "sd21": {"net": UNetConfig.presets["sd21"], "prediction": "v", "conditioner": _OPENCLIP_H,
                 "codec": {"net": KLConfig.presets["sd-f8"] | {"size": 768}}},
        "sdxl": {"net": UNetConfig.presets["sdxl"], "conditioner": _BOTH, "guidance": 5.0,
                 "codec": {"net": KLConfig.presets["sdxl-f8"]}},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": {"steps": 20_000, "batch_size": 32, "lr": 1e-3, "warmup": 200, "schedule": "linear",
                  "final_lr": 0.05, "precision": "bfloat16", "ema": 0.998, "save_every": 500, "cache_latents": True,
                  "betas": (0.9, 0.99)},
        "sd15": {"steps": 100_000, "batch_size": 256, "lr": 1e-4, "warmup": 1000, "precision": "bfloat16",
                 "ema": 0.9999, "save_every": 1000, "cache_latents": True},
    }

    def net_facts(self) -> dict:
        """The width of a word, where the words are the small encoder's; no vector stands for the whole caption."""
        c = self.conditioner
        return {"context_dim": c.encoder.dim} if isinstance(c, TextCondConfig) else {}
