"""What a trained generator says, for models that learn from it."""

from collections.abc import Callable
from typing import Any

import torch

from nexus.process.guidance import guided
from nexus.process.predictions import clipped, denoiser


def taught(teacher: Any, batch: dict, scale: float, rng: torch.Generator) -> Callable:
    """The denoiser of a frozen system for the items of a batch with their labels, guided by `scale`.

    teacher: a loaded diffusion or flow system. rng: for what its conditioner draws of the labels.
    """
    its, device = teacher.config, next(teacher.net.parameters()).device
    conds = (None,)
    if teacher.conditioner is not None:
        given = teacher.conditioner.training_cond(batch, rng)
        null = teacher.conditioner.null(len(next(iter(given.values()))), torch.device("cpu"))
        conds = [{name: value.to(device) for name, value in cond.items()} for cond in (given, null)]
    with_label, *without = (denoiser(teacher.net, its.path, its.prediction, cond, learned_variance=its.learned_variance)
                            for cond in conds)
    denoise = with_label if not without or scale == 1 else guided(with_label, without[0], scale,
                                                                  channels=its.guided_channels)
    return clipped(denoise) if its.clip else denoise
