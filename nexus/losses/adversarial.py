"""Adversarial losses: what a critic and a generator make of the critic's scores, and how they are weighed."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WEIGHT_LIMIT = 1e4          # of `balance`: where the adversarial gradient vanishes its weight would be infinite


class AdversarialLoss(NamedTuple):
    """critic(real, fake) and generator(real, fake): scores [B, ...] of any sign -> scalars to be minimised."""

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


def _relativistic(first: Tensor, second: Tensor) -> Tensor:
    """Real and fake of the same place in the batch are compared. Jolicoeur-Martineau 2018; Huang et al. 2024."""
    return F.softplus(second - first).mean()


LOSSES: dict[str, AdversarialLoss] = {
    "minimax": AdversarialLoss(     # Goodfellow et al. 2014, eq. 1: the generator raises log D's error directly
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda real, fake: -F.softplus(fake).mean()),
    "non-saturating": AdversarialLoss(
        lambda real, fake: F.softplus(-real).mean() + F.softplus(fake).mean(),
        lambda real, fake: F.softplus(-fake).mean()),
    "hinge": AdversarialLoss(       # Lim & Ye 2017; Miyato et al. 2018
        lambda real, fake: F.relu(1 - real).mean() + F.relu(1 + fake).mean(),
        lambda real, fake: -fake.mean()),
    "lsgan": AdversarialLoss(       # Mao et al. 2017 with targets 1 and 0, halved for the critic as CycleGAN has it
        lambda real, fake: 0.5 * ((real - 1).square().mean() + fake.square().mean()),
        lambda real, fake: (fake - 1).square().mean()),
    "wasserstein": AdversarialLoss(     # Arjovsky et al. 2017: minus the critic's loss estimates the distance
        lambda real, fake: fake.mean() - real.mean(),
        lambda real, fake: -fake.mean()),
    "relativistic": AdversarialLoss(
        _relativistic,
        lambda real, fake: _relativistic(fake, real)),
}


def feature_distance(real: list[Tensor], fake: list[Tensor]) -> Tensor:
    """Mean |difference| of a critic's hidden layers, each in units of the real one's mean size: a scalar.

    Feature matching, Salimans et al. 2016; relative to each layer's size as in Defossez et al. 2022, eq. 2.
    """
    parts = [(f - r.detach()).abs().mean() / r.detach().abs().mean().clamp_min(1e-6)
             for r, f in zip(real, fake, strict=True)]
    return torch.stack(parts).mean()


def balance(main: Tensor, adversarial: Tensor, weight: Tensor) -> Tensor:
    """The factor that gives `adversarial` the gradient length of `main` at the parameter `weight`: a constant.

    Esser et al. 2021 (VQGAN), eq. 7; both losses keep their graphs.
    """
    ours, theirs = (torch.autograd.grad(loss, weight, retain_graph=True)[0].float().norm()
                    for loss in (main, adversarial))
    return (ours / (theirs + 1e-6)).clamp(max=WEIGHT_LIMIT).detach()
