"""Conditional GAN: by class (Mirza & Osindero 2014; Odena 2017; Miyato & Koyama 2018) or by picture (pix2pix).

B pictures, I and O channels of what pix2pix sees and makes.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import UsageError
from nexus.losses.adversarial import LOSSES
from nexus.losses.diversity import diversity
from nexus.media import Media
from nexus.nn.dcgan import DCCriticConfig, DCGeneratorConfig
from nexus.nn.denoiser_critic import DenoiserCriticConfig
from nexus.nn.gan_blocks import frozen
from nexus.nn.gan_resnet import ResCriticConfig, ResGeneratorConfig
from nexus.nn.patch_critic import PatchCritic
from nexus.nn.projected import ProjectedCriticConfig
from nexus.nn.translators import UNetConfig
from nexus.phase import Phase
from nexus.process.adversarial import EMOJI, EMOJI_RECIPE, PROJECTED, Adversarial, AdversarialConfig
from nexus.process.translation import TRANSLATES, check_translation, read_source, translated
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise
from nexus.text.conditioner import LabelCondConfig, NoCondConfig


class PairCriticConfig(Config):
    """A PatchGAN that sees the given picture beside the real or the made one; the defaults see 70x70 pixels."""

    kind: Literal["patch"] = "patch"
    width: int = Field(64, ge=1)
    layers: int = Field(3, ge=1)
    norm: Literal["instance", "batch", "none"] = "batch"

    def build(self, net: UNetConfig) -> PatchCritic:
        """The critic of what a network of config `net` makes."""
        return PatchCritic(net.in_channels + net.out_channels, self.width, self.layers, self.norm)


_DIGITS = {"kind": "dcgan", "size": 32, "channels": 1, "width": 32, "latents": 64}
_CRITIC = {"kind": "dcgan", "width": 32}
_TINY = {"kind": "dcgan", "size": 16, "width": 8, "latents": 8, "label_dim": 8}
_ADAM = {"optimizer": "adam", "clip": 0.0}


class ConditionalGANConfig(AdversarialConfig):
    """A GAN told a class, or with a network of kind "unet" pix2pix, told a picture.

    l1_weight: of the mean distance to the right picture, of pix2pix alone. size: side of the pictures that pix2pix is
    trained on. A model of pix2pix is used as it was published: dropout on, norms by the picture's own statistics.
    """

    net: Annotated[DCGeneratorConfig | ResGeneratorConfig | UNetConfig, Field(discriminator="kind")] = \
        DCGeneratorConfig()
    critic: Annotated[DCCriticConfig | ResCriticConfig | ProjectedCriticConfig | DenoiserCriticConfig |
                      PairCriticConfig, Field(discriminator="kind")] = \
        DCCriticConfig(label="map")
    conditioner: LabelCondConfig | NoCondConfig = Field(LabelCondConfig(), discriminator="kind")
    l1_weight: float = Field(100.0, ge=0)
    size: int = Field(256, ge=8)

    @model_validator(mode="after")
    def _of_one_kind(self) -> Self:
        if self.is_translator != isinstance(self.critic, PairCriticConfig):
            raise ValueError("critic.kind: 'patch' goes with net.kind 'unet', and with no other")
        if self.is_translator and self.conditioner.kind != "none":
            raise ValueError("conditioner.kind: pix2pix is told a picture, so 'none'")
        if self.is_translator and (self.r1 or self.r2 or self.gp or self.drift or self.clip or self.augment
                                   or self.codec):
            raise ValueError("r1, r2, gp, drift, clip, augment and codec are not for pix2pix")
        return self

    @property
    def is_translator(self) -> bool:
        """Whether this is pix2pix."""
        return isinstance(self.net, UNetConfig)

    @property
    def domains(self) -> str | None:
        """How the two picture sets that it learns from belong together; None: it learns from one."""
        return "aligned" if self.is_translator else None

    @property
    def image_size(self) -> int:
        """Side of the pictures it is trained on, in pixels."""
        return self.size if self.is_translator else super().image_size

    @property
    def image_channels(self) -> int:
        """Colour channels of the pictures."""
        return self.net.out_channels if self.is_translator else super().image_channels

    def adapt(self, facts: Any) -> Self:
        """A copy with the class and style names of a data set, and tables for them."""
        return self if self.is_translator else super().adapt(facts)

    def build(self) -> "Adversarial | Pix2Pix":
        """The system with its initial weights."""
        return Pix2Pix(self) if self.is_translator else Adversarial(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": _TINY, "critic": _CRITIC | {"width": 8, "label": "map"}},
        "tiny-projection": {"net": {"kind": "resnet", "widths": (16, 16, 8), "blocks": 1, "group": 8, "norm": "batch",
                                    "latents": 8, "label_dim": 8},
                            "critic": {"kind": "resnet", "widths": (16, 16, 8), "blocks": 1, "group": 8,
                                       "spectral": True, "label": "projection"}, "loss": "hinge"},
        "tiny-auxiliary": {"net": _TINY, "critic": _CRITIC | {"width": 8, "label": "auxiliary"}},
        "tiny-pix2pix": {"net": {"kind": "unet", "width": 4, "depth": 4}, "size": 16, "conditioner": {"kind": "none"},
                         "critic": {"kind": "patch", "width": 4, "layers": 1}},
        "digits": {"net": _DIGITS, "loss": "relativistic", "r1": 1.0, "r2": 1.0,    # hinge and spectral norm collapsed
                   "critic": _CRITIC | {"norm": "none", "label": "projection"}},
        "digits-map": {"net": _DIGITS, "critic": _CRITIC | {"label": "map"}},
        "digits-auxiliary": {"net": _DIGITS, "critic": _CRITIC | {"label": "auxiliary"}},
        "emoji": EMOJI | {"critic": EMOJI["critic"] | {"label": "projection"}},
        "emoji-projected": PROJECTED | {"critic": PROJECTED["critic"] | {"label": "projection"}},
        "pix2pix": {"net": {"kind": "unet"}, "critic": {"kind": "patch"}, "conditioner": {"kind": "none"}},
        "pix2pix-emoji": {"net": {"kind": "unet", "width": 20, "depth": 6}, "size": 64, "conditioner": {"kind": "none"},
                          "critic": {"kind": "patch", "width": 32, "layers": 2}},
    }
    default_preset: ClassVar[str] = "digits"
    recipes: ClassVar[dict[str, dict]] = {
        **{name: {"steps": 20, "batch_size": 4} for name in presets if name.startswith("tiny")},
        **{name: _ADAM | {"steps": 12_000, "batch_size": 64, "lr": 2e-4, "betas": (0.5, 0.99), "ema": 0.998,
                          "save_every": 250} for name in ("digits", "digits-map", "digits-auxiliary")},
        "emoji": EMOJI_RECIPE,
        "emoji-projected": EMOJI_RECIPE,
        "pix2pix": _ADAM | {"steps": 80_000, "batch_size": 1, "lr": 2e-4, "betas": (0.5, 0.999), "flip": 0.5,
                            "load": 286, "schedule": "constant-linear", "ema": 0.0},
        "pix2pix-emoji": _ADAM | {"steps": 5000, "batch_size": 8, "lr": 2e-4, "betas": (0.5, 0.999), "flip": 0.5,
                                  "schedule": "constant-linear", "ema": 0.99, "save_every": 250},
    }


class Pix2Pix(nn.Module):
    """A U-Net that makes a picture of another, against a critic of pairs. Isola et al. 2017."""

    training_only = ("critic",)
    directions = ("ab",)
    takes = TRANSLATES

    def __init__(self, config: ConditionalGANConfig):
        super().__init__()
        self.config = config
        self.external: dict[str, str] = {}
        self.net = config.net.build()
        self.critic = config.critic.build(config.net)

    def phases(self) -> tuple[Phase, ...]:
        """The critic, then the network. UsageError for one that changes the number of channels."""
        c = self.config
        if c.net.in_channels != c.net.out_channels:
            raise UsageError(f"pix2pix from {c.net.in_channels} to {c.net.out_channels} channels is not trained here",
                             hint="two sets of pictures of the same kind of colour")
        return (Phase("critic", self.critic, self.critic_loss, c.critic_steps, None, c.critic_rate),
                Phase("generator", self.net, self.generator_loss))

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How badly right pairs and made ones are told apart; halved, as published."""
        given, right = batch["image"], batch["other"]
        with torch.no_grad():
            made = self.net(given)
        real, fake = (self.critic(torch.cat([given, x.to(given)], 1)).float() for x in (right, made))
        loss = 0.5 * LOSSES[self.config.loss].critic(real, fake)
        return {"loss": loss, "real": real.mean().detach(), "fake": fake.mean().detach()}

    def generator_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How well the critic is deceived, and l1_weight times the mean distance to the right picture."""
        c, given, right = self.config, batch["image"], batch["other"]
        made = self.net(given).float()
        with frozen(self.critic) as critic:
            scores = critic(torch.cat([given, made], 1)).float()
            real = critic(torch.cat([given, right], 1)).float() if c.loss == "relativistic" else scores.detach()
        deceived, l1 = LOSSES[c.loss].generator(real, scores), (made - right).abs().mean()
        return {"loss": deceived + c.l1_weight * l1, "deceive": deceived.detach(), "l1": l1.detach(),
                "diversity": diversity(made, right)}

    def translate(self, x: Tensor, direction: str = "ab", seeds: list[int] | None = None) -> Tensor:
        """x [B, I, H, W] in [-1, 1] of any size -> [B, O, H, W]; the dropout of item i is drawn by seeds[i]."""
        noise = ItemNoise(list(range(len(x))) if seeds is None else seeds, "dropout")
        return translated(lambda part: self.net(part, noise, True), x, self.config.net.multiple).float()

    def check(self, request: SampleRequest) -> None:
        """UsageError without a picture, for a way that the model lacks, and for what steers other models."""
        check_translation(request, self.directions)

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """One picture a seed, made of the request's picture. Raises InputError or UsageError."""
        self.check(request)
        x = read_source(request, self.config.net.in_channels).to(next(self.net.parameters()))
        shown = torch.cat([self.translate(x, seeds=[seed]) for seed in seeds]).clamp(-1, 1)
        if watch is not None:
            watch(0, 1, shown, lambda x: x)
        return Media("image", shown)
