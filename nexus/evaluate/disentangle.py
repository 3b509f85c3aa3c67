"""How far single latents follow single factors of the data: the mutual information gap and the beta-VAE score.

N pictures, L latents, K factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.rng import generator

BINS = 20               # of a latent's range; Locatello et al. 2019, appendix
RARE = 20               # a factor whose values are seen less often than this says nothing
POINTS, PAIRS = 1000, 16
FITTED = 2 / 3          # of the beta-VAE score's points; the rest tests the classifier


def usable(factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the factors, name -> ids [N], that have two values or more, each seen often enough on average."""
    return {name: ids for name, ids in factors.items() if 2 <= len(ids.unique()) <= len(ids) / RARE}


def information(codes: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """codes [N, L], a factor's ids [N] -> the information of each latent about it [L], and its entropy, in nats.

    Each latent's range is cut into BINS equal parts, and the information is that of the counts.
    """
    low, high = codes.min(0).values, codes.max(0).values
    parts = ((codes - low) / (high - low).clamp_min(1e-12) * BINS).long().clamp(max=BINS - 1)
    values, ids = ids.unique(return_inverse=True)
    own = F.one_hot(ids, len(values)).double()                                      # [N, V]
    joint = torch.einsum("nlb,nv->lbv", F.one_hot(parts, BINS).double(), own) / len(ids)
    apart = joint.sum(2, keepdim=True) * joint.sum(1, keepdim=True)
    share = own.mean(0)
    return torch.xlogy(joint, joint / apart.clamp_min(1e-300)).sum((1, 2)), -torch.xlogy(share, share).sum()


def gap(codes: Tensor, ids: Tensor) -> float:
    """How much more of a factor's entropy the best latent knows than the next: 0 to 1. Chen et al. 2018, eq. 6.

    With one latent the next knows nothing. The mutual information gap (MIG) is the mean over factors.
    """
    known, entropy = information(codes, ids)
    first, second, *_ = [*known.sort(descending=True).values, torch.zeros(())]
    return float((first - second) / entropy)


def beta_vae_score(codes: Tensor, factors: list[Tensor], seed: int) -> float:
    """The share of right answers of a linear classifier to which factor was held: chance is 1 / K. Higgins et al. 2017.

    A point is made of PAIRS pairs of pictures that agree in one factor, drawn by the seed: the mean |difference| of
    their codes, each latent in units of its own deviation.
    """
    rng = generator(seed, "beta-vae-score")
    codes = codes.double() / codes.double().std(0).clamp_min(1e-12)
    held = torch.randint(len(factors), (POINTS,), generator=rng)
    points = torch.stack([_difference(codes, factors[k], rng) for k in held.tolist()])
    points = (points - points.mean(0)) / points.std(0).clamp_min(1e-12)
    cut = int(POINTS * FITTED)
    return float((_linear(points[:cut], held[:cut], points[cut:]) == held[cut:]).double().mean())


def _difference(codes: Tensor, ids: Tensor, rng: torch.Generator) -> Tensor:
    """The mean |difference| [L] over pairs that agree in `ids`."""
    first = torch.randint(len(ids), (PAIRS,), generator=rng)
    alike = (ids[first][:, None] == ids[None]).double()
    return (codes[first] - codes[torch.multinomial(alike, 1, generator=rng)[:, 0]]).abs().mean(0)


def _linear(x: Tensor, classes: Tensor, seen: Tensor) -> Tensor:
    """What softmax regression fitted on x [M, L] and its classes answers to `seen`."""
    with torch.inference_mode(False), torch.enable_grad():
        x = F.pad(x.clone(), (0, 1), value=1.0)
        weights = torch.zeros(x.shape[1], int(classes.max()) + 1, dtype=x.dtype, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weights, classes) + 1e-4 * weights.square().sum()
            value.backward()
            return value
        optimizer.step(loss)
    return (F.pad(seen, (0, 1), value=1.0) @ weights.detach()).argmax(1)
