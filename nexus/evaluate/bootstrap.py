"""Confidence intervals of means over pictures."""

import torch
from torch import Tensor

from nexus.errors import InputError
from nexus.rng import generator

LEVEL = 0.95
DRAWS = 2000


def mean_interval(values: Tensor, seed: int = 0) -> dict[str, float]:
    """{"value", "low", "high"}: the mean of values [N] and its 95 % percentile bootstrap. Efron 1979.

    The draws are a function of the seed. InputError without values.
    """
    if not len(values):
        raise InputError("a mean needs at least one value")
    values = values.double()
    drawn = torch.randint(len(values), (DRAWS, len(values)), generator=generator(seed, "bootstrap"))
    tail = (1 - LEVEL) / 2
    low, high = torch.quantile(values[drawn].mean(1), torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return {"value": float(values.mean()), "low": low, "high": high}


def normal_interval(value: float, error: float) -> dict[str, float]:
    """{"value", "low", "high"} of an estimate with a standard error, 95 %."""
    return {"value": value, "low": value - 1.96 * error, "high": value + 1.96 * error}
