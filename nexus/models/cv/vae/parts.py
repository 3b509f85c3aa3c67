"""What the picture autoencoders share: the terms of their losses, the picture they are given, what they refuse."""

import torch
from torch import Tensor

from nexus.config import Config
from nexus.errors import InputError
from nexus.images import fitted, read_image
from nexus.losses import lpips
from nexus.losses.kl import free_bits, ramp
from nexus.losses.perceptual import edge_distance, perceptual_distance
from nexus.naming import flag_of
from nexus.nn import efficientnet
from nexus.process.sources import from_uint8
from nexus.requests import ONE_STEP, SampleRequest, refuse


def refuse_steering(request: SampleRequest, side: int) -> None:
    """InputError or UsageError for what steers other models and would be ignored here; side: of its pictures, px."""
    for name in ("prompt", "negative_prompt"):
        if getattr(request, name) is not None:
            raise InputError(f"this model is unconditional: it takes no {name.replace('_', ' ')}",
                             hint=f"leave {flag_of(name)} out")
    if request.mask is not None:
        raise InputError("this model rebuilds whole pictures: it takes no mask", hint="leave --mask out")
    refuse(request, ("image", "width", "height"), ONE_STEP)
    others = SampleRequest.model_fields.keys() - {"width", "height"}
    refuse(request, others, f"this model makes {side}x{side} pixels only")


def rate_cost(config: Config, kl: Tensor, step: int) -> Tensor:
    """What the KL [B, ...] of every latent costs at `step`, in nats: beta, its warm-up, free bits and capacity."""
    rate = free_bits(kl, config.free_bits)
    if config.capacity is not None:
        rate = (rate - ramp(step, config.capacity_steps, config.capacity)).abs()
    return ramp(step, config.kl_warmup_steps, config.beta) * rate


def extra_terms(config: Config, shown: Tensor, x: Tensor) -> Tensor | float:
    """The weights of a config times their distances between rebuilt pictures and x, a mean a value."""
    terms = ((config.l1_weight, lambda: (shown - x).abs().mean()),
             (config.l2_weight, lambda: (shown - x).square().mean()),
             (config.edge_weight, lambda: edge_distance(shown, x)),
             (config.lpips_weight, lambda: lpips.opened(config.lpips, x.device)(shown, x).mean()),
             (config.features_weight,
              lambda: perceptual_distance(efficientnet.opened(config.features, x.device), shown, x)))
    return sum(weight * term() for weight, term in terms if weight)


def open_networks(config: Config, device: torch.device) -> None:
    """Open the frozen networks that the extra terms look through; ModelError for a file that is not there."""
    if config.lpips_weight:
        lpips.opened(config.lpips, device)
    if config.features_weight:
        efficientnet.opened(config.features, device)


def psnr(shown: Tensor, x: Tensor) -> Tensor:
    """Peak signal to noise ratio of pictures [B, C, H, W] in [-1, 1], in dB, averaged over the batch."""
    error = (shown.clamp(-1, 1) - x).square().flatten(1).mean(1).clamp_min(1e-10)
    return (10 * torch.log10(4.0 / error)).mean()


def read_picture(path: str, size: int, channels: int) -> Tensor:
    """A picture file -> [1, channels, size, size] in [-1, 1]: its middle square. InputError when it cannot be read."""
    array = fitted(read_image(path, mode="L" if channels == 1 else "RGB"), size, size)
    return from_uint8(array)
