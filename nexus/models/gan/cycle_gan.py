"""CycleGAN: two networks that turn pictures of one kind into another and back, learnt without pairs. Zhu et al. 2017.

B pictures; a and b are the two kinds, ab and ba the directions.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError, UsageError
from nexus.losses.adversarial import LOSSES
from nexus.losses.diversity import diversity
from nexus.media import Media
from nexus.nn.diffaugment import diff_augment
from nexus.nn.gan_blocks import frozen, gaussian_weights
from nexus.nn.image_pool import ImagePool
from nexus.nn.patch_critic import PatchCritic
from nexus.nn.translators import ResnetConfig, UNetConfig
from nexus.phase import Phase
from nexus.process.translation import TRANSLATES, check_direction, check_translation, read_source, translated
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise

LSGAN = LOSSES["lsgan"]
WAYS = ("ab", "ba")


class PatchNetConfig(Config):
    """A PatchGAN critic alone, as a published file holds it; the defaults see 70x70 pixels.

    in_channels: 0 = those of the pictures that the generator makes.
    """

    kind: Literal["patch"] = "patch"
    in_channels: int = Field(0, ge=0)
    width: int = Field(64, ge=1)
    layers: int = Field(3, ge=1)
    norm: Literal["instance", "batch", "none"] = "instance"

    def build(self, channels: int = 3) -> PatchCritic:
        """The critic with its initial weights. channels: of the pictures, where in_channels does not say it."""
        critic = PatchCritic(self.in_channels or channels, self.width, self.layers, self.norm)
        gaussian_weights(critic)
        return critic


_EMOJI = {"kind": "resnet", "width": 24, "blocks": 6}


class CycleGANConfig(Config):
    """Two networks of config `net`, a critic of each kind, and what the generators pay for.

    cycle: weight of |there and back - x|. identity: of |b - ab(b)|, as a share of `cycle`. pool: earlier pictures that
    a critic is also shown. hue: chance that a picture's colours are turned before it is translated, so that coming back
    works for colours that few pictures have; the critics' real pictures keep theirs. two_way False: only the way ab, as
    published files hold it; such a model is not trained. size: side of the pictures in training. A net of kind "patch"
    is a published critic, which makes nothing.
    """

    net: Annotated[ResnetConfig | UNetConfig | PatchNetConfig, Field(discriminator="kind")] = ResnetConfig()
    critic: PatchNetConfig = PatchNetConfig()
    size: int = Field(256, ge=16)
    cycle: float = Field(10.0, ge=0)
    identity: float = Field(0.5, ge=0)
    pool: int = Field(50, ge=0)
    hue: float = Field(0.0, ge=0, le=1)
    two_way: bool = True
    domains: ClassVar[str] = "unaligned"

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": {"kind": "resnet", "width": 4, "blocks": 1}, "size": 16, "pool": 6,
                 "critic": {"width": 4, "layers": 1}},
        "resnet-9": {},
        "resnet-6": {"net": {"kind": "resnet", "blocks": 6}, "size": 128},
        "emoji": {"net": _EMOJI, "size": 64, "critic": {"width": 32, "layers": 2}, "identity": 0.0},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "resnet-9": {"steps": 267_800, "batch_size": 1, "optimizer": "adam", "lr": 2e-4, "betas": (0.5, 0.999),
                     "schedule": "constant-linear", "clip": 0.0, "ema": 0.0, "flip": 0.5, "load": 286},
    }
    recipes |= {
        "resnet-6": recipes["resnet-9"] | {"load": 143},
        "emoji": recipes["resnet-9"] | {"steps": 8000, "batch_size": 4, "load": 0, "shift": 4, "ema": 0.995,
                                        "save_every": 250, "precision": "auto"},
    }

    @model_validator(mode="after")
    def _round_trip(self) -> Self:
        if self.two_way and self.net.kind != "patch" and self.net.in_channels != self.net.out_channels:
            raise ValueError("net: a picture that comes back must have as many channels as it had")
        if self.two_way and self.net.kind != "patch" and self.critic.in_channels not in (0, self.net.out_channels):
            raise ValueError(f"critic.in_channels {self.critic.in_channels}: the generator makes pictures of "
                             f"{self.net.out_channels}; 0 takes theirs")
        return self

    @property
    def image_size(self) -> int:
        """Side of the pictures it is trained on, in pixels."""
        return self.size

    @property
    def image_channels(self) -> int:
        """Colour channels of the pictures."""
        return self.net.in_channels or 3

    def adapt(self, facts: Any) -> Self:
        """It learns no names."""
        return self

    def build(self) -> "CycleGAN | Critic":
        """The system with its initial weights."""
        return Critic(self) if self.net.kind == "patch" else CycleGAN(self)


class Both(nn.Module):
    """The two directions as one network."""

    def __init__(self, config: Config, two_way: bool):
        super().__init__()
        self.ab = config.build()
        self.ba = config.build() if two_way else None

    def forward(self, x: Tensor, way: str = "ab", noise: ItemNoise | None = None, own: bool = False) -> Tensor:
        """x [B, C, H, W] of the kind that `way` starts from -> the other kind. noise and own: see `halved`."""
        return (self.ab if way == "ab" else self.ba)(x, noise, own)


class CycleGAN(nn.Module):
    """Two translators, and while they are trained two critics with their pools of earlier pictures."""

    training_only = ("critic", "pools")
    takes = TRANSLATES

    def __init__(self, config: CycleGANConfig):
        super().__init__()
        self.config, c = config, config
        self.external: dict[str, str] = {}
        self.net = Both(c.net, c.two_way)
        self.directions = WAYS if c.two_way else WAYS[:1]
        self.critic = nn.ModuleDict({kind: c.critic.build(c.net.out_channels) for kind in "ab"}) if c.two_way else None
        shape = (c.net.out_channels, c.size, c.size)
        self.pools = nn.ModuleDict({kind: ImagePool(c.pool, shape) for kind in "ab"}) if c.two_way else None

    def phases(self) -> tuple[Phase, ...]:
        """Both generators, then both critics. UsageError for a model of one way."""
        if self.critic is None:
            raise UsageError("a model of one way cannot be trained", hint="train anew, with --init to start from it")
        return Phase("generator", self.net, self.generator_loss), Phase("critic", self.critic, self.critic_loss)

    def generator_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """Deceiving both critics, coming back, and leaving alone what is of the wanted kind already."""
        c, total, logged = self.config, 0.0, {"deceive": 0.0, "cycle": 0.0}
        for way, back, x, y in self._ways(batch, rng):
            made = self.net(x, way)
            with frozen(self.critic[way[1]]) as critic:
                deceived = LSGAN.generator(None, critic(made).float())
            cycle = (self.net(made, back).float() - x).abs().mean()
            total = total + deceived + c.cycle * cycle
            logged |= {"deceive": logged["deceive"] + deceived.detach(), "cycle": logged["cycle"] + cycle.detach(),
                       f"diversity_{way}": diversity(made, y)}
            if c.identity:
                kept = (self.net(y, way).float() - y).abs().mean()
                total = total + c.cycle * c.identity * kept
                logged["identity"] = logged.get("identity", 0.0) + kept.detach()
        return {"loss": total} | logged

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How badly each critic tells its kind from made pictures, new and earlier ones."""
        total, logged = 0.0, {}
        for way, _, x, y in self._ways(batch, rng):
            with torch.no_grad():
                made = self.pools[way[1]].query(self.net(x, way).float(), rng)
            real, fake = (self.critic[way[1]](seen).float() for seen in (y, made))
            total = total + LSGAN.critic(real, fake)
            logged |= {f"real_{way[1]}": real.mean().detach(), f"fake_{way[1]}": fake.mean().detach()}
        return {"loss": total} | logged

    def _ways(self, batch: dict, rng: torch.Generator) -> tuple[tuple[str, str, Tensor, Tensor], ...]:
        """(way, way back, pictures it starts from, real pictures of the kind it makes), both ways."""
        a, b = batch["image"], batch["other"]
        from_a, from_b = (self._turned(x, rng) for x in (a, b)) if self.config.hue else (a, b)
        return ("ab", "ba", from_a, b), ("ba", "ab", from_b, a)

    def _turned(self, x: Tensor, rng: torch.Generator) -> Tensor:
        """x [B, C, H, W], the colours of some turned, as `config.hue` says."""
        chosen = torch.rand(len(x), 1, 1, 1, generator=rng).to(x.device) < self.config.hue
        return torch.where(chosen, diff_augment(x, rng, ("hue",)), x)

    def translate(self, x: Tensor, direction: str = "ab", seeds: list[int] | None = None) -> Tensor:
        """x [B, C, H, W] in [-1, 1] of any size -> the other kind. UsageError for a way that the model lacks.

        As published: batch norms by the picture's own statistics, and the dropout of item i, drawn by seeds[i].
        """
        check_direction(direction, self.directions)
        noise = ItemNoise(list(range(len(x))) if seeds is None else seeds, "dropout")
        return translated(lambda part: self.net(part, direction, noise, True), x, self.config.net.multiple).float()

    def check(self, request: SampleRequest) -> None:
        """UsageError without a picture, for a way that the model lacks, and for what steers other models."""
        check_translation(request, self.directions)

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """The request's picture as the other kind, once a seed; without dropout all are the same. Raises as `check`."""
        self.check(request)
        x = read_source(request, self.config.image_channels).to(next(self.net.parameters()))
        drawn = seeds if self.config.net.dropout else seeds[:1]
        shown = torch.cat([self.translate(x, request.direction or "ab", [seed]) for seed in drawn]).clamp(-1, 1)
        shown = shown.expand(len(seeds), -1, -1, -1)
        if watch is not None:
            watch(0, 1, shown, lambda x: x)
        return Media("image", shown)


class Critic(nn.Module):
    """A published PatchGAN: it judges pictures and makes none."""

    def __init__(self, config: CycleGANConfig):
        super().__init__()
        self.config = config
        self.external: dict[str, str] = {}
        self.net = config.net.build()

    def phases(self) -> tuple[Phase, ...]:
        """Nothing: a critic is trained against a generator."""
        raise UsageError("a critic alone cannot be trained", hint="nexus train cyclegan --preset resnet-9")

    def check(self, request: SampleRequest) -> None:
        """InputError: a critic makes nothing."""
        raise InputError("this model is a critic of pictures: it makes none", hint="convert the generator's file")

    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """See `check`."""
        self.check(request)
