"""Codes of one-step generators: drawn an item, truncated, and walked between."""

import torch
from torch import Tensor

from nexus.errors import UsageError
from nexus.process.sources import read_noise
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise


def check_codes(request: SampleRequest, size: int) -> None:
    """UsageError for a walk from given noise, InputError for noise that is not of `size` numbers an item."""
    if request.initial_noise is not None:
        _given(request, size, 1)


def _given(request: SampleRequest, size: int, count: int) -> Tensor:
    """The codes in the request's file, as they are."""
    if request.interpolate:
        raise UsageError("--interpolate walks between seeds: not with --initial-noise", hint="leave one out")
    return read_noise(request, (size,), count)


def codes(request: SampleRequest, seeds: list[int], size: int) -> Tensor:
    """The items' codes [B, size], or those of their walks [B, K, size], float32 on the CPU.

    A walk goes over the sphere from the code of the item's seed to that of the next seed, both ends included. Raises
    InputError for a noise file that does not fit, UsageError for a walk from one.
    """
    if request.initial_noise is not None:
        return truncated(_given(request, size, len(seeds)), request.truncation)
    z = ItemNoise(seeds).draw((size,))
    if request.interpolate:
        following = ItemNoise([seed + 1 for seed in seeds]).draw((size,))
        z = torch.stack([slerp(z, following, k / (request.interpolate - 1)) for k in range(request.interpolate)], 1)
    return truncated(z, request.truncation)


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From a [B, Z] at 0 to b at 1 along the arc between them, lengths changing evenly. Shoemake 1985; White 2016."""
    cosine = torch.cosine_similarity(a, b, dim=1, eps=1e-12).clamp(-1 + 1e-7, 1 - 1e-7)[:, None]
    angle = torch.arccos(cosine)
    unit = (torch.sin((1 - share) * angle) * a / a.norm(dim=1, keepdim=True)
            + torch.sin(share * angle) * b / b.norm(dim=1, keepdim=True)) / torch.sin(angle)
    return unit * torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), share)


def truncated(z: Tensor, limit: float | None) -> Tensor:
    """Standard normal numbers -> as many of the normal law cut off at +-limit, in the same order; None = as they are.

    The truncation trick, Brock et al. 2018; by the inverse distribution in place of drawing anew, so that a seed's
    picture changes smoothly with the limit.
    """
    if limit is None:
        return z
    low = torch.special.ndtr(torch.tensor(-limit, dtype=torch.float64))
    share = low + (1 - 2 * low) * torch.special.ndtr(z.double())
    return torch.special.ndtri(share).clamp(-limit, limit).float()
