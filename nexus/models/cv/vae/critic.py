"""The adversarial part of a codec's training: a PatchGAN that sees pictures and rebuilt ones. Esser et al. 2021."""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.losses.adversarial import LOSSES, balance, feature_distance
from nexus.nn.patch_critic import PatchCritic


class CriticConfig(Config):
    """The critic and what it weighs.

    weight: share of the reconstruction's gradient (at the decoder's last layer) that the adversarial term has.
    feature_weight: of the distance between the critic's hidden layers, in units of the loss a value.
    start: the first step at which the codec is trained against the critic, which begins to learn `lead` steps earlier.
    """

    width: int = Field(48, ge=1)
    layers: int = Field(2, ge=1)
    weight: float = Field(0.5, ge=0)
    feature_weight: float = Field(0.1, ge=0)
    start: int = Field(0, ge=0)
    lead: int = Field(200, ge=0)

    def build(self, channels: int) -> PatchCritic:
        """The critic for pictures of so many colour channels."""
        return PatchCritic(channels, self.width, self.layers)


def deceive(critic: PatchCritic | None, config: CriticConfig | None, step: int, shown: Tensor, x: Tensor,
            rebuilding: Tensor, decoder: nn.Module) -> tuple[Tensor | float, dict[str, Tensor]]:
    """The codec's adversarial terms for rebuilt pictures `shown` of x, in the units of the loss `rebuilding`.

    0 without a critic, or before it takes part. Gradients are balanced at the decoder's last weight. Also returns what
    is worth logging.
    """
    if critic is None or step < config.start:
        return 0.0, {}
    fake = critic.features(shown)
    generator = LOSSES["hinge"].generator(fake[-1], critic.last(fake[-1]))
    matching = feature_distance(critic.features(x), fake)
    share = config.weight * balance(rebuilding, generator, decoder.conv_out.weight)
    total = share * generator + config.feature_weight * matching
    return total, {"deceive": generator.detach(), "features": matching.detach()}


def judge(critic: PatchCritic, config: CriticConfig, step: int, x: Tensor,
          rebuilt: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The critic's loss on pictures x and rebuilt ones, and its mean scores; a constant before it begins to learn."""
    if step < config.start - config.lead:
        return {"loss": 0.0 * critic.last.bias.sum()}
    with torch.no_grad():
        shown = rebuilt()
    real, fake = critic(x), critic(shown)
    return {"loss": LOSSES["hinge"].critic(real, fake), "real": real.mean().detach(), "fake": fake.mean().detach()}
