"""The numbers on a set of generated pictures: distance, overlap, captions, and real pictures as a yardstick.

All take features [N, D]; the names are those of the report.
"""

from itertools import combinations

import torch
from torch import Tensor

from nexus.evaluate import captions
from nexus.evaluate.bootstrap import mean_interval, normal_interval
from nexus.evaluate.frechet import frechet
from nexus.evaluate.kernel import FEWEST, kid
from nexus.evaluate.manifold import density_coverage, distances, precision_recall
from nexus.rng import generator

FRECHET_FROM = 2000     # pictures in each set: below, the covariance of 1,280 features is too poorly known
MANIFOLD_FROM = 6       # more than the 5 neighbours of density
NEAR = 0.05             # share of real held-out pictures that count as near a training picture

Numbers = dict[str, float | dict[str, float]]


def compare(real: Tensor, made: Tensor, seed: int) -> Numbers:
    """Kernel distance, Frechet distance (large sets only), precision, recall, density and coverage."""
    found: Numbers = {"kid": normal_interval(*kid(real, made))}
    if min(len(real), len(made)) >= FRECHET_FROM:
        found["frechet"] = frechet(real, made)
    return found | overlap(real, made, seed)


def overlap(real: Tensor, made: Tensor, seed: int) -> Numbers:
    """Precision, recall, density and coverage; nothing for a handful."""
    if min(len(real), len(made)) < MANIFOLD_FROM:
        return {}
    values = (*precision_recall(real, made), *density_coverage(real, made))
    names = ("precision", "recall", "density", "coverage")
    return {name: mean_interval(each, seed) for name, each in zip(names, values, strict=True)}


def apart(real: Tensor, made: Tensor) -> Numbers:
    """The kernel distance of rebuilt pictures from real ones that they are no copies of: the halves are crossed.

    real [N, D] and made [N, D] are features of the same pictures in the same random order; N >= 6.
    """
    half = len(real) // 2
    return {"kid, rebuilt half against the other real half": normal_interval(*kid(real[:half], made[half:])),
            "real kid, those halves": normal_interval(*kid(real[:half], real[half:]))}


def yardstick(real: Tensor, style_ids: Tensor, styles: tuple[str, ...], seed: int) -> Numbers:
    """The kernel distance of real pictures from real ones: two random halves, and each style from each other."""
    found: Numbers = {}
    if len(real) >= 2 * FEWEST:
        order = torch.randperm(len(real), generator=generator(seed, "halves"))
        halves = real[order[:len(real) // 2]], real[order[len(real) // 2:]]
        found["real kid, two halves"] = normal_interval(*kid(*halves))
    parts = {name: real[style_ids == i] for i, name in enumerate(styles)}
    for (name, x), (other, y) in combinations(parts.items(), 2):
        if min(len(x), len(y)) >= FEWEST:
            found[f"real kid, {name} from {other}"] = normal_interval(*kid(x, y))
    return found


def read_by(probe: captions.Probe, x: Tensor, labels: Tensor, style_ids: Tensor, seed: int) -> Numbers:
    """Is the right caption the nearest of all, or among five, or another's among five; is the style right; is it both.

    The last one matters: a training picture of the concept in another style is read better than any new picture,
    for the probe has seen it, but its style is wrong.
    """
    rank = captions.ranks(probe, x, labels)
    hits = {f"caption top-{k}": (rank < k).double() for k in (1, 5)}
    if (shuffled := captions.shuffled_hits(probe, x, labels, 5)) is not None:
        hits["caption top-5, captions shuffled"] = shuffled
    if probe.styles.weight.shape[1] > 1:
        hits["style"] = captions.style_hits(probe, x, style_ids)
        hits["caption top-5 and style"] = hits["caption top-5"] * hits["style"]
    return {name: mean_interval(each, seed) for name, each in hits.items()}


def beside_real(made: Numbers, real: Numbers) -> Numbers:
    """`made`, then `real` with its names marked, then the shares of real (none where real has 0)."""
    shares = {f"{name}, share of real": made[name]["value"] / each["value"] for name, each in real.items()
              if each["value"] > 0 and not name.endswith("shuffled")}
    return {**made, **{f"real {name}": each for name, each in real.items()}, **shares}


def near_copies(train: Tensor, real: Tensor, made: Tensor, seed: int) -> Numbers:
    """The share of generated pictures nearer to a training picture than all but 5 % of real held-out ones are.

    A model that has learnt the distribution gives about 0.05, one that repeats its training pictures gives 1.
    """
    bound = torch.quantile(distances(real, train).amin(1), NEAR)
    return {"near-copies of training": mean_interval((distances(made, train).amin(1) <= bound).double(), seed)}
