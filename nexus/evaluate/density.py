"""How likely held-out pictures are under a diffusion or flow model on pixels, in bits a dimension."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nexus.errors import UsageError
from nexus.process.likelihood import bits_per_dim, log_likelihood, rademacher
from nexus.process.paths import DiscretePath
from nexus.process.predictions import clipped, estimator
from nexus.process.schedules import grid
from nexus.rng import ItemNoise, derive, generator

ODE_STEPS = 64          # rk4 steps of the flow's ODE unless a count is given
HALF_LEVEL = 1 / 255    # half the distance of two neighbouring levels of 8-bit pictures in [-1, 1]


def is_dense(system: nn.Module) -> bool:
    """Whether the system denoises on a path, so that pictures have a likelihood."""
    return getattr(system, "denoises", False)


def bits(system: nn.Module, batches: Iterator[tuple[dict, list[str | None]]], *, seed: int, steps: int | None = None,
         watch: Callable[[int], Any] = lambda done: None) -> tuple[Tensor, dict]:
    """Upper bounds on -log2 P(picture) a dimension [N], in float64, and the protocol they hold for.

    batches: (batch with "image" [B, C, H, W] of 8-bit levels in [-1, 1], its prompts). On a discrete chain it is the
    variational bound (Ho et al. 2020, eq. 5) over `steps` of its steps (default: all); elsewhere the density of the
    probability-flow ODE at uniformly dequantised pictures, its divergence estimated with one Hutchinson probe
    (Song et al. 2021, section 4.3). Draws are a function of seed and picture. UsageError for a latent model.
    """
    c = system.config
    if c.codec is not None:
        raise UsageError("this model's density is of its codec's latents, not of pictures",
                         hint="a model on pixels, such as ddpm, has a likelihood in bits a dimension")
    chain = isinstance(c.path, DiscretePath)
    count = steps or (c.path.steps if chain else ODE_STEPS)
    points = grid(c.path, c.path.times(count, shape=c.latent_shape))
    values, done = [], 0
    for batch, prompts in batches:
        weight = next(system.net.parameters())
        x0 = batch["image"].to(weight.device, torch.float32)
        cond = None if system.conditioner is None else system.conditioner.prompts(prompts, weight.device)[0]
        denoise = estimator(system.net, c.path, c.prediction, cond, learned_variance=c.learned_variance,
                            dtype=weight.dtype)
        seeds = [derive(seed, "likelihood", done + i) for i in range(len(x0))]
        rule = _chain_bits if chain else _flow_bits
        values.append(rule(system, denoise, x0, points, seeds).detach().double().cpu())
        done += len(x0)
        watch(done)
    return torch.cat(values), {"likelihood": "variational bound of the chain" if chain else
                               "probability-flow ODE (rk4), uniform dequantisation, one Hutchinson probe",
                               "likelihood_steps": count}


@torch.no_grad()
def _chain_bits(system, denoise: Callable, x0: Tensor, points, seeds: list[int]) -> Tensor:
    denoise = clipped(denoise) if system.config.clip else denoise
    return bits_per_dim(denoise, x0, points, ItemNoise(seeds), variance=system.config.variance).total


def _flow_bits(system, denoise: Callable, x0: Tensor, points, seeds: list[int]) -> Tensor:
    """-log2 p(x) a dimension, less the volume of a level: by Jensen at least -log2 P of the level."""
    system.requires_grad_(False)
    spread = torch.stack([torch.rand(x0.shape[1:], generator=generator(s, "dequantise")) for s in seeds]).to(x0)
    probe = torch.cat([rademacher(1, x0[:1], generator(s, "probe")) for s in seeds], dim=1)
    x = x0 + (2 * spread - 1) * HALF_LEVEL
    nats = log_likelihood(denoise, x.double(), points, probe.double())
    return -nats / (math.log(2) * x0[0].numel()) - math.log2(2 * HALF_LEVEL)
