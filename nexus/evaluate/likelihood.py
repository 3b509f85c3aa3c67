"""How well a model with a posterior knows pictures: reconstructions, and bounds on their likelihood."""

import math
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nexus.errors import ModelError
from nexus.evaluate.pictures import psnr, ssim
from nexus.media import levels
from nexus.rng import generator


def analysis(system: nn.Module) -> ModuleType | None:
    """The module `analysis` beside a system's own, where there is one that has `rebuild` and `bounds`."""
    name = type(system).__module__.rpartition(".")[0] + ".analysis"
    if not name.startswith("nexus.models.") or find_spec(name) is None:
        return None
    module = import_module(name)
    return module if hasattr(module, "rebuild") else None


def reconstruction(system: nn.Module, batches: Iterable[dict], *, seed: int,
                   rebuilt: Callable[[np.ndarray], Any] = lambda pictures: None,
                   watch: Callable[[int], Any] = lambda done: None) -> dict[str, Tensor]:
    """Per picture [N]: "psnr" (dB) and "ssim" of 8-bit pictures; "elbo", "iwae" where the system knows them.

    rebuilt(pictures) is given what the system makes of each batch, uint8 [B, H, W, C].

    These two are upper bounds on -log2 p(x) a dimension: of the pixels' density on [-1, 1], or their probability when
    the likelihood is Bernoulli. Draws are a function of seed and picture.
    ModelError for a system that cannot rebuild a picture.
    """
    own = analysis(system)
    if own is None:
        raise ModelError(f"{type(system).__name__} cannot rebuild a picture", hint="a VAE or a picture codec can")
    bounds = own.bounds(system)
    weight, done, columns = next(system.parameters()), 0, {}
    for batch in batches:
        x = batch["image"].to(weight)
        before, after = (levels(pictures) for pictures in (x, own.rebuild(system, x)))
        rebuilt(after.byte().movedim(1, -1).numpy())
        found = {"psnr": psnr(before, after), "ssim": ssim(before, after)}
        per_bit = math.log(2) * math.prod(x.shape[1:])
        for name, bound in bounds.items():      # one by one, so that a picture's draws do not depend on its batch
            nats = [bound(x[i:i + 1], generator(seed, name, done + i)) for i in range(len(x))]
            found[name] = torch.cat(nats) / per_bit
        for name, values in found.items():
            columns.setdefault(name, []).append(values.detach().cpu().double())
        done += len(x)
        watch(done)
    return {name: torch.cat(values) for name, values in columns.items()}
