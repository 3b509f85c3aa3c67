"""The VQ picture codec as a system: VQGAN without its transformer. Esser et al. 2021; van den Oord et al. 2017."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError
from nexus.losses.kl import log_likelihood
from nexus.media import Media
from nexus.models.cv.vae.critic import deceive, judge
from nexus.models.cv.vae.parts import extra_terms, psnr, read_picture, refuse_steering
from nexus.phase import Phase
from nexus.requests import SampleRequest


class VQ(nn.Module):
    """A VQ codec, and a critic if it is trained against one; `generate` rebuilds a picture.

    config: a VAEConfig whose net.kind is "vq".
    """

    training_only = ("critic",)

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.external: dict[str, str] = {}
        self.net = config.net.build()
        self.critic = config.critic.build(config.image_channels) if config.critic else None

    def phases(self) -> tuple[Phase, ...]:
        """Encoder, codebook and decoder together, then the critic."""
        codec = (Phase("vq", self.net, self.loss),)
        return codec if self.critic is None else (*codec, Phase("critic", self.critic, self.critic_loss))

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """The training loss at `step`, with `psnr` (dB) and `usage`, the share of rows that the batch chose, to log."""
        x, c = batch["image"], self.config
        z = self.net.encode(x).float()
        if step == 0 and torch.is_grad_enabled():
            self.net.start(z, rng)
        coded = self.net.coded(z)
        shown = self.net.decode_raw(coded.z).float()
        values = math.prod(x.shape[1:])
        distortion = -log_likelihood(c.likelihood, shown, x, c.spread).mean()
        rebuilding = distortion + values * extra_terms(c, shown, x)
        loss = rebuilding + values * (coded.to_z + c.commitment * coded.to_rows)
        usage = torch.bincount(coded.ids.flatten(), minlength=c.net.bins).count_nonzero() / c.net.bins
        logged = {"distortion": distortion, "commitment": coded.to_rows, "psnr": psnr(shown, x), "usage": usage}
        deceived, seen = deceive(self.critic, c.critic, step, shown, x, rebuilding / values, self.net.decoder)
        loss, logged = loss + values * deceived, logged | seen
        return {"loss": loss / values if c.per_value else loss} | {k: v.detach() for k, v in logged.items()}

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How badly the critic tells pictures from rebuilt ones; a constant while it does not learn yet."""
        return judge(self.critic, self.config.critic, step, batch["image"], lambda: self.rebuilt(batch["image"]))

    def rebuilt(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> the pictures of its ids, in [-1, 1] but for overshoot."""
        return self.net.decode_rounded(self.net.encode(x)).float()

    def check(self, request: SampleRequest) -> None:
        """InputError without a picture, for a prompt or a mask, UsageError for what steers a sampler."""
        refuse_steering(request, self.config.image_size)
        if request.image is None:
            raise InputError("this model rebuilds pictures, and has no prior to draw any from", hint="--image FILE")

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """The request's picture rebuilt, once a seed; raises as `check` does."""
        self.check(request)
        x = read_picture(request.image, self.config.image_size, self.config.image_channels)
        shown = self.rebuilt(x.to(next(self.net.parameters()))).clamp(-1, 1).expand(len(seeds), -1, -1, -1)
        if watch is not None:
            watch(0, 1, shown, lambda x: x)
        return Media("image", shown)
