"""What consistency models are made of, as pure functions. Song et al. 2023 (CM), arXiv:2303.01469; Song & Dhariwal 2023
(iCT), arXiv:2310.14189; Luo et al. 2023 (LCM), arXiv:2310.04378.

f(x_t, t) jumps from anywhere on a trajectory of the probability-flow ODE to its end, the data. It is trained so that
two neighbouring points of one trajectory jump to the same place.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.process.predictions import over
from nexus.process.schedules import Grid, intervals
from nexus.process.solvers import estimate, wide

LUMA = (0.2989, 0.5870, 0.1140)         # red, green, blue in a grey value


def discrete_boundary(t: Tensor, scaling: float = 10.0, sigma_data: float = 0.5) -> tuple[Tensor, Tensor]:
    """c_skip, c_out of f = c_skip x + c_out x0_hat at index t: 1 and 0 exactly at t = 0. LCM; scaling as released."""
    s = t * scaling
    size = s.square() + sigma_data ** 2
    return sigma_data ** 2 / size, s / size.sqrt()


# --- how finely time is cut, and how slowly the target follows ------------------------------------------------------

def progressive_scales(step: int, total: int, first: int = 2, last: int = 150) -> int:
    """N(k), the noise levels of a step: about `first` to last + 1, as the square root of time. CM, appendix C."""
    grown = math.sqrt(step / total * ((last + 1) ** 2 - first ** 2) + first ** 2)
    return max(1, math.ceil(grown - 1)) + 1


def doubling_scales(step: int, total: int, first: int = 10, last: int = 1280) -> int:
    """N(k) = min(first 2^floor(k / K'), last) + 1, with K' such that the last value is reached. iCT, section 3.4."""
    each = max(1, total // (int(math.log2(last // first)) + 1))
    return min(first * 2 ** (step // each), last) + 1


def adaptive_decay(scales: int, first: int = 2, start: float = 0.95) -> float:
    """mu(k) = exp(first ln(start) / intervals): the finer the cut, the slower the target. CM, appendix C.

    The paper divides by N(k), the released code by the N(k) - 1 intervals, as here.
    """
    return math.exp(first * math.log(start) / (scales - 1))


def uniform_levels(sigmas: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Indices [n] of intervals [sigmas[i + 1], sigmas[i]] of a falling list, each as likely."""
    return torch.randint(len(sigmas) - 1, (n,), generator=rng)


def lognormal_levels(sigmas: Tensor, n: int, rng: torch.Generator, mean: float = -1.1, std: float = 2.0) -> Tensor:
    """Indices [n] of intervals, as likely as a log-normal sigma is to fall in them. iCT, section 3.5."""
    below = torch.special.ndtr((sigmas.log() - mean) / std)
    return torch.multinomial(below[:-1] - below[1:], n, replacement=True, generator=rng)


# --- distances and the neighbour on the trajectory ------------------------------------------------------------------

def l1(a: Tensor, b: Tensor, c: float = 0.0) -> Tensor:
    """Mean absolute difference an item: [B, ...] -> [B]."""
    return (a - b).abs().flatten(1).mean(1)


def l2(a: Tensor, b: Tensor, c: float = 0.0) -> Tensor:
    """Mean squared difference an item."""
    return (a - b).square().flatten(1).mean(1)


def pseudo_huber(a: Tensor, b: Tensor, c: float = 0.00054) -> Tensor:
    """sqrt(|a - b|^2 + C^2) - C of whole items, C = c sqrt(d) for d numbers an item. iCT, section 3.3."""
    gap = (a - b).flatten(1)
    size = c * math.sqrt(gap.shape[1])
    return (gap.square().sum(1) + size ** 2).sqrt() - size


def huber(a: Tensor, b: Tensor, c: float = 0.001) -> Tensor:
    """Mean of sqrt(difference^2 + c^2) - c over an item's numbers: the loss of LCM's released training."""
    return (((a - b).square() + c * c).sqrt() - c).flatten(1).mean(1)


DISTANCES: dict[str, Callable] = {"l1": l1, "l2": l2, "pseudo-huber": pseudo_huber, "huber": huber}


def heun_step(denoise, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """One Heun step of dx/dt = (x - denoise(x, t)) / t from t [B] to s [B], s > 0, for x_t = x0 + t eps. CM, eq. 6."""
    first, far, h = over(t, x).to(x), over(s, x).to(x), over(s - t, x).to(x)
    slope = (x - denoise(x, t)) / first
    y = x + h * slope
    return x + h / 2 * (slope + (y - denoise(y, s)) / far)


def ddim_step(path, x0: Tensor, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """From t [B] to s [B] along the path, given what x0 is taken to be. Song et al. 2020, eq. 12 with eta = 0."""
    a, sigma, a1, sigma1 = (over(v, x).to(x) for v in (*path.at(t), *path.at(s)))
    return a1 * x0 + sigma1 / sigma * (x - a * x0)


def replayed(first: Callable[[], Tensor], second: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Both results, the second made with the random draws of the first: one dropout mask for both. CM, appendix C."""
    cuda = device.type == "cuda"
    state, more = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
    one = first()
    torch.set_rng_state(state)
    if cuda:
        torch.cuda.set_rng_state(more, device)
    return one, second()


# --- sampling and editing -------------------------------------------------------------------------------------------

def multistep(jump, x: Tensor, grid: Grid, *, noise=torch.randn_like, floor: float = 0.0, watch=None) -> Tensor:
    """Jump to the data, add fresh noise, jump again. CM, algorithm 1; LCM, algorithm 3.

    jump(x, t) -> x0; the grid is that of samplers.py, one step is one jump. floor: the noise that the data of the model
    keep, sigma_min; noise is added up to sqrt(sigma^2 - floor^2).
    """
    x = wide(x)
    for i, t, _, _, _, a1, s1 in intervals(grid):
        x0 = estimate(jump, x, t)
        more = math.sqrt(max(s1 * s1 - floor * floor, 0.0))
        x = a1 * x0 + more * noise(x) if more > 0 else x0
        if watch:
            watch(i, x, x0)
    return x


def holding(jump, part: Callable[[Tensor], Tensor], known: Tensor):
    """Zero-shot editing: every jump ends where `part`, an orthogonal projection, sees `known`. CM, algorithm 4."""
    kept = part(known)

    def held(x: Tensor, t: Tensor) -> Tensor:
        x0 = jump(x, t)
        return x0 + (kept.to(x0) - part(x0))
    return held


def outside(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """What inpainting knows: everything but where mask is True."""
    return lambda x: torch.where(mask, torch.zeros((), dtype=x.dtype, device=x.device), x)


def grey(x: Tensor) -> Tensor:
    """What colourisation knows: the luminance of x [B, 3, H, W]."""
    unit = F.normalize(torch.tensor(LUMA, dtype=x.dtype, device=x.device), dim=0).view(1, 3, 1, 1)
    return (x * unit).sum(1, keepdim=True) * unit


def blocks(size: int) -> Callable[[Tensor], Tensor]:
    """What super-resolution knows: the mean of every block of size x size; x [B, C, H, W], sides multiples of size."""
    def means(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, size).repeat_interleave(size, -2).repeat_interleave(size, -1)
    return means
