"""What a network may predict about x_t = alpha x0 + sigma eps, and how its answer becomes an estimate of x0."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from nexus.errors import UsageError
from nexus.process import edm


class Prediction(NamedTuple):
    """What the network outputs. target: what it should say; x0: what its answer implies.

    d_alpha, d_sigma are the path's rates; only "flow" looks at them (defaults: the straight line's). "edm" is EDM's F
    on any path (edm.py gives it for alpha = 1); it looks at the data's standard deviation instead. There a mean squared
    error of F is Karras et al.'s weighted loss, and with sigma_data = 1, F is -v of a variance preserving path.
    """

    target: Callable  # (x0, eps, alpha, sigma, d_alpha=-1, d_sigma=1) -> Tensor
    x0: Callable      # (out, x_t, alpha, sigma, d_alpha=-1, d_sigma=1) -> Tensor


def _edm_target(x0, eps, a, s, sigma_data=edm.SIGMA_DATA):
    size = (s * s + (sigma_data * a) ** 2) ** 0.5
    return (s / sigma_data * x0 - sigma_data * a * eps) / size         # (x0 - c_skip x) / c_out, finite at sigma = 0


def _edm_x0(out, x, a, s, sigma_data=edm.SIGMA_DATA):
    size = (s * s + (sigma_data * a) ** 2) ** 0.5
    return sigma_data * (sigma_data * a / size * x + s * out) / size


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(lambda x0, eps, a, s, *_: eps,
                      lambda out, x, a, s, *_: (x - s * out) / a),
    "x0": Prediction(lambda x0, eps, a, s, *_: x0,
                     lambda out, x, a, s, *_: out),
    "v": Prediction(lambda x0, eps, a, s, *_: a * eps - s * x0,
                    lambda out, x, a, s, *_: (a * x - s * out) / (a * a + s * s)),
    "flow": Prediction(lambda x0, eps, a, s, da=-1.0, ds=1.0: da * x0 + ds * eps,
                       lambda out, x, a, s, da=-1.0, ds=1.0: (ds * x - s * out) / (ds * a - da * s)),
    "edm": Prediction(_edm_target, _edm_x0),
}


class Estimate(NamedTuple):
    """x0 and where log-variance lies between the posterior's (0) and beta's (1); both [B, C, ...]. iDDPM, eq. 15."""

    x0: Tensor
    fraction: Tensor


def over(v: Tensor, x: Tensor) -> Tensor:
    """v [B] -> [B, 1, ..., 1] to broadcast over x [B, ...]; a 0-dim v stays as it is."""
    return v.reshape(-1, *[1] * (x.ndim - 1)) if v.ndim else v


def noised(path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t [B, ...] at times t [B] or []."""
    alpha, sigma = (over(v, x0) for v in path.at(t.to(x0.device)))
    return alpha * x0 + sigma * eps


def target(path, prediction: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network should output at times t [B]."""
    return PREDICTIONS[prediction].target(x0, eps, *_coefficients(path, prediction, t, x0))


def x0_of(path, prediction: str, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The x0 that a network's output implies; UsageError for eps at pure noise, where it implies none."""
    coefficients = _coefficients(path, prediction, t, x)
    if prediction == "eps" and t.device.type == "cpu" and bool((coefficients[0] == 0).any()):
        raise UsageError("an eps prediction says nothing about x0 at pure noise (alpha = 0)",
                         hint="use prediction v, x0 or flow on this path")
    return PREDICTIONS[prediction].x0(out, x, *coefficients)


def output_of(path, prediction: str, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What a network says that takes x0 for the data: the inverse of `x0_of`."""
    alpha, sigma = (over(v, x).to(x) for v in path.at(t))
    return target(path, prediction, x0, (x - alpha * x0) / sigma, t)


def network_input(path, prediction: str, x: Tensor, t: Tensor) -> Tensor:
    """What the network sees of x [B, ...] at times t [B] or []: x, scaled to unit variance by c_in for "edm"."""
    if prediction != "edm":
        return x
    alpha, sigma, sigma_data = _coefficients(path, prediction, t, x)
    return x / (sigma * sigma + (sigma_data * alpha) ** 2) ** 0.5


def denoiser(net, path, prediction: str, cond=None, prepared=None, *, learned_variance: bool = False,
             dtype: torch.dtype | None = None):
    """A network as denoise(x [B, C, ...], t [] or [B]) -> x0 estimate, in x's dtype; a variance half is dropped."""
    estimate = estimator(net, path, prediction, cond, prepared, learned_variance=learned_variance, dtype=dtype)
    return lambda x, t: x0_part(estimate(x, t))


def estimator(net, path, prediction: str, cond=None, prepared=None, *, learned_variance: bool = False,
              dtype: torch.dtype | None = None):
    """As `denoiser`, but a network with a variance half (2C channels) gives an Estimate, for the ddpm sampler.

    dtype: what the network computes in; its inputs are cast to it, its time stays float32.
    """
    def estimate(x, t):
        clock = path.network_time(t).to(x.device, torch.float32).expand(len(x))
        shared = prepared if t.ndim == 0 else None      # what is prepared holds for a whole batch at one time
        seen = network_input(path, prediction, x, t)
        out = net(seen if dtype is None else seen.to(dtype), clock, cond, shared).to(x.dtype)
        if not learned_variance:
            return x0_of(path, prediction, out, x, t)
        mean, variance = out.chunk(2, dim=1)
        return Estimate(x0_of(path, prediction, mean, x, t), (variance + 1) / 2)
    return estimate


def x0_part(result) -> Tensor:
    """The x0 of what a denoiser or an estimator returned."""
    return result.x0 if isinstance(result, Estimate) else result


def with_x0(result, x0: Tensor):
    """The same result around another x0."""
    return result._replace(x0=x0) if isinstance(result, Estimate) else x0


def clipped(denoise, bound: float = 1.0):
    """x0 kept in [-bound, bound]: static thresholding, for pixels. Ho et al. 2020."""
    return _on_x0(denoise, lambda x0: x0.clamp(-bound, bound))


def thresholded(denoise, quantile: float = 0.995, *, maximum: float = torch.inf):
    """x0 scaled into [-1, 1] by a quantile of its size, an item: dynamic thresholding. Saharia et al. 2022."""
    def threshold(x0):
        size = x0.flatten(1).abs().quantile(quantile, dim=1).clamp(1, maximum)
        size = over(size, x0)
        return x0.clamp(-size, size) / size
    return _on_x0(denoise, threshold)


def masked(denoise, mask: Tensor, known: Tensor):
    """Inpainting: the estimate where mask (bool, broadcast over x) is set, the known x0 elsewhere, at every step.

    The last step of every sampler but midpoint and rk4 returns the known part exactly; `paste` makes it so for all.
    """
    return _on_x0(denoise, lambda x0: paste(x0, mask, known))


def paste(x0: Tensor, mask: Tensor, known: Tensor) -> Tensor:
    """x0 where mask is set, known elsewhere, exactly."""
    return torch.where(mask.to(x0.device), x0, known.to(x0))


def _on_x0(denoise, change):
    def changed(x, t):
        result = denoise(x, t)
        return with_x0(result, change(x0_part(result)))
    return changed


def _coefficients(path, prediction: str, t: Tensor, x: Tensor) -> list:
    both = (*path.at(t), *path.rates(t)) if prediction == "flow" else path.at(t)
    found = [over(v, x).to(x) for v in both] if t.ndim else list(both)     # 0-dim float64 promotes nothing
    return [*found, getattr(path, "sigma_data", edm.SIGMA_DATA)] if prediction == "edm" else found
