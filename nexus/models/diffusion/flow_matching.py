"""Flow matching: a velocity field from noise to pictures along affine paths. Lipman et al. 2022; Tong et al. 2023."""

from typing import ClassVar, Literal

from pydantic import Field

from nexus.models.diffusion.dit import DiTConfig, DiTNetConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.process.codec import SHARED_CODEC
from nexus.process.diffusion import DiffusionConfig
from nexus.process.paths import AffinePath, AnyPath
from nexus.text.conditioner import LabelCondConfig, NoCondConfig


class FlowConfig(DiffusionConfig):
    """A UNet or DiT that outputs velocity on the straight (CondOT) path; guidance acts on the velocity."""

    net: UNetConfig | DiTNetConfig = UNetConfig()
    path: AnyPath = AffinePath(time_scale=1000.0)
    prediction: Literal["flow"] = "flow"
    conditioner: LabelCondConfig | NoCondConfig = Field(LabelCondConfig(), discriminator="kind")
    steps: int = Field(50, ge=1)
    guidance: float = Field(2.0, ge=0)
    sampler: str = "midpoint"

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny"], "size": 16, "steps": 4, "pairing": "exact"},
        "emoji": {"net": DiTNetConfig.presets["emoji-small"],
                  "codec": SHARED_CODEC, "steps": 20, "sampler": "euler", "guidance": 3.0,
                  "conditioner": LabelCondConfig.presets["emoji"]},
        "imagenet-64": {"net": UNetConfig.presets["imagenet-64"] | {"null_class": True, "dropout": 0.1}, "size": 64,
                        "sampler": "dopri5", "path": {"kind": "affine", "time_sampling": "logit-normal",
                                                      "time_mean": -1.2, "time_std": 1.2}},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": DiTConfig.recipes["emoji"] | {"steps": 10_000},     # the same network on the same latents
    }
