"""Stable Diffusion: a UNet that reads words by cross-attention, on a codec's latents. Rombach et al. 2022,
arXiv:2112.10752 (SD 1, SD 2); Podell et al. 2023, arXiv:2307.01952 (SDXL)."""

from typing import ClassVar, Literal

from pydantic import Field

from nexus.codecs.kl_image import KLConfig
from nexus.models.diffusion.unet import EMOJI_RECIPE, UNetConfig
from nexus.process.codec import SHARED_CODEC, CodecConfig
from nexus.process.diffusion import DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.text.conditioner import NoCondConfig, TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig

_CLIP_L = {"kind": "pretrained", "recipe": "sd", "encoders": ["openai/clip-vit-large-patch14"]}
_OPENCLIP_H = {"kind": "pretrained", "recipe": "sd2", "encoders": ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K"]}
_BOTH = {"kind": "pretrained", "recipe": "sdxl", "null": "zeros",
         "encoders": ["stabilityai/stable-diffusion-xl-base-1.0"]}


class StableDiffusionConfig(DiffusionConfig):
    """Latent diffusion with text, as published: SD 1's UNet, its chain and codec, CLIP-L's words, guidance 7.5."""

    net: UNetConfig = UNetConfig.preset("sd15")
    path: AnyPath = DiscretePath.preset("stable-diffusion")
    prediction: Literal["eps", "v"] = "eps"
    conditioner: PretrainedCondConfig | TextCondConfig | NoCondConfig = Field(
        PretrainedCondConfig.parse(_CLIP_L), discriminator="kind")
    codec: CodecConfig | None = CodecConfig(net=KLConfig.preset("sd-f8"))
    steps: int = Field(50, ge=1)
    guidance: float = Field(7.5, ge=0)
    pools_words: ClassVar[bool] = False

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny-sd"], "codec": {"net": KLConfig.presets["tiny"]}, "steps": 4,
                 "conditioner": TextCondConfig.presets["tiny"]},
        "emoji": {"net": UNetConfig.presets["emoji-sd"], "codec": SHARED_CODEC, "prediction": "v", "steps": 20,
                  "guidance": 3.0, "sampler": "dpmpp-2m", "path": DiscretePath.presets["stable-diffusion-even"],
                  "conditioner": TextCondConfig.presets["emoji"]},
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
        "emoji": EMOJI_RECIPE,
        "sd15": {"steps": 100_000, "batch_size": 256, "lr": 1e-4, "warmup": 1000, "precision": "auto",
                 "ema": 0.9999, "save_every": 1000, "cache_latents": True},
    }
