"""WGAN: the critic estimates the Wasserstein distance. Arjovsky et al. 2017; Gulrajani et al. 2017 (gradient penalty).

The estimate is logged as critic.distance.
"""

from typing import ClassVar, Literal

from pydantic import Field

from nexus.nn.gan_resnet import LATENT_CRITIC, LATENT_NORMED, ResCriticConfig, ResGeneratorConfig
from nexus.process.adversarial import AdversarialConfig, AnyCritic, AnyGenerator
from nexus.process.codec import SHARED_CODEC

_CLIP = {"gp": 0.0, "clip": 0.01}


class WGANConfig(AdversarialConfig):
    """A Wasserstein critic kept smooth by a gradient penalty (the default) or by clipping its weights."""

    net: AnyGenerator = ResGeneratorConfig(norm="batch", latents=128)
    critic: AnyCritic = ResCriticConfig()
    loss: Literal["wasserstein"] = "wasserstein"
    critic_steps: int = Field(5, ge=1)
    gp: float = Field(10.0, ge=0)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": {"kind": "resnet", "widths": (16, 16, 8), "blocks": 1, "group": 8, "norm": "batch",
                         "latents": 16},
                 "critic": {"kind": "resnet", "widths": (16, 16, 8), "blocks": 1, "group": 8, "norm": "layer"},
                 "critic_steps": 2, "drift": 1e-3},
        "tiny-clip": _CLIP | {"net": {"kind": "dcgan", "size": 16, "width": 8, "latents": 16},
                              "critic": {"kind": "dcgan", "width": 8}, "critic_steps": 2},
        "gp": {},
        "clip": _CLIP | {"net": {"kind": "dcgan"}, "critic": {"kind": "dcgan"}},
        "dcgan-gp": {"net": {"kind": "dcgan"}, "critic": {"kind": "dcgan", "norm": "layer"}},
        "emoji": {"net": LATENT_NORMED, "critic": {"kind": "denoiser"}, "codec": SHARED_CODEC,
                  "drift": 1e-3, "critic_steps": 3},
        "emoji-latents": {"net": LATENT_NORMED, "critic": LATENT_CRITIC, "codec": SHARED_CODEC, "drift": 1e-3,
                        "critic_steps": 3},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "tiny-clip": {"steps": 20, "batch_size": 4, "optimizer": "rmsprop", "lr": 5e-5},
        "gp": {"steps": 100_000, "batch_size": 64, "optimizer": "adam", "lr": 1e-4, "betas": (0.0, 0.9), "clip": 0.0},
        "clip": {"steps": 100_000, "batch_size": 64, "optimizer": "rmsprop", "lr": 5e-5, "clip": 0.0},
    }
    recipes |= {
        "dcgan-gp": recipes["gp"],
        "emoji": recipes["gp"] | {"steps": 10_000, "batch_size": 32, "lr": 2e-4, "ema": 0.998, "save_every": 250,
                                  "cache_latents": True},
    }
    recipes["emoji-latents"] = recipes["emoji"] | {"schedule": "linear", "final_lr": 0.05, "flip": 0.5, "shift": 2,
                                                 "variants": 4}
