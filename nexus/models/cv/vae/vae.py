"""Variational autoencoders: VAE, beta-VAE and the picture codecs of latent diffusion (KL and VQ), as one system."""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig
from nexus.codecs.vq_image import VQConfig
from nexus.config import Config
from nexus.losses import lpips
from nexus.losses.kl import kl_standard, log_likelihood, sample_gaussian
from nexus.media import Media
from nexus.models.cv.vae.critic import CriticConfig, deceive, judge
from nexus.models.cv.vae.flat import ConvVAEConfig, MLPVAEConfig
from nexus.models.cv.vae.mistakes import Mistakes, MistakesConfig
from nexus.models.cv.vae.parts import extra_terms, open_networks, psnr, rate_cost, read_picture, refuse_steering
from nexus.models.cv.vae.vq import VQ
from nexus.phase import Phase
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise

_CODEC = {"likelihood": "laplace", "beta": 1e-6, "per_value": True, "edge_weight": 0.5}
_PICTURE_CODEC = _CODEC | {"net": KLConfig.presets["picture-codec"] | {"kind": "kl"}, "beta": 5e-3}
_PICTURE_CODEC_RECIPE = {"steps": 5000, "batch_size": 16, "lr": 8e-4, "warmup": 200, "schedule": "cosine",
                         "final_lr": 0.02, "precision": "auto", "ema": 0.995, "save_every": 250, "flip": 0.5,
                         "shift": 4, "betas": (0.9, 0.99)}


class VAEConfig(Config):
    """A network and the evidence lower bound it is trained on.

    The loss is -log p(x|z) summed over pixels + beta * KL summed over latents, averaged over the batch.
    spread: standard deviation (gaussian) or scale (laplace) of a pixel around the output, in units of [-1, 1].
    kl_warmup_steps: beta rises from 0 over these. free_bits: nats each latent may hold at no cost.
    capacity: nats; when set, the cost is beta * |KL - C|, C rising from 0 to it over capacity_steps (Burgess 2018).
    l1_weight, l2_weight, edge_weight: further reconstruction terms, each a mean over values times their number;
    lpips_weight is that of the distance whose weights are in the file `lpips` (Rombach et al. 2022: 1), features_weight
    of the one between the features of EfficientNet-lite, whose weights are in the file `features`.
    per_value: the loss is divided by the number of values in a picture, so a gradient clip means the same at any size.
    critic: a PatchGAN that a picture codec is trained against as well (Rombach et al. 2022); None = none.
    latent_noise: most standard deviation of noise that is added to latents, drawn for each picture from 0 up: a decoder
    that knows it mends what a generator of latents gets a little wrong (Zheng et al. 2025, arXiv:2510.11690).
    mistakes: latents that a generator got a little wrong, for the same purpose; None = none.
    decoder_only: a KL codec's encoder stays as it is, and with it all latents that others have learnt to make.
    commitment: of a VQ codec, whose codebook follows at weight 1 (van den Oord et al. 2017, eq. 3); it has no KL.
    iwae_k: importance samples when the likelihood is estimated (Burda et al. 2016).
    """

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": {"kind": "conv", "size": 16, "widths": (8, 8), "hidden": 16, "latents": 4},
                 "likelihood": "bernoulli"},
        "tiny-codec": _CODEC | {"net": KLConfig.presets["tiny"] | {"kind": "kl"}, "critic": {"width": 4}},
        "tiny-decoder": _CODEC | {"net": KLConfig.presets["tiny"] | {"kind": "kl"}, "critic": {"width": 4, "start": 0},
                                  "decoder_only": True, "latent_noise": 0.4},
        "tiny-vq": _CODEC | {"net": VQConfig.presets["tiny-vq"] | {"kind": "vq"}, "critic": {"width": 4}},
        "picture-codec": _PICTURE_CODEC | {"critic": {"weight": 0.1, "feature_weight": 0.05, "start": 3000}},
        "picture-codec-decoder": _PICTURE_CODEC | {"critic": {"weight": 0.1, "feature_weight": 0.05, "start": 0},
                                                   "decoder_only": True, "latent_noise": 0.5},
        "picture-codec-mend": _PICTURE_CODEC | {"decoder_only": True, "latent_noise": 0.3, "features_weight": 2.0,
                                                "mistakes": {"generator": "dit", "share": 0.6}},
        "picture-vq": _CODEC | {"net": VQConfig.presets["picture-vq"] | {"kind": "vq"},
                                "critic": {"weight": 0.1, "feature_weight": 0.05, "start": 3000}},
        **{name: _CODEC | {"net": VQConfig.presets[name] | {"kind": "vq"}, "critic": {}}
           for name in ("vq-f4", "vq-f8", "vq-f16", "vqgan-imagenet")},
        "mlp-500": {"net": {"kind": "mlp"}, "likelihood": "bernoulli"},
        "beta-vae": {"net": {"kind": "conv", "size": 28, "widths": (32, 64)}, "likelihood": "bernoulli", "beta": 4.0},
        "beta-vae-capacity": {"net": {"kind": "conv", "size": 28, "widths": (32, 64)}, "likelihood": "bernoulli",
                              "beta": 30.0, "capacity": 25.0, "capacity_steps": 5000},
        "beta-vae-dsprites": {"net": {"kind": "conv"}, "likelihood": "bernoulli", "beta": 4.0},
        "beta-vae-emoji": {"net": {"kind": "conv", "channels": 3, "widths": (32, 64, 64, 128), "latents": 32},
                           "likelihood": "gaussian", "spread": 0.3, "beta": 4.0, "kl_warmup_steps": 500},
        **{name: _CODEC | {"net": KLConfig.presets[name] | {"kind": "kl"}}
           for name in ("sd-f8", "sdxl-f8", "sd3", "flux", "kl-f16", "kl-f32")},
    }
    default_preset: ClassVar[str] = "picture-codec"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "tiny-codec": {"steps": 20, "batch_size": 4},
        "tiny-decoder": {"steps": 20, "batch_size": 4},
        "tiny-vq": {"steps": 20, "batch_size": 4},
        "picture-codec": _PICTURE_CODEC_RECIPE,
        "picture-codec-decoder": _PICTURE_CODEC_RECIPE | {"lr": 4e-4},
        "picture-codec-mend": _PICTURE_CODEC_RECIPE | {"lr": 4e-4, "steps": 2000, "warmup": 50, "ema": 0.99},
        "picture-vq": _PICTURE_CODEC_RECIPE,
        "beta-vae": {"steps": 4000, "batch_size": 64, "lr": 1e-3, "schedule": "cosine", "ema": 0.995},
    }
    net: Annotated[KLConfig | VQConfig | ConvVAEConfig | MLPVAEConfig, Field(discriminator="kind")] = MLPVAEConfig()
    likelihood: Literal["gaussian", "bernoulli", "laplace"] = "bernoulli"
    spread: float = Field(1.0, gt=0)
    beta: float = Field(1.0, ge=0)
    kl_warmup_steps: int = Field(0, ge=0)
    free_bits: float = Field(0.0, ge=0)
    capacity: float | None = Field(None, ge=0)
    capacity_steps: int = Field(0, ge=0)
    l1_weight: float = Field(0.0, ge=0)
    l2_weight: float = Field(0.0, ge=0)
    edge_weight: float = Field(0.0, ge=0)
    lpips_weight: float = Field(0.0, ge=0)
    lpips: str = ""
    features_weight: float = Field(0.0, ge=0)
    features: str = ""
    per_value: bool = False
    critic: CriticConfig | None = None
    latent_noise: float = Field(0.0, ge=0)
    mistakes: MistakesConfig | None = None
    decoder_only: bool = False
    commitment: float = Field(0.25, ge=0)
    iwae_k: int = Field(50, ge=1)

    @model_validator(mode="after")
    def _critic_fits(self) -> Self:
        if self.critic and not isinstance(self.net, KLConfig):
            raise ValueError("critic: only a picture codec (net.kind=kl or vq) is trained against one")
        if (self.decoder_only or self.latent_noise or self.mistakes) and self.net.kind != "kl":
            raise ValueError("decoder_only, latent_noise and mistakes: only a KL codec (net.kind=kl) is trained so")
        if self.mistakes and not self.decoder_only:
            raise ValueError("mistakes: their generator knows the encoder as it is, so decoder_only is needed")
        if self.net.kind == "vq" and self.likelihood == "bernoulli":
            raise ValueError("likelihood: the pixels of a VQ codec are gaussian or laplace")
        return self

    @model_validator(mode="after")
    def _lpips_has_weights(self) -> Self:
        if self.lpips_weight and not self.lpips:
            raise ValueError(lpips.NEEDED)
        return self

    @property
    def goes_on(self) -> bool:
        """Whether training has to begin with a trained model: a random encoder's latents are not worth decoding."""
        return self.decoder_only

    @property
    def image_size(self) -> int:
        """Side of the pictures it is trained on, in pixels."""
        return self.net.size

    @property
    def image_channels(self) -> int:
        """Colour channels of the pictures."""
        return self.net.in_channels if isinstance(self.net, KLConfig) else self.net.channels

    def adapt(self, facts: Any) -> "VAEConfig":
        """This system for pictures of facts.size pixels and facts.channels colours."""
        return self.model_copy(update={"net": self.net.fitted(facts.size, facts.channels)})

    def build(self) -> "VAE | VQ":
        return VQ(self) if self.net.kind == "vq" else VAE(self)


class VAE(nn.Module):
    """A network, and a critic if it is trained against one; `generate` decodes draws of the prior, or rebuilds."""

    training_only = ("critic", "generator")

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.external = {"generator": config.mistakes.generator} if config.mistakes else {}
        self._mistakes: Mistakes | None = None
        self.net = config.net.build()
        self.critic = config.critic.build(self.config.image_channels) if config.critic else None

    def admit(self, part: str, system: Any) -> None:
        """Keep the generator whose mistakes are mended; ModelError when it makes no latents of this codec."""
        self._mistakes = Mistakes(self.config.mistakes, system, self.config.net.latent_shape)

    def phases(self) -> tuple[Phase, ...]:
        """Encoder and decoder together (or the decoder alone), then the critic; ModelError when a file is missing."""
        open_networks(self.config, next(self.net.parameters()).device)
        both = (Phase("vae", self.net.decoder if self.config.decoder_only else self.net, self.loss),)
        return both if self.critic is None else (*both, Phase("critic", self.critic, self.critic_loss))

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """The training loss at `step`, with `distortion` and `rate` (nats a picture) and `psnr` (dB) to log."""
        x, c = batch["image"], self.config
        output, mean, logvar = self.rebuild(x, rng, batch)
        distortion = -log_likelihood(c.likelihood, output, x, c.spread).mean()
        kl = kl_standard(mean, logvar)
        shown = self.picture(output)
        values = math.prod(x.shape[1:])
        rebuilding = distortion + values * extra_terms(c, shown, x)
        loss = rebuilding + rate_cost(c, kl, step)
        logged = {"distortion": distortion, "rate": kl.flatten(1).sum(1).mean(), "psnr": psnr(shown, x)}
        deceived, seen = deceive(self.critic, c.critic, step, shown, x, rebuilding / values, self.net.decoder)
        loss, logged = loss + values * deceived, logged | seen
        return {"loss": loss / values if c.per_value else loss} | {k: v.detach() for k, v in logged.items()}

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How badly the critic tells pictures from rebuilt ones; a constant while it does not learn yet."""
        return judge(self.critic, self.config.critic, step, batch["image"],
                     lambda: self.picture(self.rebuild(batch["image"], rng, batch)[0]))

    def rebuild(self, x: Tensor, rng: torch.Generator | None, batch: dict | None = None
                ) -> tuple[Tensor, Tensor, Tensor]:
        """x -> (decoder output, mean, log variance); with rng None the posterior's mean is decoded.

        batch: with it, some latents are a generator's mistakes, where those are trained on.
        """
        c = self.config
        with torch.set_grad_enabled(torch.is_grad_enabled() and not c.decoder_only):
            mean, logvar = (m.float() for m in self.net.encode(x))
        z = mean if rng is None else sample_gaussian(mean, logvar, _noise(mean, rng))
        if rng is not None and c.latent_noise:
            most = c.latent_noise * torch.rand(len(z), 1, 1, 1, generator=rng)
            z = z + most.to(z) * _noise(z, rng)
        if batch is not None and self._mistakes is not None:
            some = math.ceil(c.mistakes.share * len(x))
            z = torch.cat([self._mistakes(batch, mean[:some], self.net.encoder, rng).to(z), z[some:]])
        return self.net.decode_raw(z.to(x.dtype)).float(), mean, logvar

    def rebuilt(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the pictures of the posterior's means, in [-1, 1] but for overshoot."""
        return self.picture(self.rebuild(x, None)[0])

    def picture(self, output: Tensor) -> Tensor:
        """What the decoder says -> the expected picture, in [-1, 1] but for overshoot."""
        return 2 * output.sigmoid() - 1 if self.config.likelihood == "bernoulli" else output

    def check(self, request: SampleRequest) -> None:
        """InputError for a prompt or a mask, UsageError for what steers a sampler."""
        refuse_steering(request, self.config.image_size)

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int],
                 watch: Callable[..., Any] | None = None) -> Media:
        """One picture a seed: a decoded draw of the prior, or a posterior draw of the request's picture.

        Raises InputError for a prompt, a negative prompt, a mask, or a picture that cannot be read, and UsageError for
        what steers a sampler.
        """
        self.check(request)
        weight = next(self.net.parameters())
        noise = ItemNoise(seeds).draw(self.config.net.latent_shape).to(weight)
        if request.image is None:
            output = self.net.decode(noise)
        else:
            x = read_picture(request.image, self.config.image_size, self.config.image_channels).to(weight)
            mean, logvar = self.net.encode(x)
            output = self.net.decode_raw(sample_gaussian(mean, logvar, noise))
        shown = self.picture(output.float()).clamp(-1, 1)
        if watch is not None:
            watch(0, 1, shown, lambda x: x)
        return Media("image", shown)


def _noise(like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=rng).to(like)
