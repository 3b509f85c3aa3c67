"""Adversarial training: a generator of pictures from codes against a critic. Goodfellow et al. 2014.

The one system behind GAN, conditional GAN and WGAN. B pictures, C channels, Z = length of a code, K = frames of a walk.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError, ModelError
from nexus.losses.adversarial import LOSSES
from nexus.losses.diversity import diversity
from nexus.losses.regularisers import clip_weights, drift, gradient_penalty, gradient_square
from nexus.media import Media
from nexus.nn.dcgan import DCCriticConfig, DCGeneratorConfig
from nexus.nn.denoiser_critic import DenoiserCriticConfig
from nexus.nn.diffaugment import Policy, diff_augment
from nexus.nn.gan_blocks import frozen
from nexus.nn.gan_resnet import LATENT_CRITIC, LATENT_NET, LATENT_NORMED, ResCriticConfig, ResGeneratorConfig
from nexus.nn.projected import ProjectedCritic, ProjectedCriticConfig
from nexus.phase import Phase
from nexus.process.codec import SHARED_CODEC, CodecConfig, decoded, encoded, unclipped
from nexus.process.latents import check_codes, codes
from nexus.process.looked_through import check_seen, looked_through
from nexus.requests import ONE_STEP, SampleRequest, refuse
from nexus.rng import generator
from nexus.text.conditioner import LabelCondConfig, NoCondConfig

TOGETHER = 64           # frames of walks that are made at once

# Games for the latents of the embedded pictures: against heads on the features of `dit`, against a network of its own,
# and against heads on the features of pictures.
_RELATIVISTIC = {"codec": SHARED_CODEC, "loss": "relativistic", "r1": 1.0, "r2": 1.0, "penalty_every": 4}
EMOJI = _RELATIVISTIC | {"net": LATENT_NORMED, "critic": {"kind": "denoiser"}}
RELATIVISTIC = _RELATIVISTIC | {"net": LATENT_NET, "critic": LATENT_CRITIC}
PROJECTED = {"net": LATENT_NORMED, "codec": SHARED_CODEC, "loss": "hinge",
             "critic": {"kind": "projected", "width": 32, "side": 128},
             "augment": ("color", "translation", "cutout")}
EMOJI_RECIPE = {"steps": 20_000, "batch_size": 32, "optimizer": "adam", "lr": 4e-4, "betas": (0.0, 0.99), "clip": 0.0,
                "ema": 0.998, "save_every": 250, "cache_latents": True}
RELATIVISTIC_RECIPE = EMOJI_RECIPE | {"lr": 2e-4, "schedule": "cosine", "final_lr": 0.1, "flip": 0.5, "shift": 2,
                                      "variants": 4, "save_every": 500}

AnyGenerator = Annotated[DCGeneratorConfig | ResGeneratorConfig, Field(discriminator="kind")]
AnyCritic = Annotated[DCCriticConfig | ResCriticConfig | ProjectedCriticConfig | DenoiserCriticConfig,
                      Field(discriminator="kind")]


class AdversarialConfig(Config):
    """A generator, its critic and the game they play.

    loss: a name of nexus/losses/adversarial.py. critic_steps: turns of the critic for one of the generator (n_critic).
    critic_rate: the critic's learning rate over the generator's. r1, r2, gp, drift: weights of the penalties in
    nexus/losses/regularisers.py; r1 and r2 are on the pictures as the critic sees them, after `augment`, and
    penalty_every: only in every so many steps, that much stronger (Karras et al. 2020, B). clip: limit of the critic's
    weights, 0 = none. auxiliary: weight of the class guess of a critic with label "auxiliary".
    codec: `net` makes its latents. The game is played with these in place of pictures, at a fraction of the cost, but
    for a projected critic, which sees what the codec makes of them. Penalties are on what a critic sees, which for one
    of kind "denoiser" are that model's features.
    """

    net: AnyGenerator = DCGeneratorConfig()
    critic: AnyCritic = DCCriticConfig()
    conditioner: LabelCondConfig | NoCondConfig = Field(NoCondConfig(), discriminator="kind")
    codec: CodecConfig | None = None
    loss: Literal[tuple(LOSSES)] = "non-saturating"
    critic_steps: int = Field(1, ge=1)
    critic_rate: float = Field(1.0, gt=0)
    r1: float = Field(0.0, ge=0)
    r2: float = Field(0.0, ge=0)
    penalty_every: int = Field(1, ge=1)
    gp: float = Field(0.0, ge=0)
    drift: float = Field(0.0, ge=0)
    clip: float = Field(0.0, ge=0)
    auxiliary: float = Field(1.0, ge=0)
    augment: tuple[Policy, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        widths = getattr(self.critic, "widths", None)
        if widths and 4 * 2 ** (len(widths) - 1) != self.net.size:
            raise ValueError(f"critic.widths: {len(widths)} resolutions are of {4 * 2 ** (len(widths) - 1)} pixels, "
                             f"the generator makes {self.net.size}")
        if getattr(self.critic, "label", "none") != "none" and self.conditioner.kind == "none":
            raise ValueError("critic.label: a critic that sees labels needs conditioner.kind label")
        if (self.r1 or self.r2 or self.gp) and getattr(self.critic, "norm", "none") == "batch":
            raise ValueError("critic.norm: penalties on a picture's own gradient need a critic without batch norms")
        made = (self.net.channels, self.net.size, self.net.size) if self.codec else None
        if made and made != self.codec.net.latent_shape:
            raise ValueError(f"codec: its latents are {self.codec.net.latent_shape}, the generator makes {made}")
        return self

    @property
    def image_size(self) -> int:
        """Side of the pictures it is trained on, in pixels."""
        return self.codec.net.size if self.codec else self.net.size

    @property
    def image_channels(self) -> int:
        """Colour channels of the pictures."""
        return self.codec.net.in_channels if self.codec else self.net.channels

    def adapt(self, facts: Any) -> Self:
        """A copy with the class and style names of a data set, and tables for them."""
        conditioner = self.conditioner.adapt(facts.classes, tuple(s for s in facts.styles if s))
        tables = {} if conditioner.kind == "none" else \
            {"num_classes": len(conditioner.classes), "num_styles": len(conditioner.styles)}
        return self.model_copy(update={"conditioner": conditioner, "net": self.net.model_copy(update=tables)})

    def build(self) -> "Adversarial":
        """The system with its initial weights."""
        return Adversarial(self)


class Adversarial(nn.Module):
    """A generator `net`, perhaps of a codec's latents, and, while it is trained, its critic."""

    training_only = ("critic", "teacher")
    takes = frozenset({"prompt", "truncation", "interpolate", "initial_noise"})

    def __init__(self, config: AdversarialConfig):
        super().__init__()
        self.config = config
        self.codec = config.codec.build() if config.codec else None
        self.external = dict(config.codec.external()) if config.codec else {}
        self.net: nn.Module = config.net.build()
        self.sees = isinstance(config.critic, ProjectedCriticConfig)        # pictures, whatever the generator makes
        sides = (config.image_size,) if self.sees else ()
        self.critic: nn.Module = config.critic.build(config.net, *sides)
        self.conditioner = config.conditioner.build()
        self.teacher: nn.Module | None = None                               # what a critic looks through
        self._path: Any = None
        if isinstance(config.critic, DenoiserCriticConfig):
            self.external["teacher"] = config.critic.model

    def admit(self, part: str, system: Any) -> None:
        """ModelError for a denoiser that the critic cannot look through."""
        if part == "teacher":
            c, net = self.config.critic, self.config.net
            codec = self.config.codec and self.config.codec.weights
            check_seen(system, c.model, (net.channels, net.size, net.size), codec, c.hidden, c.patch, c.seen)
            self._path = system.config.path

    def phases(self) -> tuple[Phase, ...]:
        """The critic, as often as the game has it, then the generator."""
        c = self.config
        after = (lambda step: clip_weights(self.critic, c.clip)) if c.clip else None
        if isinstance(self.critic, ProjectedCritic):
            self.critic.features(next(self.net.parameters()).device)        # a file that is not there is missed now
        return (Phase("critic", self.critic, self.critic_loss, c.critic_steps, after, c.critic_rate),
                Phase("generator", self.net, self.generator_loss))

    def encode(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] -> what the generator makes."""
        return encoded(self.codec, x)

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How badly real and made pictures are told apart, and the penalties, each logged by its name."""
        c, truth, cond = self.config, self._real(batch), self._cond(batch, rng)
        level = self._level(truth, rng)
        with torch.no_grad():
            made = self.net(self._draw(truth, rng), cond)
            real, fake = (self._seen(x, rng, level) for x in (truth, made))
        weights = self._penalties(step)
        real, fake = real.requires_grad_("r1" in weights), fake.requires_grad_("r2" in weights)
        (on_real, seen), (on_fake, guessed) = self.critic(real, cond), self.critic(fake, cond)
        on_real, on_fake = on_real.float(), on_fake.float()
        loss = LOSSES[c.loss].critic(on_real, on_fake)
        logged = {"real": on_real.mean(), "fake": on_fake.mean()}
        if c.loss == "wasserstein":
            logged["distance"] = -loss
        penalties = {"r1": lambda: gradient_square(on_real, real), "r2": lambda: gradient_square(on_fake, fake),
                     "gp": lambda: gradient_penalty(lambda x: self.critic(x, cond)[0], real, fake, rng),
                     "drift": lambda: drift(on_real)}
        for name, weight in weights.items():
            logged[name] = penalties[name]()
            loss = loss + weight * logged[name]
        if seen is not None:
            wrong = F.cross_entropy(seen.float(), batch["label"])
            loss = loss + c.auxiliary * (wrong + F.cross_entropy(guessed.float(), batch["label"]))
            logged["accuracy"] = (seen.argmax(1) == batch["label"]).float().mean()
        return {"loss": loss} | {k: v.detach() for k, v in logged.items()}

    def generator_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How well the critic is deceived, with the share of the data's diversity that the pictures have."""
        c, truth, cond = self.config, self._real(batch), self._cond(batch, rng)
        fake, level = self.net(self._draw(truth, rng), cond), self._level(truth, rng)
        with frozen(self.critic) as critic:
            scores, guessed = critic(self._seen(fake, rng, level), cond)
            real = torch.zeros_like(scores)
            if c.loss == "relativistic":                # the others do not look at real pictures
                with torch.no_grad():
                    real = critic(self._seen(truth, rng, level), cond)[0]
        loss = LOSSES[c.loss].generator(real.float(), scores.float())
        if guessed is not None:
            loss = loss + c.auxiliary * F.cross_entropy(guessed.float(), batch["label"])
        return {"loss": loss, "diversity": diversity(fake, truth)}

    def _penalties(self, step: int) -> dict[str, float]:
        """What weighs in the critic's loss of a step, by name."""
        c = self.config
        every = {"r1": c.penalty_every, "r2": c.penalty_every, "gp": 1, "drift": 1}
        return {name: getattr(c, name) * n for name, n in every.items() if getattr(c, name) and (step + 1) % n == 0}

    def _seen(self, x: Tensor, rng: torch.Generator, level: Tensor | None) -> Tensor:
        """Real pictures or latents x, or made ones, as the critic sees them."""
        if self.sees:
            x = unclipped(self.codec, x)                # both painted by the same codec
        x = diff_augment(x.float(), rng, self.config.augment)
        if level is None:
            return x
        if self.teacher is None:
            raise ModelError(f"the critic looks through {self.config.critic.model}, which is not loaded",
                             hint="build the system by `nexus train`, or attach it")
        return looked_through(self.teacher, self._path, x, level, rng, self.config.critic.seen)

    def _level(self, x: Tensor, rng: torch.Generator) -> Tensor | None:
        """How far each item is noised before a denoiser sees it."""
        c = self.config.critic
        if not isinstance(c, DenoiserCriticConfig):
            return None
        return c.least + (c.most - c.least) * torch.rand(len(x), generator=rng)

    @torch.no_grad()
    def _real(self, batch: dict) -> Tensor:
        return batch["latent"] if "latent" in batch else self.encode(batch["image"])

    def _cond(self, batch: dict, rng: torch.Generator) -> dict | None:
        return None if self.conditioner is None else self.conditioner.training_cond(batch, rng)

    def _draw(self, real: Tensor, rng: torch.Generator) -> Tensor:
        return torch.randn(len(real), self.config.net.latents, generator=rng).to(real)

    def check(self, request: SampleRequest) -> None:
        """InputError for a prompt that the model cannot follow, UsageError for what steers other models."""
        if self.conditioner is None and request.prompt is not None:
            raise InputError("this model is unconditional: it takes no prompt", hint="leave --prompt out")
        refuse(request, self.takes, ONE_STEP)
        check_codes(request, self.config.net.latents)
        if request.prompt is not None:
            self.conditioner.check(request.prompt)

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """One picture a seed, or a walk of K pictures. Without a prompt the class is drawn by the seed.

        Raises as `check` does, and InputError for a noise file that does not fit.
        """
        self.check(request)
        weight = next(self.net.parameters())
        z = codes(request, seeds, self.config.net.latents)
        cond, notes = self._asked(request, seeds, weight.device)
        frames = z.shape[1] if z.ndim == 3 else 1
        if cond is not None:
            cond = {name: ids.repeat_interleave(frames) for name, ids in cond.items()}
        flat = z.reshape(-1, z.shape[-1]).to(weight)
        parts = [self.net(flat[i:i + TOGETHER], cond and {n: ids[i:i + TOGETHER] for n, ids in cond.items()})
                 for i in range(0, len(flat), TOGETHER)]
        shown = torch.cat([decoded(self.codec, part) for part in parts])
        if watch is not None:
            watch(0, 1, shown, lambda x: x)
        return Media("image", shown if z.ndim == 2 else shown.unflatten(0, (len(seeds), frames)), notes)

    def _asked(self, request: SampleRequest, seeds: list[int], device: torch.device) -> tuple[dict | None, tuple]:
        """The ids of the prompt's class and style, what it does not say drawn by each seed, and notes of both."""
        if self.conditioner is None:
            return None, ()
        cond, found = self.conditioner.prompts([request.prompt] * len(seeds), device)
        names, notes = self.conditioner.config, [dict(note) for note in found]
        for key, note, table in (("label", "class", names.classes), ("style", "style", names.styles)):
            for i, seed in enumerate(seeds if key in cond and table else ()):
                if int(cond[key][i]) == len(table):
                    drawn = int(torch.randint(len(table), (), generator=generator(seed, key)))
                    cond[key][i] = drawn
                    notes[i][note] = table[drawn]
        return cond, tuple(notes)
