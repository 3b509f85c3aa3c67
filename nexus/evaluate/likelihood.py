"""How well a model with a posterior knows pictures: likelihood bounds and reconstructions."""

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from nexus.errors import ModelError
from nexus.evaluate.pictures import psnr, ssim
from nexus.rng import generator


def analysis(system: nn.Module) -> ModuleType | None:
    """The measurements that a system brings: `analysis` beside its module, with `rebuild` and perhaps `elbo`."""
    name = type(system).__module__.rpartition(".")[0] + ".analysis"
    try:
        module = import_module(name) if name.startswith("nexus.models.") and find_spec(name) else None
    except ModuleNotFoundError:
        return None
    return module if hasattr(module, "rebuild") else None


def reconstruction(system: nn.Module, batches: Iterable[dict], *, seed: int,
                   watch: Callable[[int], Any] | None = None) -> dict[str, Tensor]:
    """Per picture: "psnr" (dB), "ssim", and where the system knows them "elbo", "iwae" (bits a dimension).

    Both bounds are on -log2 p(x) over the C*H*W values scaled to [-1, 1], as densities unless the likelihood is
    Bernoulli. psnr and ssim compare pictures rounded to 8 bits. Draws are a function of seed and batch. ModelError
    for a system that cannot rebuild a picture.
    """
    own = analysis(system)
    if own is None:
        raise ModelError(f"{type(system).__name__} cannot rebuild a picture", hint="a VAE or a picture codec can")
    weight = next(system.parameters())
    columns: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(batches):
        x = batch["image"].to(weight)
        for name, values in _measured(own, system, x, generator(seed, "evaluate", number)).items():
            columns.setdefault(name, []).append(values.double().cpu())
        if watch:
            watch(len(x))
    return {name: torch.cat(values) for name, values in columns.items()}


def _measured(own: ModuleType, system: nn.Module, x: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
    before, after = (((p.float().clamp(-1, 1) + 1) * 127.5).round() for p in (x, own.rebuild(system, x)))
    found = {"psnr": psnr(before, after), "ssim": ssim(before, after)}
    bits = math.log(2) * math.prod(x.shape[1:])
    if hasattr(own, "elbo"):
        found["elbo"] = -own.elbo(system, x, rng) / bits
    if hasattr(own, "iwae_nll") and len(system.config.net.latent_shape) == 1:
        found["iwae"] = own.iwae_nll(system, x, rng) / bits
    return found
