"""EnCodec as a system: a codec of sound, learnt against critics of its spectrograms. Defossez et al. 2022.

B items, C channels, T samples, K rows of ids, F frames.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.encodec import EncodecConfig, EncodecNet
from nexus.config import Config
from nexus.losses.adversarial import LOSSES, feature_distance
from nexus.losses.balancer import Balancer
from nexus.losses.spectral import mel_distance, si_sdr
from nexus.media import Media
from nexus.nn.gan_blocks import frozen
from nexus.nn.ranks import of_the_first
from nexus.nn.stft_critic import StftCriticConfig
from nexus.phase import Phase
from nexus.requests import SampleRequest, refuse
from nexus.rng import generator

HINGE = LOSSES["hinge"]
_PAPER = {"adversarial": 3.0, "features": 3.0, "wave": 0.1, "mel": 1.0}
_SMALL_CRITIC = {"windows": (1024, 512, 256), "width": 8, "dilations": (1, 2)}


class EncodecSystemConfig(Config):
    """A codec and what it is trained for.

    wave, mel, adversarial, features: shares that |x - x'|, the mel distance, deceiving the critics and looking to them
    like the original have of the gradient at the sound (see Balancer). commitment: weight of the encoder's distance
    from the codebooks, which is outside the balance. exponents: the mel distance's windows are 2^i samples. critic:
    None = none. seconds: of the sounds it is trained on, and of what it makes unless it is told. decoder_only: encoder
    and codebooks stay as they are, and with them all ids that others have learnt to write.
    """

    medium: ClassVar[str] = "audio"
    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": EncodecConfig.presets["tiny"], "exponents": (5, 6), "seconds": 0.25, "decay": 0.9,
                 "critic": {"windows": (64, 32), "width": 2, "dilations": (1,)}},
        "music": {"net": EncodecConfig.presets["music"], "wave": 1.0, "mel": 2.0, "adversarial": 1.0, "features": 1.0,
                  "critic": _SMALL_CRITIC | {"start": 2000, "lead": 100}},
        "music-decoder": {"net": EncodecConfig.presets["music"], "wave": 0.5, "mel": 2.0, "adversarial": 1.0,
                          "features": 1.0, "critic": _SMALL_CRITIC | {"start": 200, "lead": 150},
                          "decoder_only": True},
        "speech": {"net": EncodecConfig.presets["speech"], "wave": 0.5, "mel": 2.0, "adversarial": 1.0,
                   "features": 1.0, "critic": _SMALL_CRITIC | {"start": 2000, "lead": 100}},
        "24khz": _PAPER | {"net": EncodecConfig.presets["24khz"]},
        "32khz": {"net": EncodecConfig.presets["32khz"]},
        "48khz": _PAPER | {"net": EncodecConfig.presets["48khz"]},
    }
    default_preset: ClassVar[str] = "music"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "music": {"steps": 3000, "batch_size": 8, "lr": 1e-3, "betas": (0.8, 0.99), "warmup": 100,
                  "schedule": "cosine", "final_lr": 0.05, "ema": 0.995, "clip": 0.0, "save_every": 250,
                  "precision": "auto"},
        "24khz": {"steps": 600_000, "batch_size": 64, "optimizer": "adam", "lr": 3e-4, "betas": (0.5, 0.9),
                  "ema": 0.99, "clip": 0.0, "save_every": 2000},
    }
    recipes |= {"music-decoder": recipes["music"] | {"steps": 4000, "lr": 4e-4}, "speech": recipes["music"],
                "48khz": recipes["24khz"],
                "32khz": recipes["24khz"] | {"steps": 400_000, "batch_size": 192, "schedule": "cosine"}}
    net: EncodecConfig = EncodecConfig()
    critic: StftCriticConfig | None = StftCriticConfig()
    adversarial: float = Field(4.0, ge=0)
    features: float = Field(4.0, ge=0)
    wave: float = Field(0.1, ge=0)
    mel: float = Field(2.0, ge=0)
    commitment: float = Field(1.0, ge=0)
    exponents: tuple[int, ...] = Field((5, 6, 7, 8, 9, 10, 11), min_length=1)
    decay: float = Field(0.999, ge=0, lt=1)
    seconds: float = Field(1.0, gt=0)
    decoder_only: bool = False

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        widest = max(1 << max(self.exponents), *(self.critic.windows if self.critic else (0,)))
        if self.seconds * self.net.rate <= widest / 2:
            raise ValueError(f"seconds: {self.seconds} of sound are shorter than half a window of {widest} samples")
        if not self.wave + self.mel > 0:
            raise ValueError("wave and mel: one of them must weigh something")
        return self

    @property
    def rate(self) -> int:
        """Samples a second of the sounds it is trained on."""
        return self.net.rate

    @property
    def channels(self) -> int:
        """Channels of the sounds."""
        return self.net.channels

    def adapt(self, facts: Any) -> Self:
        """It learns no names."""
        return self

    def build(self) -> "Encodec":
        """The system with its initial weights."""
        return Encodec(self)


class Encodec(nn.Module):
    """A codec, and while it is trained its critics and the balance of their losses."""

    training_only = ("critic", "balancer")
    takes = frozenset({"duration"})

    def __init__(self, config: EncodecSystemConfig):
        super().__init__()
        self.config, c = config, config
        self.external: dict[str, str] = {}
        self.net: EncodecNet = c.net.build()
        self.critic = c.critic.build(c.channels) if c.critic else None
        shares = {name: getattr(c, name) for name in ("wave", "mel", "adversarial", "features")}
        self.balancer = Balancer({name: share for name, share in shares.items() if share}, decay=c.decay)

    def phases(self) -> tuple[Phase, ...]:
        """Encoder, codebooks and decoder together, then the critics."""
        codec = (Phase("codec", self.net.decoder if self.config.decoder_only else self.net, self.loss),)
        return codec if self.critic is None else (*codec, Phase("critic", self.critic, self.critic_loss))

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """The balanced losses and the commitment, with `si_sdr` (dB) and `used` rows to log.

        The codebooks learn here.
        """
        c, x = self.config, batch["audio"]
        made, commitment, _ = self.net(x, self._count(rng, x), rng, decoder_only=c.decoder_only)
        losses = {"wave": (made - x).abs().mean(), "mel": mel_distance(made, x, c.net.rate, c.exponents)}
        if self.critic is not None and step >= c.critic.start:
            losses |= self._deceive(made, x)
        pull = self.balancer({k: v for k, v in losses.items() if k in self.balancer.weights}, made)
        logged = losses | {"commitment": commitment, "si_sdr": si_sdr(made, x).mean(), "used": self._used()}
        paid = 0.0 if c.decoder_only else c.commitment * commitment
        return {"loss": pull + paid} | {k: v.detach() for k, v in logged.items()}

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How badly sound is told from rebuilt sound; a constant while the critics do not learn yet."""
        if step < self.config.critic.start - self.config.critic.lead:
            return {"loss": sum(0.0 * critic.last.bias.sum() for critic in self.critic.critics)}
        x = batch["audio"]
        with torch.no_grad():
            made = self.net(x, self._count(rng, x)).audio
        pairs = list(zip(self.critic(x)[0], self.critic(made)[0], strict=True))
        told = [HINGE.critic(real.float(), fake.float()) for real, fake in pairs]
        means = (torch.stack([score.float().mean() for score in side]).mean().detach()
                 for side in zip(*pairs, strict=True))
        return {"loss": torch.stack(told).mean()} | dict(zip(("real", "fake"), means, strict=True))

    def _deceive(self, made: Tensor, x: Tensor) -> dict[str, Tensor]:
        with frozen(self.critic) as critic:
            scores, ours = critic(made)
            with torch.no_grad():
                _, theirs = critic(x)
        deceived = [HINGE.generator(None, score.float()) for score in scores]
        return {"adversarial": torch.stack(deceived).mean(), "features": feature_distance(theirs, ours)}

    def _count(self, rng: torch.Generator, x: Tensor) -> int | None:
        """How many codebooks a batch is coded with: one of the choices, so that a listener may take fewer.

        All ranks take the same, as they learn the same codebooks.
        """
        choices = self.config.net.choices
        drawn = torch.randint(len(choices), (), generator=rng) if choices else None
        return None if drawn is None else choices[int(of_the_first(drawn.to(x.device)))]

    def _used(self) -> Tensor:
        """The perplexity of the rows' moving averages as a share of all rows, over the codebooks that have begun."""
        sizes = torch.stack([book.cluster_size for book in self.net.quantizer.books])
        begun = (sizes.sum(1) > 0).float()
        rows = sizes / sizes.sum(1, keepdim=True).clamp_min(1e-12)
        perplexity = torch.special.entr(rows).sum(1).exp() / sizes.shape[1]
        return (perplexity * begun).sum() / begun.sum().clamp_min(1)

    def check(self, request: SampleRequest) -> None:
        """UsageError for what steers other models, ModelError for a codec whose ids do not say all."""
        refuse(request, self.takes, "a codec makes sound of no particular kind: only its length can be set")
        self.net.check_ids()

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """One sound a seed: ids drawn as often as training met each, in no order, decoded; raises as `check` does."""
        self.check(request)
        samples = max(1, round((request.duration or self.config.seconds) * self.config.rate))
        ids = torch.stack([self._drawn(seed, self.net.frames(samples)) for seed in seeds])
        sound = self.net.from_codes(ids)[..., :samples].clamp(-1, 1)
        if watch is not None:
            watch(0, 1, sound, lambda x: x)
        return Media("audio", sound, rate=self.config.rate)

    def _drawn(self, seed: int, frames: int) -> Tensor:
        """ids [K, F]."""
        books = [book.cluster_size.float().cpu() for book in self.net.quantizer.books]
        rng = generator(seed, "codes")
        twice = self.config.net.codebooks // len(books)
        rows = [torch.multinomial(size if size.any() else torch.ones_like(size), frames, True, generator=rng)
                for size in books for _ in range(twice)]
        return torch.stack(rows).to(self.net.quantizer.books[0].embed.device)
